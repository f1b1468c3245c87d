"""Rows of tokens for tests: trees in depth-first order, of which causal and packed rows are the simplest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.attention import Visibility

Branch = tuple[int, Sequence[Any]]
"""Tokens in a line, one at least, and the branches that follow the last of them."""


class Row(NamedTuple):
    """`[T]` each, int32."""

    depth: np.ndarray
    end: np.ndarray
    parent: np.ndarray
    """The token before each in its sequence; −1 of roots and padding."""
    is_real: np.ndarray
    """bool: what is not padding."""

    def ancestry(self) -> np.ndarray:
        """bool `[T, T]`: whether a token (second axis) is another (first axis) or above it, by way of the parents."""
        seen = np.eye(len(self.parent), dtype=bool)
        for token, parent in enumerate(self.parent):
            if parent >= 0:
                seen[token] |= seen[parent]
        return seen


def lay_out(roots: Sequence[Branch], length: int) -> Row:
    """The row of some trees, filled up to `length` tokens."""
    depths, ends, parents = [], [], []

    def append(branch: Branch, depth: int, parent: int) -> None:
        tokens, children = branch
        first = len(depths)
        depths.extend(range(depth, depth + tokens))
        parents.extend([parent, *range(first, first + tokens - 1)])
        ends.extend([-1] * tokens)
        for child in children:
            append(child, depth + tokens, first + tokens - 1)
        ends[first : first + tokens] = [len(depths)] * tokens

    for root in roots:
        append(root, 0, -1)
    used, padding = len(depths), length - len(depths)
    assert padding >= 0, f"{used} tokens do not fit {length}"
    arrays = depths + [0] * padding, ends + list(range(used + 1, length + 1)), parents + [-1] * padding
    depth, end, parent = (np.asarray(x, np.int32) for x in arrays)
    return Row(depth, end, parent, np.arange(length) < used)


def random_trees(seed: int, length: int, *, levels: int = 3) -> Row:
    """Trees of random shape, `levels` deep, in a row with some padding."""
    rng = np.random.default_rng(seed)

    def grow(tokens: int, levels: int) -> Branch:
        own = tokens if levels == 1 else int(rng.integers(1, max(2, tokens // 2)))
        shares = split(tokens - own) if tokens > own else []
        return own, [grow(share, levels - 1) for share in shares]

    def split(tokens: int) -> list[int]:
        cuts = rng.choice(np.arange(1, tokens), min(tokens - 1, int(rng.integers(1, 4))), replace=False)
        return np.diff([0, *sorted(cuts), tokens]).tolist()

    used = length - int(rng.integers(1, max(2, length // 8)))
    return lay_out([grow(tokens, levels) for tokens in split(used)], length)


def visibility(*rows: Row) -> Visibility:
    """That of a batch of rows of equal length."""
    return Visibility.of_rows(*(jnp.asarray(np.stack([getattr(row, x) for row in rows])) for x in ("depth", "end")))
