"""Rationales: which of the sampled ones are kept, and those as rows of fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_llm.algorithms.star import keep_rationales
from jaxrl_llm.algorithms.supervised import Demonstrations
from jaxrl_llm.data.prompts import PromptDataset

Record = dict[str, Any]
"""A sample: `item` (of the data set), `ids`, `completion`, `reward`, `correct`; a kept one also `rationalized`."""


def kept_rationales(first: list[Record], hinted: list[Record], *, samples: int, dedup: bool) -> list[Record]:
    """The rationales that are trained on, by problem: right at the first try, or else with the hint.

    Args:
        first: so many `samples` of each problem, in order.
        hinted: as many of some of them, made with the answer as a hint.
        samples: of a problem.
        dedup: whether equal ones of a problem count once.
    """
    correct = np.array([record["correct"] for record in first]).reshape(-1, samples)
    with_hint = np.zeros_like(correct)
    second: dict[tuple[int, int], Record] = {}
    for number, record in enumerate(hinted):
        second[record["item"], number % samples] = record
        with_hint[record["item"], number % samples] = record["correct"]
    masks = keep_rationales(correct, with_hint)
    kept, seen = [], set()
    for item, sample in np.ndindex(correct.shape):
        plain = bool(masks.first_try[item, sample])
        if not plain and not masks.rationalized[item, sample]:
            continue
        record = first[item * samples + sample] if plain else second[item, sample]
        known = (item, tuple(record["ids"]))
        if not (dedup and known in seen):
            kept.append(record | {"rationalized": not plain})
        seen.add(known)
    return kept


class Rationales:
    """Kept rationales as rows of `SupervisedObjective`, each after the prompt that it is trained with."""

    dropped = 0

    def __init__(self, kept: list[Record], problems: PromptDataset, hinted: PromptDataset | None, width: int):
        self._kept, self._problems, self._hinted, self._width = kept, problems, hinted, width
        self.fingerprint = {"rationales": len(kept)}

    def __len__(self) -> int:
        return len(self._kept)

    def batch(self, items: Sequence[int] | np.ndarray) -> Demonstrations:
        """Some of them; with hints, after the prompt with the hint where it was given."""
        records = [self._kept[item] for item in items]
        numbers = [record["item"] for record in records]
        served = self._problems.batch(numbers)
        prompt, lengths = served.tokens, served.lengths
        if self._hinted is not None:
            shown, with_hint = np.array([record["rationalized"] for record in records]), self._hinted.batch(numbers)
            prompt = np.where(shown[:, None], with_hint.tokens, prompt)
            lengths = np.where(shown, with_hint.lengths, lengths)
        completion = np.zeros((len(records), 1, self._width), np.int32)
        for row, record in zip(completion, records, strict=True):
            row[0, : len(record["ids"])] = record["ids"]
        ends = np.array([len(record["ids"]) for record in records])
        return Demonstrations(prompt, lengths, completion, np.arange(self._width) < ends[:, None, None])
