"""Attention in blocks: exact, with memory linear in tokens, and time in the blocks that some query sees.

The online softmax of Rabe & Staats 2021 (2112.05682) and FlashAttention (Dao et al. 2022, 2205.14135) in plain JAX, for
any backend. Which pairs of blocks are computed is decided when the program runs: one loop over a list of them, whose
length is not known to the compiler, so that JAX is told the derivatives (`derivatives.py`).

    forward      s = c·tanh(q·k/√H / c),  lse = log Σ exp s,  out = Σ exp(s − lse) v
    pull (Jᵀ g)  p = exp(s − lse),  δ = ⟨g, out⟩,  dv = Σ p g,  ds = p (⟨g, v⟩ − δ) ∂s,  dq = Σ ds k,  dk = Σ ds q

A sink is a score that does not depend on the query, of a key whose value is 0: the online softmax begins with it, and
its slope is −Σ p δ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.kernels.blocks import Blocks, QueryBlocks
from jaxrl_llm.models.kernels.derivatives import Inputs, Output, attend
from jaxrl_llm.sharding import on_cpu

_MASKED = -1e30
_LOWEST = -5e29  # where a running maximum begins: exp(_MASKED − _LOWEST) is 0 also for queries without a key so far


def blockwise_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visibility,
    *,
    sinks: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    block_size: int | None = None,
) -> jax.Array:
    """`dense_attention` with memory linear in tokens; blocks of queries × keys that see nothing cost nothing.

    What a key holds that a query does not see has no part in its output, and a query whose output no loss reads has no
    part in a gradient, also where these are NaN. A query that sees no key at all gives 0.

    Gradients may be differentiated once more, backwards; and the pull function of `jax.vjp` may be transposed.

    Args:
        query: `[B, Tq, N, H]`, rotated.
        key: `[B, Tk, K, H]`, rotated; query head n reads key head n // (N/K).
        value: `[B, Tk, K, H]`.
        visible: which keys each query sees; may be traced.
        sinks: as of `dense_attention`.
        window: how many levels of the tree a query sees, its own included; `None`: all.
        softcap: c in c·tanh(·/c) on the scores, or `None`.
        block_size: queries, and keys, of one block; need not divide Tq or Tk. `None` chooses by platform and size.

    Returns:
        `[B, Tq, N, H]` in the type of the queries; softmax and sums in float32.

    Raises:
        ValueError: the block size is not positive.
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1 token, got {block_size}; None chooses one")
    size = block_size or default_block_size(max(query.shape[1], key.shape[1]))
    cut = Blockwise(Blocks(window, min(size, query.shape[1]), min(size, key.shape[1])), softcap)
    inputs, visible = _alike(Inputs(query, key, value, sinks), visible)
    output: Output = attend(cut, inputs, visible)
    return output.mixed


def default_block_size(tokens: int) -> int:
    """Tokens of one block in rows of so many.

    On a CPU, that of SmolLM2-135M's heads in float32: what is fastest at 128 to 8192 tokens, within a few per cent, and
    wastes little where sequences of a row begin and end. On accelerators, large enough to hide the start of a kernel.
    """
    if not on_cpu():
        return 512
    return 64 if tokens <= 256 else 128


class Blockwise(NamedTuple):
    """The method: everything static."""

    blocks: Blocks
    softcap: float | None

    def forward(self, inputs: Inputs, visible: Visibility) -> Output:
        """Attention; the normalizer is `[B, Tq, N]`."""
        return _forward(self, inputs, visible)

    def pull(self, inputs: Inputs, visible: Visibility, output: Output, cotangent: jax.Array) -> Inputs:
        """Jᵀ g."""
        return _pull(self, inputs, visible, output, cotangent)

    def plain(self) -> Blockwise:
        """Itself: JAX differentiates loops of unknown length forwards."""
        return self

    def scores(self, query: jax.Array, key: jax.Array, mask: jax.Array) -> jax.Array:
        """Scores of one pair of blocks, `[K, queries · N/K, keys]`."""
        scores = _product("kmh,kth->kmt", query, key)
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        grouped = scores.reshape(len(scores), len(mask), -1, mask.shape[1])
        return jnp.where(mask[:, None], grouped, _MASKED).reshape(scores.shape)

    def slope(self, scores: jax.Array) -> jax.Array | float:
        """Derivative of the soft-cap in terms of its value."""
        return 1.0 if self.softcap is None else 1 - jnp.square(jnp.maximum(scores / self.softcap, -1))  # masked: 0


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right.astype(left.dtype), preferred_element_type=jnp.float32)


def _wide(inputs: Inputs) -> Inputs:
    """In the type that products are taken in.

    XLA's CPU has no product of bfloat16, and cuts no part of such an array without a wider copy of the whole.
    """
    return jax.tree.map(lambda x: x.astype(jnp.float32), inputs) if on_cpu() else inputs


def _varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes of a `shard_map` along which an array is not known to be the same everywhere."""
    return jax.typeof(x).manual_axis_type.varying


def _alike(*arrays: Any) -> Any:
    """Under `shard_map`, arrays that all differ along the mesh axes that one of them does, as those of a loop must."""
    axes = frozenset[str]().union(*(_varying(x) for x in jax.tree.leaves(arrays)))

    def alike(x: jax.Array) -> jax.Array:
        missing = tuple(axes - _varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(alike, arrays)


def _over_keys(queries: QueryBlocks, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """What `body` makes of a carry at one key block of a query block after the other; no result is in it yet."""
    queries, carry = _alike(queries, carry)
    return jax.lax.fori_loop(0, queries.count, lambda n, carry: body(queries.keys[n], carry), carry)


def _add_at(x: jax.Array, index: jax.Array, part: jax.Array) -> jax.Array:
    """Adds `part` to x[index], where it lies."""
    return jax.lax.dynamic_update_index_in_dim(x, x[index] + part, index, 0)


def _usable(inputs: Inputs) -> jax.Array:
    """Marks the keys that hold numbers, bool `[B, Tk, 1, 1]`."""
    return jnp.all(jnp.isfinite(inputs.key) & jnp.isfinite(inputs.value), axis=(2, 3), keepdims=True)


def _of_queries(sinks: jax.Array, query: jax.Array) -> jax.Array:
    """`[N]` → `[K, queries · N/K]`, beside queries of that shape and as many numbers each."""
    by_head = sinks.reshape(len(query), -1)
    return jnp.tile(by_head, query.shape[1] // by_head.shape[1])


def _forward(cut: Blockwise, inputs: Inputs, visible: Visibility) -> Output:
    (query, key, value, sinks), blocks = _wide(inputs), cut.blocks
    usable = _usable(inputs)  # 0 times a NaN would be one; a NaN in a key is masked, or makes the output NaN
    key, value = jnp.where(usable, key, jnp.nan), jnp.where(usable, value, 0)
    query = blocks.of_queries(query * query.shape[-1] ** -0.5, key.shape[2])
    key, value = blocks.of_keys(key), blocks.of_keys(value)
    queries, keys = blocks.of_visible(visible)

    def of_queries(block: tuple[jax.Array, QueryBlocks]) -> tuple[jax.Array, jax.Array]:
        query, queries = block

        def add(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            peak, total, mixed = carry
            scores = cut.scores(query, key[j], blocks.mask(queries, jax.tree.map(lambda x: x[j], keys)))
            higher = jax.lax.stop_gradient(jnp.maximum(peak, jnp.max(scores, axis=-1)))
            weights = jnp.exp(scores - higher[..., None])
            fade = jnp.exp(peak - higher)
            total = fade * total + jnp.sum(weights, axis=-1)
            mixed = fade[..., None] * mixed + _product("kmt,kth->kmh", weights.astype(value.dtype), value[j])
            return higher, total, mixed

        zeros = jnp.zeros(query.shape, jnp.float32)
        peak, total = zeros[..., 0] + _LOWEST, zeros[..., 0]
        if sinks is not None:
            beside = _of_queries(sinks, query)
            peak = jax.lax.stop_gradient(beside)
            total = jnp.exp(beside - peak)
        peak, total, mixed = _over_keys(queries, add, (peak, total, zeros))
        total = jnp.where(total == 0, 1, total)
        return (mixed / total[..., None]).astype(inputs.query.dtype), peak + jnp.log(total)

    mixed, normalizer = jax.lax.map(of_queries, (query, queries))
    return Output(blocks.to_queries(mixed, inputs.query), blocks.to_queries(normalizer, inputs.query))


def _pull(cut: Blockwise, inputs: Inputs, visible: Visibility, output: Output, cotangent: jax.Array) -> Inputs:
    """Jᵀ g of the mixed values."""
    (query, key, value, sinks), blocks = _wide(inputs), cut.blocks
    kv_heads, scale = key.shape[2], query.shape[-1] ** -0.5
    usable = _usable(inputs)
    key, value = blocks.of_keys(jnp.where(usable, key, 0)), blocks.of_keys(jnp.where(usable, value, 0))
    gradient = cotangent.astype(jnp.float32)
    read = jnp.any(gradient != 0, axis=(2, 3))
    queries, keys = blocks.of_visible(visible._replace(place=jnp.where(read, visible.place, -1)))
    read = read[..., None]
    arrays = query * scale, gradient.astype(query.dtype), output.mixed.astype(query.dtype), output.normalizer
    arrays = (jnp.where(read if x.ndim == 3 else read[..., None], x, 0) for x in arrays)
    arrays = tuple(blocks.of_queries(x, kv_heads) for x in arrays)

    def of_queries(carry: tuple[jax.Array, ...], block: tuple) -> tuple[tuple[jax.Array, ...], tuple]:
        (query, gradient, mixed, normalizer), queries = block
        # Here, as XLA's CPU (jaxlib 0.10) takes a hundred times as long for the same sum over whole rows.
        shift = jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1)
        query_columns, gradient_columns = jnp.swapaxes(query, 1, 2), jnp.swapaxes(gradient, 1, 2)

        def add(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            to_query, to_key, to_value = carry
            scores = cut.scores(query, key[j], blocks.mask(queries, jax.tree.map(lambda x: x[j], keys)))
            weights = jnp.exp(scores - normalizer[..., None])
            to_scores = weights * (_product("kmh,kth->kmt", gradient, value[j]) - shift[..., None])
            to_scores = (to_scores * cut.slope(scores)).astype(query.dtype)
            return (
                to_query + _product("kmt,kth->kmh", to_scores, key[j]),
                _add_at(to_key, j, _product("khm,kmt->kht", query_columns, to_scores)),
                _add_at(to_value, j, _product("khm,kmt->kht", gradient_columns, weights.astype(query.dtype))),
            )

        to_query, *sums = _over_keys(queries, add, (jnp.zeros(query.shape, jnp.float32), *carry))
        to_sinks = None
        if sinks is not None:
            slope = jnp.exp(_of_queries(sinks, query) - normalizer) * shift
            to_sinks = -jnp.sum(slope.reshape(kv_heads, -1, len(sinks) // kv_heads), axis=1)
        return tuple(sums), ((to_query * scale).astype(inputs.query.dtype), to_sinks)

    zeros = jnp.zeros_like(jnp.swapaxes(key, 2, 3), jnp.float32)
    (to_key, to_value), (to_query, to_sinks) = jax.lax.scan(of_queries, (zeros, zeros), (arrays, queries))
    to_query = blocks.to_queries(to_query, inputs.query)
    to_sinks = None if to_sinks is None else jnp.sum(to_sinks, axis=0).reshape(-1)
    return Inputs(to_query, blocks.to_keys(to_key, inputs.key), blocks.to_keys(to_value, inputs.value), to_sinks)
