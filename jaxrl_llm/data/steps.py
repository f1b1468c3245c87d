"""Solutions whose steps have labels: prompt, steps and labels of a row, tokenised step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.algorithms.score_models.process_reward import LabelledSteps
from jaxrl_llm.data.encoded_rows import EncodedDataset, EncodedRows, Ragged
from jaxrl_llm.data.formats import PromptFormat, column_of, encode_prompt
from jaxrl_llm.data.interfaces import Row
from jaxrl_llm.data.rows import RowFormat


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
            ValueError: the numbers of steps and labels differ, or no step has a label.
        """
        if len(step_ends) != len(labels):
            raise ValueError(f"{len(step_ends)} steps have {len(labels)} labels: there must be one for each step")
        known = [(end, float(label)) for end, label in zip(step_ends, labels, strict=True) if label is not None]
        if not known:
            raise ValueError("no step has a label")
        mask, values = np.zeros(len(completion), bool), np.zeros(len(completion), np.float32)
        for end, label in known:
            mask[end], values[end] = True, label
        return cls(np.array(prompt, np.int32), np.array(completion, np.int32), mask, values)


def encode_steps(steps: Sequence[str], tokenizer: Any, *, separator: str = "\n") -> tuple[list[int], list[int]]:
    """Token ids of a solution, and the index of each step's last token.

    Each step is tokenised by itself and followed by the separator, the last one by the end of sequence, since
    a tokenizer may merge a separator with what is beside it, and the end of a step would be no token of its own.

    Args:
        steps: their texts, without separators.
        tokenizer: what `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes.
        separator: text between steps, one token or more; the last of them is the end of a step.

    Raises:
        ValueError: there are no steps, a step is empty or holds the separator, or that is no token.
    """
    between = list(tokenizer.encode(separator, add_special_tokens=False))
    if not between:
        raise ValueError(f"the separator {separator!r} has no tokens, and so no step would have an end")
    if not steps:
        raise ValueError("the solution has no steps")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end of sequence, and so a solution could not be ended")
    ids: list[int] = []
    ends: list[int] = []
    for number, step in enumerate(steps):
        own = list(tokenizer.encode(step, add_special_tokens=False))
        if not own or separator in step:
            raise ValueError(f"step {number} is empty, or holds the separator {separator!r}: {step!r:.200}")
        ids += own + (between if number < len(steps) - 1 else [tokenizer.eos_token_id])
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
    """Column with one label for each step: true or false, a number, or None where there is none."""

    separator: str = "\n"
    """Text between steps."""

    def encoder(self, tokenizer: Any) -> Callable[[Row], list[LabelledSolution]]:
        """See `RowFormat`."""

        def encode(row: Row) -> list[LabelledSolution]:
            steps = [text.removesuffix(self.separator) for text in column_of(row, self.steps_column)]
            ids, ends = encode_steps(steps, tokenizer, separator=self.separator)
            prompt = encode_prompt(self.prompt.prompt(row), tokenizer)
            return [LabelledSolution.of(prompt, ids, ends, column_of(row, self.labels_column))]

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
