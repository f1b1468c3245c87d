"""Which sequences that begin alike lie in one row of tokens, and where: a trie, without its nodes.

In alphabetical order sequences with a common beginning are neighbours, and each adds to a row what it does not share
with those beside it. Laid out in that order, what each adds is a tree in depth-first order.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ordered:
    """Sequences in alphabetical order; places in that order are their numbers here."""

    sequences: list[np.ndarray]
    """int32 each."""
    shared: np.ndarray
    """`[n + 1]`: how many tokens each has in common with the one before it; 0 at both ends."""
    order: np.ndarray
    """`[n]`: the number here of each as they were given."""

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray]) -> Ordered:
        """Puts them in order; token ids are not negative."""
        keys = [sequence.astype(">i4").tobytes() for sequence in sequences]  # compares as the ids do
        given = sorted(range(len(keys)), key=keys.__getitem__)
        ordered = [sequences[number] for number in given]
        shared = [_common(*pair) for pair in itertools.pairwise(ordered)]
        return cls(ordered, np.array([0, *shared, 0]), np.argsort(given))

    def common(self, first: int, second: int) -> int:
        """How many tokens two of them have in common, the earlier one given first."""
        return int(self.shared[first + 1 : second + 1].min())

    def fewest(self, number: int) -> int:
        """How many tokens it adds to a row at least, whatever lies there."""
        return len(self.sequences[number]) - int(self.shared[number : number + 2].max())

    def joined(self, members: list[int], others: Iterable[int]) -> tuple[int, list[int]]:
        """How many tokens others add to a row, and the members that it then has, in order."""
        added, members = 0, list(members)
        for number in others:
            at = bisect.bisect(members, number)
            before = self.common(members[at - 1], number) if at else 0
            after = self.common(number, members[at]) if at < len(members) else 0
            added += len(self.sequences[number]) - max(before, after)
            members.insert(at, number)
        return added, members


@dataclasses.dataclass
class Row:
    """What lies in a row so far."""

    groups: list[int]
    """Numbers of groups, in the order in which they came."""
    members: list[int]
    """Numbers of their sequences, in order."""
    used: int
    """Tokens."""


def fill(ordered: Ordered, groups: dict[int, list[int]], tokens: int, most: int | None) -> list[Row]:
    """Deals groups of sequences to rows: each to the row to which it adds least, or to a new one.

    Args:
        ordered: the sequences.
        groups: numbers of the sequences of each group.
        tokens: of a row, enough for any group.
        most: groups in a row; `None`: as many as find room.
    """
    rows: list[Row] = []
    used = np.zeros(len(groups), np.int64)
    for group in sorted(groups, key=lambda group: min(groups[group])):
        members = groups[group]
        least = max(ordered.fewest(number) for number in members)
        best, fewest, joined = None, tokens + 1, []
        for index in np.flatnonzero(used[: len(rows)] + least <= tokens):
            row = rows[index]
            if most is not None and len(row.groups) >= most:
                continue
            added, together = ordered.joined(row.members, members)
            if row.used + added <= tokens and added < fewest:
                best, fewest, joined = row, added, together
        if best is None:
            fewest, joined = ordered.joined([], members)
            best = Row([], [], 0)
            rows.append(best)
        best.groups.append(group)
        best.members, best.used = joined, best.used + fewest
        used[rows.index(best)] = best.used
    return rows


class Laid(NamedTuple):
    """A row as it is laid out, `[T]` int32 each; see `TokenRows` and `PackedLayout`."""

    tokens: np.ndarray
    depth: np.ndarray
    end: np.ndarray
    parent: np.ndarray
    """The place of what predicts each token; of roots and padding, their own."""

    @classmethod
    def padding(cls, tokens: int) -> Laid:
        """A row of so many tokens that holds nothing."""
        place = np.arange(tokens, dtype=np.int32)
        return cls(np.zeros_like(place), np.zeros_like(place), place + 1, place)


def lay_out(ordered: Ordered, row: Row, tokens: int) -> tuple[Laid, dict[int, np.ndarray]]:
    """A row, and where in it the tokens of each member lie."""
    laid = Laid.padding(tokens)
    path, used, before = np.zeros(0, np.int32), 0, -1
    places: dict[int, np.ndarray] = {}
    for number in row.members:
        sequence = ordered.sequences[number]
        shared = ordered.common(before, number) if before >= 0 else 0
        laid.end[path[shared:]] = used  # what branches off there has no more below it
        own = np.arange(used, used + len(sequence) - shared, dtype=np.int32)
        path = np.concatenate([path[:shared], own])
        laid.tokens[own], laid.depth[own] = sequence[shared:], np.arange(shared, len(sequence))
        laid.parent[path[1:]] = path[:-1]
        used, before, places[number] = used + len(own), number, path
    laid.end[path] = used
    return laid, places


def _common(left: np.ndarray, right: np.ndarray) -> int:
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    return int(differs.argmax()) if differs.any() else length
