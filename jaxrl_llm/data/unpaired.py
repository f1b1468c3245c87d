"""Labelled completions: good or bad, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.algorithms.preference.unpaired import UnpairedBatch
from jaxrl_llm.data.formats import Prompt, PromptFormat, column_of
from jaxrl_llm.data.interfaces import Row, RowSource
from jaxrl_llm.data.preferences import PreferenceFormat, content_hash, encode_completion
from jaxrl_llm.data.rows import Overlong, Ragged, read_rows, rows_that_fit
from jaxrl_llm.models.checkpoints.tokenizers import stop_token_ids

SHIFTS = 16
"""How far away the other prompt's completion is looked for."""


class Sample(NamedTuple):
    """A labelled completion as token ids."""

    prompt: np.ndarray
    completion: np.ndarray
    label: bool


@dataclass(frozen=True)
class UnpairedFormat:
    """How a row becomes a labelled completion; a `RowFormat`."""

    prompt: PromptFormat = PromptFormat()
    """How a row becomes a prompt."""

    completion_column: str = "completion"
    """Column with the completion: text, or messages (an assistant's answer)."""

    label_column: str = "label"
    """Column with the label, true or false."""

    from_pairs: bool = False
    """Rows are pairs, and become two samples each, the chosen one with label true."""

    pairs: PreferenceFormat = PreferenceFormat()
    """How a row becomes a pair, with `from_pairs`."""

    mismatched: bool = True
    """Serve another prompt's completion with each sample, which the baseline of KTO is made of."""

    def dataset(
        self,
        source: RowSource,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        overlong: Overlong = "raise",
        max_rows: int | None = None,
    ) -> UnpairedDataset:
        """See `RowFormat`."""
        return UnpairedDataset(
            source,
            tokenizer,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            unpaired_format=self,
            overlong=overlong,
            max_rows=max_rows,
        )

    def samples(self, row: Row) -> list[tuple[Prompt, Any, bool]]:
        """Prompt, completion and label of a row's samples: one, or of a pair two or none.

        Raises:
            ValueError: a column is missing or is not what it should be.
        """
        if self.from_pairs:
            pair = self.pairs.pair(row)
            return [] if pair is None else [(pair.prompt, pair.chosen, True), (pair.prompt, pair.rejected, False)]
        label = column_of(row, self.label_column)
        if not isinstance(label, bool | np.bool_):
            raise ValueError(f"the column {self.label_column!r} is {label!r:.80}: a label is true or false")
        return [(self.prompt.prompt(row), column_of(row, self.completion_column), bool(label))]


class UnpairedDataset:
    """A source's labelled completions, checked and tokenised once; a `RowDataset` of `UnpairedBatch`.

    With mismatched completions, each sample has at index 1 the completion of the sample some places on in the data
    set, the same number of places for all. That number is small and such that, if possible, no sample meets its own
    prompt; where one does, its mask at index 1 is empty. It does not depend on the order in which samples are served,
    so that log-probs under a reference can be computed ahead.

    Args:
        source: As `PreferenceDataset`.
        tokenizer: As `PreferenceDataset`.
        max_prompt_length: As `PreferenceDataset`.
        max_completion_length: As `PreferenceDataset`.
        unpaired_format: How a row becomes a sample; columns `prompt`, `completion` and `label` by default.
        overlong: What to do with longer ones: `"raise"`, or `"drop"` the sample and count it.
        max_rows: Use the first rows only.

    Attributes:
        overlong: Number of samples that were too long.
        unusable: Number of rows whose dialogues are no pair.
        dropped: Both together.
        num_desirable: Number of samples with label true; see `KTOObjective.balanced`.
        num_undesirable: Number of samples with label false.
        fingerprint: Number of rows and of samples and a hash of every token and label.

    Raises:
        ValueError: No rows, a row that gives no sample, or one that is too long; mismatched completions of a single
            prompt.
    """

    def __init__(
        self,
        source: RowSource,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        unpaired_format: UnpairedFormat | None = None,
        overlong: Overlong = "raise",
        max_rows: int | None = None,
    ) -> None:
        form, stop_tokens = unpaired_format or UnpairedFormat(), stop_token_ids(tokenizer)

        def encode(row: Row) -> list[Sample]:
            return [
                Sample(*encode_completion(prompt, completion, tokenizer, stop_tokens), label)
                for prompt, completion, label in form.samples(row)
            ]

        every = read_rows(source, encode, max_rows=max_rows)
        samples = [sample for row in every for sample in row]
        if not samples:
            raise ValueError(f"none of {len(every)} rows is a pair of dialogues with one beginning and two replies")
        fitting = rows_that_fit(
            [len(sample.prompt) for sample in samples],
            [len(sample.completion) for sample in samples],
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            overlong=overlong,
        )
        self.overlong, self.unusable = len(samples) - len(fitting), sum(not row for row in every)
        self.dropped = self.overlong + self.unusable
        self._widths = max_prompt_length, max_completion_length
        self._pad = tokenizer.pad_token_id or 0  # never read: lengths and masks say what is a token
        kept = [samples[number] for number in fitting]
        self._prompts = Ragged([sample.prompt for sample in kept])
        self._completions = Ragged([sample.completion for sample in kept])
        self._labels = np.array([sample.label for sample in kept])
        self.num_desirable, self.num_undesirable = int(self._labels.sum()), int((~self._labels).sum())
        self._others, self._has_other = _others(kept) if form.mismatched else (None, None)
        content = content_hash(self._prompts, self._completions, Ragged([self._labels]))
        self.fingerprint = {"rows": len(every), "samples": len(kept), "content": content, "mismatched": form.mismatched}

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, items: Sequence[int] | np.ndarray, /) -> UnpairedBatch:
        """The samples numbered `items` (0 to `len(self) - 1`); repeats are allowed."""
        numbers = np.asarray(items, np.int64)
        prompt_width, width = self._widths
        sides = [numbers]
        lengths = [self._completions.lengths[numbers]]
        if self._others is not None and self._has_other is not None:
            sides.append(self._others[numbers])
            lengths.append(np.where(self._has_other[numbers], self._completions.lengths[sides[1]], 0))
        return UnpairedBatch(
            prompt=self._prompts.padded(numbers, prompt_width, fill=self._pad),
            prompt_lengths=self._prompts.lengths[numbers],
            completion=np.stack([self._completions.padded(side, width, fill=self._pad) for side in sides], axis=1),
            mask=np.arange(width) < np.stack(lengths, axis=1)[..., None],
            labels=np.stack([self._labels[side] for side in sides], axis=1),
        )


def _others(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """The number of each sample's mismatched one, and whether that is of another prompt."""
    prompts = np.unique([sample.prompt.tobytes() for sample in samples], return_inverse=True)[1]
    if prompts.max() == 0:
        raise ValueError("mismatched completions need two prompts at least: set mismatched=False for a single one")
    shifts = range(1, min(SHIFTS, len(samples) - 1) + 1)
    shift = max(shifts, key=lambda by: int((np.roll(prompts, -by) != prompts).sum()))  # the first of equal ones
    return np.roll(np.arange(len(samples)), -shift), np.roll(prompts, -shift) != prompts
