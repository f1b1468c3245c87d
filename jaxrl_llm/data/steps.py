"""Solutions whose steps have labels: prompt, steps and labels of a row, tokenised step by step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.algorithms.score_models.process_reward import LabelledSteps
from jaxrl_llm.data.formats import PromptFormat, column_of, encode_prompt
from jaxrl_llm.data.interfaces import Row, RowSource
from jaxrl_llm.data.rows import Overlong, Ragged, read_rows, rows_that_fit


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
class StepFormat:
    """How a row becomes a solution with labelled steps; a `RowFormat`."""

    prompt: PromptFormat = PromptFormat()
    """How a row becomes a prompt."""

    steps_column: str = "completions"
    """Column with the list of steps, text each."""

    labels_column: str = "labels"
    """Column with one label for each step: true or false, a number, or None where there is none."""

    separator: str = "\n"
    """Text between steps."""

    def dataset(
        self,
        source: RowSource,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        overlong: Overlong = "raise",
        max_rows: int | None = None,
    ) -> StepDataset:
        """See `RowFormat`."""

        def encode(row: Row) -> LabelledSolution:
            steps = [text.removesuffix(self.separator) for text in column_of(row, self.steps_column)]
            ids, ends = encode_steps(steps, tokenizer, separator=self.separator)
            prompt = encode_prompt(self.prompt.prompt(row), tokenizer)
            return LabelledSolution.of(prompt, ids, ends, column_of(row, self.labels_column))

        return StepDataset(
            read_rows(source, encode, max_rows=max_rows),
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            overlong=overlong,
        )


class StepDataset:
    """Solutions with labelled steps; a `RowDataset` of `LabelledSteps`, G = 1.

    Args:
        solutions: Tokens and labels, of people or from `monte_carlo_labels`; at least one.
        max_prompt_length: Tp, tokens per prompt.
        max_completion_length: Tc, tokens per solution.
        overlong: What to do with longer ones: `"raise"`, or `"drop"` and count them.

    Attributes:
        dropped: Number of solutions that were too long.
        fingerprint: Number of solutions and a hash of all tokens and labels.

    Raises:
        ValueError: A solution is too long, or none is left; names its number.
    """

    def __init__(
        self,
        solutions: Sequence[LabelledSolution],
        *,
        max_prompt_length: int,
        max_completion_length: int,
        overlong: Overlong = "raise",
    ) -> None:
        if not solutions:
            raise ValueError("the data set has no rows")
        kept = rows_that_fit(
            [len(solution.prompt) for solution in solutions],
            [len(solution.completion) for solution in solutions],
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            overlong=overlong,
        )
        self.dropped = len(solutions) - len(kept)
        self._widths = max_prompt_length, max_completion_length
        self._prompts, self._completions, self._masks, self._labels = (
            Ragged([solutions[row][field] for row in kept]) for field in range(4)
        )
        digest = hashlib.sha256()
        for part in (self._prompts, self._completions, self._masks, self._labels):
            digest.update(part.lengths.tobytes())
            digest.update(part.values.tobytes())
        self.fingerprint = {"rows": len(solutions), "solutions": len(kept), "content": digest.hexdigest()[:16]}

    def __len__(self) -> int:
        return len(self._prompts.lengths)

    def batch(self, items: Sequence[int] | np.ndarray, /) -> LabelledSteps:
        """The solutions numbered `items` (0 to `len(self) - 1`); repeats are allowed."""
        prompt_width, width = self._widths
        # Lengths and masks say what is a token, and not what is behind.
        return LabelledSteps(
            prompt=self._prompts.padded(items, prompt_width, fill=0),
            prompt_lengths=self._prompts.lengths[np.asarray(items, np.int64)],
            completion=self._completions.padded(items, width, fill=0)[:, None],
            mask=self._masks.padded(items, width, fill=False)[:, None],
            labels=self._labels.padded(items, width, fill=0.0)[:, None],
        )
