"""How attention is cut into blocks of queries and of keys, and which pairs of these see something."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.kernels.live_blocks import live_blocks

_FAR = 2**30  # beyond every place


class QueryBlocks(NamedTuple):
    """What is known of the query blocks of all rows, `[B · nq, …]`, beside the queries."""

    place: jax.Array
    """`[…, queries]`; −1 of what fills a last block up, which sees nothing."""
    depth: jax.Array
    """`[…, queries]`."""
    count: jax.Array
    """`[…]` int32: how many key blocks each has to do with."""
    keys: jax.Array
    """`[…, nk]` int32: which ones, of those of all rows; the first `count` count."""


class KeyBlocks(NamedTuple):
    """What is known of the key blocks of all rows, `[B · nk, keys]` each; what fills a last block up is not seen."""

    place: jax.Array
    depth: jax.Array
    end: jax.Array


class Blocks(NamedTuple):
    """How attention is cut: everything static. Blocks of all rows are numbered through."""

    window: int | None
    queries: int
    """Queries of one block."""
    keys: int
    """Keys of one block."""

    def of_queries(self, x: jax.Array, kv_heads: int) -> jax.Array:
        """`[B, Tq, N, …]` → `[B · nq, K, queries · N/K, …]`."""
        x = _cut(x, self.queries)
        x = x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, *x.shape[3:])
        x = jnp.swapaxes(x, 1, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    def to_queries(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse of `of_queries`, to `[B, Tq, N, …]` of the shape of `like`."""
        batch, length, heads = like.shape[:3]
        x = x.reshape(*x.shape[:2], self.queries, -1, *x.shape[3:])
        x = jnp.swapaxes(x, 1, 2)
        return x.reshape(batch, -1, heads, *x.shape[4:])[:, :length]

    def of_keys(self, x: jax.Array) -> jax.Array:
        """`[B, Tk, K, H]` → `[B · nk, K, keys, H]`."""
        return jnp.swapaxes(_cut(x, self.keys), 1, 2)

    def to_keys(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """`[B · nk, K, H, keys]` → `[B, Tk, K, H]` of the shape and type of `like`."""
        batch, length, heads, head_dim = like.shape
        return jnp.moveaxis(x, -1, 1).reshape(batch, -1, heads, head_dim)[:, :length].astype(like.dtype)

    def of_visible(self, visible: Visibility) -> tuple[QueryBlocks, KeyBlocks]:
        """Cuts the rows, and finds by their bounds the pairs of blocks with a visible pair of tokens; perhaps more."""
        place, depth = (_cut(x, self.queries, fill) for x, fill in ((visible.place, -1), (visible.depth, 0)))
        keys = (visible.key_place, _FAR), (visible.key_depth, 0), (visible.end, 0)
        keys = KeyBlocks(*(_cut(x, self.keys, fill) for x, fill in keys))
        batch = len(visible.place)
        rows = Visibility(*(x.reshape(batch, -1) for x in (place, depth, *keys)))
        live = live_blocks(rows, (self.queries, self.keys), self.window)
        order = jnp.argsort(~live, axis=-1, stable=True).astype(jnp.int32)  # live ones first, in their order
        order += live.shape[2] * jnp.arange(batch, dtype=jnp.int32)[:, None, None]
        count = jnp.sum(live, axis=-1, dtype=jnp.int32).reshape(-1)
        return QueryBlocks(place, depth, count, order.reshape(len(count), -1)), keys

    def mask(self, queries: QueryBlocks, keys: KeyBlocks) -> jax.Array:
        """Which of a block's keys each of a block's queries sees, bool `[queries, keys]`."""
        rows: Any = [x[None] for x in (queries.place, queries.depth, *keys)]
        return Visibility(*rows).mask(self.window)[0]


def _cut(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
    """`[B, T, …]` → `[B · n, size, …]`, the last block filled up."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    return x.reshape(-1, size, *x.shape[2:])
