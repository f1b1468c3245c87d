"""Labelled completions: good or bad, one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any, NamedTuple, Self

import numpy as np

from jaxrl_llm.algorithms.preference.unpaired import UnpairedBatch
from jaxrl_llm.data.encoded_rows import EncodedDataset, EncodedRows, Ragged
from jaxrl_llm.data.formats import Prompt, PromptFormat, column_of
from jaxrl_llm.data.interfaces import Row
from jaxrl_llm.data.preferences import PreferenceFormat, encode_completions
from jaxrl_llm.data.rows import RowFormat
from jaxrl_llm.models.checkpoints.tokenizers import stop_token_ids

SHIFTS = 16
"""How far away the other prompt's completion is looked for."""


class Sample(NamedTuple):
    """A labelled completion as token ids."""

    prompt: np.ndarray
    completion: np.ndarray
    label: bool

    @property
    def longest(self) -> int:
        """Tokens of the completion."""
        return len(self.completion)


@dataclass(frozen=True)
class UnpairedFormat(RowFormat[Sample, "UnpairedDataset"]):
    """How a row becomes a labelled completion; a `RowFormat`."""

    _USABLE = PreferenceFormat._USABLE

    prompt: PromptFormat = PromptFormat()
    """How a row becomes a prompt."""

    completion_column: str = "completion"
    """Column with the completion: text, or messages (an assistant's answer)."""

    label_column: str = "label"
    """Column with the label: true or false, 1 or 0, or these words."""

    from_pairs: bool = False
    """Rows are pairs, and become two samples each, the chosen one with label true. So it is by itself where the first
    row has a pair and no `completion`."""

    pairs: PreferenceFormat = PreferenceFormat()
    """How a row becomes a pair, with `from_pairs`."""

    mismatched: bool = True
    """Serve another prompt's completion with each sample, which the baseline of KTO is made of."""

    def settled(self, row: Row) -> Self:
        """See `RowFormat`."""
        is_pair = self.completion_column == "completion" not in row and self.pairs.chosen_column in row
        if not (self.from_pairs or is_pair):
            return self
        return dataclasses.replace(self, from_pairs=True, pairs=self.pairs.settled(row))

    def encoder(self, tokenizer: Any) -> Callable[[Row], list[Sample]]:
        """See `RowFormat`."""
        stop_tokens = stop_token_ids(tokenizer)

        def encode(row: Row) -> list[Sample]:
            samples = []
            for prompt, completion, label in self.samples(row):
                ids, (answer,) = encode_completions(row, prompt, [completion], tokenizer, stop_tokens)
                samples.append(Sample(ids, answer, label))
            return samples

        return encode

    def collect(self, encoded: EncodedRows[Sample]) -> UnpairedDataset:
        """See `RowFormat`."""
        return UnpairedDataset(encoded, mismatched=self.mismatched)

    def samples(self, row: Row) -> list[tuple[Prompt, Any, bool]]:
        """Prompt, completion and label of a row's samples: one, or of a pair two or none.

        Raises:
            ValueError: a column is missing or is not what it should be.
        """
        if self.from_pairs:
            pair = self.pairs.pair(row)
            return [] if pair is None else [(pair.prompt, pair.chosen, True), (pair.prompt, pair.rejected, False)]
        label = _label(column_of(row, self.label_column, setting="label_column"), self.label_column)
        completion = column_of(row, self.completion_column, setting="completion_column")
        return [(self.prompt.prompt(row), completion, label)]


def _label(value: Any, column: str) -> bool:
    """A label as data sets write it: true or false, 1 or 0, and both as text, as CSV has it.

    Raises:
        ValueError: it is something else.
    """
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, str | bool | np.bool_ | Number):
        for label, words in ((True, (True, "true", "1")), (False, (False, "false", "0"))):
            if word in words:
                return label
    raise ValueError(f"the column {column!r} is {value!r:.80}: a label is true or false, or 1 or 0")


class UnpairedDataset(EncodedDataset[Sample]):
    """Labelled completions; a `RowDataset` of `UnpairedBatch`.

    With mismatched completions, each sample has at index 1 the completion of the sample some places on in the data
    set, the same number of places for all. That number is small and such that, if possible, no sample meets its own
    prompt; where one does, its mask at index 1 is empty. It does not depend on the order in which samples are served,
    so that log-probs under a reference can be computed ahead.

    Args:
        encoded: The samples.
        mismatched: Serve another prompt's completion with each of them.

    Attributes, besides those of `EncodedDataset`:
        num_desirable: Number of samples with label true; see `KTOObjective.balanced`.
        num_undesirable: Number of samples with label false.

    Raises:
        ValueError: Mismatched completions of a single prompt.
    """

    def __init__(self, encoded: EncodedRows[Sample], *, mismatched: bool = True) -> None:
        prompts = Ragged([sample.prompt for sample in encoded.kept])
        completions = Ragged([sample.completion for sample in encoded.kept])
        self._completions, self._labels = completions, np.array([sample.label for sample in encoded.kept])
        super().__init__(encoded, "samples", [prompts, completions, Ragged([self._labels])])
        self.fingerprint["mismatched"] = mismatched
        self.num_desirable, self.num_undesirable = int(self._labels.sum()), int((~self._labels).sum())
        self._others, self._has_other = _others(encoded.kept) if mismatched else (None, None)

    def batch(self, items: Sequence[int] | np.ndarray, /) -> UnpairedBatch:
        """The samples numbered `items` (0 to `len(self) - 1`); repeats are allowed."""
        numbers = np.asarray(items, np.int64)
        sides = [numbers]
        lengths = [self._completions.lengths[numbers]]
        if self._others is not None and self._has_other is not None:
            sides.append(self._others[numbers])
            lengths.append(np.where(self._has_other[numbers], self._completions.lengths[sides[1]], 0))
        return UnpairedBatch(
            **self._served_prompts(numbers),
            completion=np.stack([self._completions.padded(side, self._width) for side in sides], axis=1),
            mask=np.arange(self._width) < np.stack(lengths, axis=1)[..., None],
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
