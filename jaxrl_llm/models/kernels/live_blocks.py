"""Which blocks of queries and keys meet, as a list that a kernel's grid walks.

Whether any query of a block sees any key of another is decided from the extremes of both blocks, in
O((T / block)²) for rows of T tokens, traced: the list follows the lengths of a batch without a new compilation, and
its length is the grid's, so that blocks that do not meet cost nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention import Visibility

_FAR = 2**30  # beyond every place and depth


class Walk(NamedTuple):
    """Pairs of blocks, those of one outer block one behind the other. Blocks are counted through all rows."""

    outer: jax.Array
    """`[S + 1]` int32, ascending; from `count` on, one past the last block."""
    inner: jax.Array
    """`[S + 1]` int32."""
    count: jax.Array
    """Scalar int32: pairs in the list."""


def live_blocks(visible: Visibility, block: tuple[int, int], window: int | None) -> jax.Array:
    """Blocks of queries that may see something of blocks of keys, bool `[B, Tq / block, Tk / block]`.

    Never false where a query sees a key; queries of negative place, which see none, do not count. True for no more than
    that, where tokens lie in depth-first order and no window is set; a window is judged by the least depth of the
    queries and the greatest of the keys.

    Args:
        visible: Tq and Tk are multiples of the blocks.
        block: tokens in a block of queries and in one of keys.
        window: levels that a query sees, or `None` for all.
    """
    rows = visible.end.shape[0]

    def extremes(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        blocks = x.reshape(rows, -1, size)
        return blocks.min(axis=2), blocks.max(axis=2)

    absent = visible.place < 0
    first = extremes(jnp.where(absent, _FAR, visible.place), block[0])[0][:, :, None]
    last = extremes(visible.place, block[0])[1][:, :, None]
    key, end = extremes(visible.key_place, block[1])[0][:, None], extremes(visible.end, block[1])[1][:, None]
    live = (key <= last) & (first < end)
    if window is not None:
        highest = extremes(jnp.where(absent, _FAR, visible.depth), block[0])[0]
        lowest = extremes(visible.key_depth, block[1])[1]
        live &= highest[:, :, None] - lowest[:, None] < window
    return live


def walk(live: jax.Array) -> Walk:
    """The pairs of `live`, bool `[B, outer, inner]`; an outer block without any has its row's first inner block.

    Each outer block is there, since its result has to be written.
    """
    rows, outer, inner = live.shape
    size = rows * outer * inner
    alone = ~live.any(axis=2)
    live = live.at[:, :, 0].set(live[:, :, 0] | alone)
    pairs = jnp.sort(jnp.where(live.reshape(-1), jnp.arange(size, dtype=jnp.int32), size))
    pairs = jnp.append(pairs, jnp.int32(size))
    return Walk(pairs // inner, pairs // (outer * inner) * inner + pairs % inner, jnp.sum(live, dtype=jnp.int32))
