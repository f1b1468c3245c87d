"""Rows of a table, looked up by tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.sharding import constrain, platform, replicas

_SORTED = 8192
"""Tokens that are sorted at a time, at least, where there are so many."""


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """`table[tokens]`, `[..., T, D]`; ids beyond the table are those at its ends.

    Args:
        table: `[V, D]`, laid out as ("vocab", "embed").
        tokens: `[B, ..., T]` int.
    """
    # A CPU or GPU adds up in any order. A TPU wants tokens sorted, and its sort of all at once is thousands of
    # instructions that XLA writes out one by one: as much to compile as three matrix products.
    return _look_up(table, tokens) if platform() == "tpu" else jnp.take(table, tokens, axis=0, mode="clip")


@jax.custom_vjp
def _look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """`look_up`, whose gradient adds up rows of tokens one after the other, each sorted for itself."""
    return jnp.take(table, tokens, axis=0, mode="clip")


def _forward(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _look_up(table, tokens), (table, tokens)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = saved
    (vocabulary, width), rows, length = table.shape, tokens.size // tokens.shape[-1], tokens.shape[-1]
    shards = replicas() if len(tokens) % replicas() == 0 else 1
    count = _rounds(rows // shards, length)

    def dealt(x: jax.Array, *entries: int) -> jax.Array:
        x = jnp.moveaxis(x.reshape(shards, count, -1, *entries), 1, 0)
        return constrain(x, None, "rows_of_replica", None, *("embed",) * len(entries))

    def add(total: jax.Array, tokens: jax.Array, gradient: jax.Array) -> jax.Array:
        places = jnp.arange(len(tokens), dtype=jnp.int32)
        tokens, order = jax.lax.sort((tokens, places), num_keys=1, is_stable=False)
        return total.at[tokens].add(gradient[order], indices_are_sorted=True, mode="promise_in_bounds")

    def add_round(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return jax.vmap(add)(total, *part), None

    nothing = jnp.zeros((shards, vocabulary, width), gradient.dtype)
    parts = dealt(jnp.clip(tokens, 0, vocabulary - 1)), dealt(gradient, width)
    total, _ = jax.lax.scan(add_round, constrain(nothing, "rows_of_replica", "vocab", "embed"), parts)
    return jnp.sum(total, axis=0), None


_look_up.defvjp(_forward, _backward)


def _rounds(rows: int, length: int) -> int:
    """In how many parts rows of so many tokens are sorted."""
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or rows // n * length >= _SORTED))
