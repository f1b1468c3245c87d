"""Solutions whose steps have labels: prompt, steps and labels of a row, tokenised step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.algorithms.score_models.process_reward import LabelledSteps
from jaxrl_llm.data.conversations import end_of_sequence
from jaxrl_llm.data.encoded_rows import EncodedDataset, EncodedRows, Ragged
from jaxrl_llm.data.formats import PromptFormat, column_of
from jaxrl_llm.data.interfaces import Row
from jaxrl_llm.data.messages import tools_of
from jaxrl_llm.data.rows import RowFormat
from jaxrl_llm.data.tokens import encode, encode_parts, encode_prompt, render, stop_texts, without_end


class LabelledSolution(NamedTuple):
    """A solution as token ids, with the labels of its steps."""

    prompt: np.ndarray
    """int32."""
    completion: np.ndarray
    """int32."""
    mask: np.ndarray
    """bool, of the completion: the last token of a step that has a label."""
    labels: np.ndarray
    """float32, of the completion: the label there, 0 elsewhere."""

    @property
    def longest(self) -> int:
        """Tokens of the completion."""
        return len(self.completion)

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        completion: Sequence[int],
        step_ends: Sequence[int],
        labels: Sequence[float | bool | None] | np.ndarray,
    ) -> LabelledSolution:
        """From the indices of the steps' last tokens and one label each, `None` where there is none.

        Raises:
            ValueError: the numbers of steps and labels differ, a label is none, or no step has one.
        """
        if len(step_ends) != len(labels):
            raise ValueError(f"{len(step_ends)} steps have {len(labels)} labels: there must be one for each step")
        for number, label in enumerate(labels):
            if label is not None and (isinstance(label, str) or not -1 <= float(label) <= 1):
                raise ValueError(f"the label of step {number} is {label!r:.80}, not true, false or from -1 to 1")
        known = [(end, float(label)) for end, label in zip(step_ends, labels, strict=True) if label is not None]
        if not known:
            raise ValueError("no step has a label")
        mask, values = np.zeros(len(completion), bool), np.zeros(len(completion), np.float32)
        for end, label in known:
            mask[end], values[end] = True, label
        return cls(np.array(prompt, np.int32), np.array(completion, np.int32), mask, values)


def encode_steps(
    steps: Sequence[str], tokenizer: Any, *, separator: str = "\n", prompt: str = ""
) -> tuple[list[int], list[int]]:
    """Token ids of a solution, and the index of each step's last token.

    Each step is followed by the separator, the last one by the end of sequence. They are tokenised as one text, in
    which no token crosses the beginning of a step or of a separator (see `encode_parts`), so that the end of a step is
    a token of its own.

    Args:
        steps: their texts, without separators.
        tokenizer: what `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes.
        separator: text between steps, one token or more; the last of them is the end of a step.
        prompt: the text that they follow.

    Raises:
        ValueError: there are no steps, a step is empty or holds the separator, or that is no token.
    """
    end = end_of_sequence(tokenizer)
    if not encode(separator, tokenizer):
        raise ValueError(f"the separator {separator!r} has no tokens, and so no step would have an end")
    if not steps:
        raise ValueError("the solution has no steps")
    *others, last = steps
    last = without_end(last, stop_texts(tokenizer, [end]))[0]
    for number, step in enumerate([*others, last]):
        if not step or separator in step:
            raise ValueError(f"step {number} is empty, or holds the separator {separator!r}: {step!r:.200}")
    parts = [part for step in others for part in (step, separator)]
    _, *pieces = encode_parts([prompt, *parts, last], tokenizer)
    ids: list[int] = []
    ends: list[int] = []
    for own, between in zip(pieces[::2], [*pieces[1::2], [end]], strict=True):
        ids += own + between
        ends.append(len(ids) - 1)
    return ids, ends


@dataclass(frozen=True)
class StepFormat(RowFormat[LabelledSolution, "StepDataset"]):
    """How a row becomes a solution with labelled steps; a `RowFormat`."""

    prompt: PromptFormat = PromptFormat()
    """How a row becomes a prompt."""

    steps_column: str = "completions"
    """Column with the list of steps, text each."""

    labels_column: str = "labels"
    """Column with one label for each step: true or false, a number from -1 to 1, or None where there is none."""

    separator: str = "\n"
    """Text between steps."""

    def encoder(self, tokenizer: Any) -> Callable[[Row], list[LabelledSolution]]:
        """See `RowFormat`."""

        def encode(row: Row) -> list[LabelledSolution]:
            texts = column_of(row, self.steps_column, setting="steps_column")
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"the column {self.steps_column!r} is a list of steps, text each, got {texts!r:.200}")
            steps = [text.removesuffix(self.separator) for text in texts]
            prompt = self.prompt.prompt(row)
            tools = tools_of(row, prompt)
            text = prompt if isinstance(prompt, str) else render(prompt, tokenizer, start=True, tools=tools)
            ids, ends = encode_steps(steps, tokenizer, separator=self.separator, prompt=text)
            start = encode_prompt(prompt, tokenizer, tools=tools)
            return [LabelledSolution.of(start, ids, ends, column_of(row, self.labels_column, setting="labels_column"))]

        return encode

    def collect(self, encoded: EncodedRows[LabelledSolution]) -> StepDataset:
        """See `RowFormat`."""
        return StepDataset(encoded)


class StepDataset(EncodedDataset[LabelledSolution]):
    """Solutions with labelled steps, G = 1; a `RowDataset` of `LabelledSteps`. Attributes as of `EncodedDataset`.

    Args:
        encoded: Tokens and labels, of people (`StepFormat`) or from `monte_carlo_labels` (`EncodedRows.fitting`).
    """

    def __init__(self, encoded: EncodedRows[LabelledSolution]) -> None:
        parts = [Ragged([solution[field] for solution in encoded.kept]) for field in range(4)]
        super().__init__(encoded, "solutions", parts)

    def batch(self, items: Sequence[int] | np.ndarray, /) -> LabelledSteps:
        """The solutions numbered `items` (0 to `len(self) - 1`); repeats are allowed."""
        numbers = np.asarray(items, np.int64)
        completions, masks, labels = (part.padded(numbers, self._width)[:, None] for part in self._parts)
        return LabelledSteps(**self._served_prompts(numbers), completion=completions, mask=masks, labels=labels)
