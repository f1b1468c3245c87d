"""What prompts got when they were sampled last, on the host: what speculation proposes in the next epoch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_MOST_TOKENS = 2**28
"""That are kept, a GiB: beyond that, prompts whose turn lies farthest back are forgotten."""


class _Group(NamedTuple):
    """The completions of a prompt."""

    tokens: np.ndarray
    """int32, one completion behind the other."""
    lengths: np.ndarray
    """`[G]`."""


class CompletionHistory:
    """The last completions of each prompt, in memory that is bounded.

    Args:
        group: G, completions of a prompt, a greedy one included.
        width: Tc, tokens of the longest.
        most_tokens: that are kept, about.
    """

    def __init__(self, group: int, width: int, *, most_tokens: int = _MOST_TOKENS):
        self._group, self._width, self._most = group, width, most_tokens
        self._groups: dict[int, _Group] = {}  # the one that was kept last is last
        self._kept = 0

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Completions `[P, G, Tc]` of prompts, by their rows in the data, and their lengths `[P, G]`, 0: none."""
        lengths = np.zeros((len(rows), self._group), np.int32)
        tokens = np.zeros((*lengths.shape, self._width), np.int32)
        for place, row in enumerate(rows.tolist()):
            if (group := self._groups.get(row)) is not None:
                lengths[place] = group.lengths
                tokens[place][np.arange(self._width) < group.lengths[:, None]] = group.tokens
        return tokens, lengths

    def keep(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Keeps completions `[P, G, Tc]` of these lengths `[P, G]`, in place of what these prompts had."""
        mask = np.arange(self._width) < lengths[..., None]
        for place, row in enumerate(rows.tolist()):
            self._forget(row)
            self._groups[row] = _Group(tokens[place][mask[place]], lengths[place])
            self._kept += int(lengths[place].sum())
        while self._kept > self._most:
            self._forget(next(iter(self._groups)))

    def _forget(self, row: int) -> None:
        if (group := self._groups.pop(row, None)) is not None:
            self._kept -= len(group.tokens)
