"""Packing: several short demonstrations in one row, so that little is spent on padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.algorithms.supervised import PackedDemonstrations
from jaxrl_llm.data.conversations import Encoded
from jaxrl_llm.data.encoded_rows import Ragged

_LONGEST = 2**20
"""Tokens of a row that are held, if need be, for nothing."""
_PADDING = -1
"""Segment of the padding of a packed row."""


class PackedDataset:
    """Demonstrations packed into rows of one length; a `RowDataset` of `PackedDemonstrations`.

    Longer ones come first, each into the first row that has room, so that the same data give the same rows. The loss
    of all of them is that of the unpacked ones: they do not see each other.

    Args:
        encoded: The demonstrations, at least one.
        length: T, tokens of a row.
        rows: Number of each demonstration in the source, for errors.
        fingerprint: That of the demonstrations.
        dropped: Number of rows of the source that were too long.

    Attributes:
        dropped: As given.
        members: Numbers of the demonstrations of each row.
        fingerprint: As given, and the length.

    Raises:
        ValueError: A demonstration is longer than a row (names it), or rows would be far longer than all of them.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        length: int,
        *,
        rows: np.ndarray,
        fingerprint: Mapping[str, Any],
        dropped: int = 0,
    ) -> None:
        self.dropped, self._length = dropped, length
        self.fingerprint = {**fingerprint, "packed_length": length}
        sizes = np.array([len(shown.prompt) + len(shown.completion) for shown in encoded])
        if sizes.max() > length:
            raise ValueError(
                f"row {rows[sizes.argmax()]}: prompt and completion have {sizes.max()} tokens, more than "
                f"packed_length={length}; raise it, or drop what is longer by lower limits"
            )
        if length > max(_LONGEST, int(sizes.sum())):
            raise ValueError(
                f"packed_length={length} is more than the {sizes.sum()} tokens of all {len(sizes)} demonstrations, and "
                "each row is padded to it; lower it"
            )
        self.members = _packed(sizes, length)
        packed = [_row([encoded[item] for item in items]) for items in self.members]
        self._tokens, self._masks, self._segments = (Ragged(list(part)) for part in zip(*packed, strict=True))

    def __len__(self) -> int:
        return len(self.members)

    def batch(self, items: Sequence[int] | np.ndarray, /) -> PackedDemonstrations:
        """The rows numbered `items` (0 to `len(self) - 1`); repeats are allowed."""
        numbers = np.asarray(items, np.int64)
        return PackedDemonstrations(
            prompt=np.zeros((len(numbers), 1), np.int32),
            prompt_lengths=np.ones(len(numbers), np.int32),
            completion=self._tokens.padded(numbers, self._length, fill=0)[:, None],
            mask=self._masks.padded(numbers, self._length, fill=False)[:, None],
            segment_ids=self._segments.padded(numbers, self._length, fill=_PADDING)[:, None],
        )


def _packed(sizes: np.ndarray, length: int) -> list[list[int]]:
    """Numbers of the items of each row: the longest first, each into the first row with room."""
    members: list[list[int]] = []
    room = np.zeros(len(sizes), np.int64)
    for item in np.argsort(-sizes, kind="stable"):
        row = int(np.argmax(room[: len(members)] >= sizes[item])) if members else 0
        if not members or room[row] < sizes[item]:
            row = len(members)
            members.append([])
            room[row] = length
        members[row].append(int(item))
        room[row] -= sizes[item]
    return members


def _row(members: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask and segment numbers of demonstrations one after another."""
    tokens = [part for shown in members for part in (shown.prompt, shown.completion)]
    masks = [part for shown in members for part in (np.zeros(len(shown.prompt), bool), shown.mask)]
    lengths = [len(shown.prompt) + len(shown.completion) for shown in members]
    return np.concatenate(tokens), np.concatenate(masks), np.repeat(np.arange(len(members), dtype=np.int32), lengths)
