"""Attention in blocks: exact, with memory linear in tokens, and time in the blocks that some query sees.

The online softmax of Rabe & Staats 2021 (2112.05682) and FlashAttention (Dao et al. 2022, 2205.14135) in plain JAX, for
any backend. Which pairs of blocks are computed is decided when the program runs: one loop over a list of them, whose
length is not known to the compiler.

    forward      s = c·tanh(q·k/√H / c),  lse = log Σ exp s,  out = Σ exp(s − lse) v
    pull (Jᵀ g)  p = exp(s − lse),  δ = ⟨g, out⟩,  dv = Σ p g,  ds = p (⟨g, v⟩ − δ) ∂s,  dq = Σ ds k,  dk = Σ ds q

A loop of unknown length has no rule for going backwards, so that JAX is told the derivatives: the pull, its transpose
(the push J v), and the derivative of the pull, H w, where H, being the Hessian of ⟨g, out⟩, is its own transpose. Push
and H w are these loops, differentiated forwards by JAX. `linear_call` joins what are each other's transposes; it
transposes in all of its arguments or none, and hence is given one array of all tangents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import linear_call
from jax.flatten_util import ravel_pytree

from jaxrl_llm.models.attention import ATTENTION, Visibility
from jaxrl_llm.sharding import on_cpu

_MASKED = -1e30
_LOWEST = -5e29  # where a running maximum begins: exp(_MASKED − _LOWEST) is 0 also for queries without a key so far
_FAR = 2**30  # beyond every place and depth


def blockwise_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visibility,
    *,
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
    size = block_size or 256
    blocks = _Blocks(window, softcap, min(size, query.shape[1]), min(size, key.shape[1]))
    inputs, visible = _alike(_Inputs(query, key, value), visible)
    output: _Output = _attend(blocks, inputs, visible)
    return output.mixed


class _Inputs(NamedTuple):
    """What attention is differentiated in."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


class _Output(NamedTuple):
    mixed: jax.Array
    """`[B, Tq, N, H]`."""
    normalizer: jax.Array
    """`[B, Tq, N]` float32: log Σ exp s."""


class _Pairs(NamedTuple):
    """The pairs of a query block and a key block of the same row that are computed."""

    count: jax.Array
    queries: jax.Array
    """`[B · nq · nk]` int32: the query block, among those of all rows; the first `count` entries are pairs."""
    keys: jax.Array


class _Blocks(NamedTuple):
    """How attention is cut: everything static."""

    window: int | None
    softcap: float | None
    queries: int
    """Queries of one block."""
    keys: int
    """Keys of one block."""

    def of_queries(self, x: jax.Array, kv_heads: int) -> jax.Array:
        """`[B, Tq, N, …]` → `[B · nq, K, size · N/K, …]`."""
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
        """`[B, Tk, K, H]` → `[B · nk, K, size, H]`."""
        return jnp.swapaxes(_cut(x, self.keys), 1, 2)

    def to_keys(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """`[B · nk, K, H, size]` → `[B, Tk, K, H]` of the shape and type of `like`."""
        batch, length, heads, head_dim = like.shape
        return jnp.moveaxis(x, -1, 1).reshape(batch, -1, heads, head_dim)[:, :length].astype(like.dtype)

    def of_visible(self, visible: Visibility) -> Visibility:
        """`[B · n, size]` each; what fills up a last block sees nothing and is not seen."""
        return Visibility(
            _cut(visible.place, self.queries, -1),
            _cut(visible.depth, self.queries),
            _cut(visible.key_place, self.keys, _FAR),
            _cut(visible.key_depth, self.keys),
            _cut(visible.end, self.keys),
        )

    def pairs(self, visible: Visibility, batch: int) -> _Pairs:
        """The pairs of blocks that hold a visible pair of tokens, by their bounds; perhaps some more."""
        sees = visible.place >= 0
        first = jnp.min(jnp.where(sees, visible.place, _FAR), axis=1).reshape(batch, -1, 1)
        last = jnp.max(visible.place, axis=1).reshape(batch, -1, 1)
        live = (jnp.min(visible.key_place, axis=1).reshape(batch, 1, -1) <= last) & (
            first < jnp.max(visible.end, axis=1).reshape(batch, 1, -1)
        )
        if self.window is not None:
            highest = jnp.min(jnp.where(sees, visible.depth, _FAR), axis=1).reshape(batch, -1, 1)
            lowest = jnp.max(jnp.where(visible.key_place < _FAR, visible.key_depth, -_FAR), axis=1)
            live &= highest - lowest.reshape(batch, 1, -1) < self.window
        pairs = jnp.argsort(~live.reshape(-1), stable=True).astype(jnp.int32)
        queries, keys = pairs // live.shape[2], pairs % live.shape[2]
        return _Pairs(jnp.sum(live, dtype=jnp.int32), queries, queries // live.shape[1] * live.shape[2] + keys)

    def scores(self, query: jax.Array, key: jax.Array, visible: Visibility, i: jax.Array, j: jax.Array) -> jax.Array:
        """Scores of one pair of blocks, `[K, queries · N/K, keys]`."""
        scores = _product("kmh,kth->kmt", query, key)
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        mask = Visibility(*(x[None] for x in (visible.place[i], visible.depth[i])), *(x[j][None] for x in visible[2:]))
        mask = mask.mask(self.window)[:, :, None]  # [1, queries, 1, keys]
        grouped = scores.reshape(len(scores), self.queries, -1, self.keys)
        return jnp.where(mask, grouped, _MASKED).reshape(scores.shape)


def _cut(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
    """`[B, T, …]` → `[B · n, size, …]`, the last block filled up."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    return x.reshape(-1, size, *x.shape[2:])


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right.astype(left.dtype), preferred_element_type=jnp.float32)


def _wide(inputs: _Inputs) -> _Inputs:
    """In the type that products are taken in.

    XLA's CPU has no product of bfloat16, and cuts no part of such an array without a wider copy of the whole.
    """
    return _Inputs(*(x.astype(jnp.float32) for x in inputs)) if on_cpu() else inputs


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


def _loop(pairs: _Pairs, body: Callable[[jax.Array, jax.Array, Any], Any], carry: Any) -> Any:
    """Adds to the carry, which holds no result yet, what `body` finds at each pair of blocks."""
    pairs, carry = _alike(pairs, carry)
    return jax.lax.fori_loop(0, pairs.count, lambda n, carry: body(pairs.queries[n], pairs.keys[n], carry), carry)


def _usable(inputs: _Inputs) -> jax.Array:
    """Marks the keys that hold numbers, bool `[B, Tk, 1, 1]`."""
    return jnp.all(jnp.isfinite(inputs.key) & jnp.isfinite(inputs.value), axis=(2, 3), keepdims=True)


def _forward(blocks: _Blocks, inputs: _Inputs, visible: Visibility) -> _Output:
    query, key, value = _wide(inputs)
    (batch, _, _, head_dim), kv_heads = query.shape, key.shape[2]
    usable = _usable(inputs)  # 0 times a NaN would be one; a NaN in a key is masked, or makes the output NaN
    key, value = jnp.where(usable, key, jnp.nan), jnp.where(usable, value, 0)
    query = blocks.of_queries(query * head_dim**-0.5, kv_heads)
    key, value = blocks.of_keys(key), blocks.of_keys(value)
    visible = blocks.of_visible(visible)

    def body(i: jax.Array, j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, mixed = (x[i] for x in carry)
        scores = blocks.scores(query[i], key[j], visible, i, j)
        higher = jax.lax.stop_gradient(jnp.maximum(peak, jnp.max(scores, axis=-1)))
        weights = jnp.exp(scores - higher[..., None])
        fade = jnp.exp(peak - higher)
        total = fade * total + jnp.sum(weights, axis=-1)
        mixed = fade[..., None] * mixed + _product("kmt,kth->kmh", weights.astype(value.dtype), value[j])
        return tuple(x.at[i].set(part) for x, part in zip(carry, (higher, total, mixed), strict=True))

    zeros = jnp.zeros(query.shape, jnp.float32)
    carry = (zeros[..., 0] + _LOWEST, zeros[..., 0], zeros)
    peak, total, mixed = _loop(blocks.pairs(visible, batch), body, carry)
    total = jnp.where(total == 0, 1, total)
    mixed = blocks.to_queries(mixed / total[..., None], inputs.query).astype(inputs.query.dtype)
    return _Output(mixed, blocks.to_queries(peak + jnp.log(total), inputs.query))


def _pull(blocks: _Blocks, inputs: _Inputs, visible: Visibility, output: _Output, cotangent: jax.Array) -> _Inputs:
    """Jᵀ g of the mixed values."""
    query, key, value = _wide(inputs)
    (batch, _, _, head_dim), kv_heads = query.shape, key.shape[2]
    usable = _usable(inputs)
    key, value = jnp.where(usable, key, 0), jnp.where(usable, value, 0)
    slope = cotangent.astype(jnp.float32)
    read = jnp.any(slope != 0, axis=(2, 3))
    visible = blocks.of_visible(visible._replace(place=jnp.where(read, visible.place, -1)))
    read = read[..., None]
    shift = jnp.where(read, jnp.sum(slope * output.mixed, axis=-1), 0)
    shift, normalizer = (blocks.of_queries(x, kv_heads) for x in (shift, jnp.where(read, output.normalizer, 0)))
    query = blocks.of_queries(jnp.where(read[..., None], query * head_dim**-0.5, 0), kv_heads)
    slope = blocks.of_queries(slope.astype(query.dtype), kv_heads)
    key, value = blocks.of_keys(key), blocks.of_keys(value)

    def body(i: jax.Array, j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        to_query, to_key, to_value = carry
        scores = blocks.scores(query[i], key[j], visible, i, j)
        weights = jnp.exp(scores - normalizer[i][..., None])
        to_scores = weights * (_product("kmh,kth->kmt", slope[i], value[j]) - shift[i][..., None])
        if blocks.softcap is not None:
            to_scores *= 1 - jnp.square(jnp.maximum(scores / blocks.softcap, -1))  # of masked scores it is 0
        to_scores = to_scores.astype(query.dtype)
        return (
            to_query.at[i].add(_product("kmt,kth->kmh", to_scores, key[j])),
            to_key.at[j].add(_product("kmh,kmt->kht", query[i], to_scores)),
            to_value.at[j].add(_product("kmh,kmt->kht", slope[i], weights.astype(query.dtype))),
        )

    of_keys = jnp.zeros_like(jnp.swapaxes(key, -1, -2), jnp.float32)
    carry = (jnp.zeros(query.shape, jnp.float32), of_keys, of_keys)
    to_query, to_key, to_value = _loop(blocks.pairs(visible, batch), body, carry)
    to_query = blocks.to_queries(to_query * head_dim**-0.5, inputs.query).astype(inputs.query.dtype)
    return _Inputs(to_query, blocks.to_keys(to_key, inputs.key), blocks.to_keys(to_value, inputs.value))


_Saved = tuple[_Inputs, Visibility, _Output]


def _push(blocks: _Blocks, saved: _Saved, tangent: _Inputs) -> jax.Array:
    """J v of the mixed values."""
    inputs, visible, _ = saved
    return jax.jvp(lambda inputs: _forward(blocks, inputs, visible).mixed, (inputs,), (tangent,))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: _Blocks, inputs: _Inputs, visible: Visibility) -> _Output:
    """Differentiable in the mixed values; the normalizer passes no gradient on."""
    return _forward(blocks, inputs, visible)


def _attend_forward(blocks: _Blocks, inputs: _Inputs, visible: Visibility) -> tuple[_Output, _Saved]:
    # Itself, so that the gradient can be differentiated. Where `visible` is the same for all steps of a scan, JAX would
    # take it out of the call and then mistake its residuals for others, were it not tied to the inputs.
    inputs, visible = jax.lax.optimization_barrier((inputs, visible))
    output: _Output = _attend(blocks, inputs, visible)
    output = _Output(checkpoint_name(output.mixed, ATTENTION), checkpoint_name(output.normalizer, ATTENTION))
    return output, (inputs, visible, output)


def _attend_backward(blocks: _Blocks, saved: _Saved, cotangent: _Output) -> tuple[_Inputs, None]:
    return _differentiable_pull(blocks, *saved, cotangent.mixed), None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable_pull(
    blocks: _Blocks, inputs: _Inputs, visible: Visibility, output: _Output, cotangent: jax.Array
) -> _Inputs:
    """Jᵀ g as a function that can be transposed in g, and differentiated in inputs and g."""

    def pull(saved: _Saved, cotangent: jax.Array) -> _Inputs:
        return _pull(blocks, *saved, cotangent)

    def push(saved: _Saved, tangent: _Inputs) -> jax.Array:
        return _push(blocks, saved, tangent)

    return linear_call(pull, push, (inputs, visible, output), cotangent)


@_differentiable_pull.defjvp
def _differentiate_pull(blocks: _Blocks, primals: tuple, tangents: tuple) -> tuple[_Inputs, _Inputs]:
    flat, unflatten = ravel_pytree((tangents[0], tangents[3]))  # the output is a function of the inputs
    *saved, cotangent = primals

    def curved(saved: _Saved, cotangent: jax.Array, tangent: _Inputs) -> _Inputs:
        """H w."""

        def pull(inputs: _Inputs) -> _Inputs:
            return _pull(blocks, inputs, saved[1], _forward(blocks, inputs, saved[1]), cotangent)

        return jax.jvp(pull, (saved[0],), (tangent,))[1]

    def push(at: tuple[_Saved, jax.Array], flat: jax.Array) -> _Inputs:
        (saved, cotangent), (along_inputs, along_cotangent) = at, unflatten(flat)
        return jax.tree.map(jnp.add, curved(saved, cotangent, along_inputs), _pull(blocks, *saved, along_cotangent))

    def pull(at: tuple[_Saved, jax.Array], tangent: _Inputs) -> jax.Array:
        return ravel_pytree((curved(*at, tangent), _push(blocks, at[0], tangent)))[0]

    return _differentiable_pull(blocks, *primals), linear_call(push, pull, (tuple(saved), cotangent), flat)
