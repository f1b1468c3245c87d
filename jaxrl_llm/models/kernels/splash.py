"""Block-sparse flash attention for TPUs, in Pallas: only blocks that meet are visited, and no scores reach memory.

Kernels of this package, not those of `jax.experimental.pallas.ops.tpu.splash_attention`: these take a mask that is
known when they are built, or one stored by blocks, and segments by equality. Here the mask is one traced integer a key
(`Visibility`), the grid walks a traced list of the blocks that meet (`live_blocks.py`) in the forward pass and in both
backward passes, and one compilation serves every batch.

Forward (online softmax; Milakov & Gimelshein 2018, arXiv:1805.02867) and backward from the log-sum-exp
(FlashAttention-2, Dao 2023, arXiv:2307.08691), of queries q, keys k, values v, and the gradient do of the output o:

    s = q·k/√H,  p = exp(s − lse),  o = Σ p·v,  δ = Σ o·do
    ds = p·(do·v − δ),  dq = Σ ds·k/√H,  dk = Σ ds·q/√H,  dv = Σ p·do

The gradients of queries and of keys are kernels of their own: in one, gradients of queries would have to be kept for
each block of keys. Arrays are `[heads, rows · T, H]` within this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.kernels.blocks import Blocks
from jaxrl_llm.models.kernels.blockwise import Blockwise
from jaxrl_llm.models.kernels.derivatives import Inputs, Output, attend
from jaxrl_llm.models.kernels.live_blocks import Walk, live_blocks, walk

_MASKED = -1e30  # finite, so that no row gives NaN
_LANES = 128  # a vector register holds 8 × 128 numbers
_BLOCKS = (512, 256, 128)
_PAIRS = 100_000  # two integers each, of 1 MiB of scalar memory

_KINDS = ("query", "key", "value", "query places", "key places", "query", "number", "number")
_PLAIN = (((1,), (0,)), ((), ()))  # a·b
_TRANSPOSED = (((1,), (1,)), ((), ()))  # a·bᵀ


class _Splash(NamedTuple):
    """The method, for rows of whole blocks: everything static."""

    window: int | None
    softcap: float | None
    block: tuple[int, int]
    """Tokens in a block of queries and in one of keys."""
    interpret: bool

    def forward(self, inputs: Inputs, visible: Visibility) -> Output:
        """Attention; the normalizer is `[N, blocks, 1, block]`, blocks being those of all rows."""
        query, key, value = map(_by_head, inputs[:3])
        out, lse = _forward(self, query, key, value, visible)
        if inputs.sinks is not None:
            whole = jnp.logaddexp(lse, _beside(inputs.sinks))
            share = jnp.exp(lse - whole).reshape(*out.shape[:2], 1)
            out, lse = (out * share).astype(out.dtype), whole
        return Output(_by_row(out, len(inputs.query)), lse)

    def pull(self, inputs: Inputs, visible: Visibility, output: Output, cotangent: jax.Array) -> Inputs:
        """Jᵀ g."""
        delta = jnp.sum(output.mixed.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)  # [B, Tq, N]
        delta = jnp.moveaxis(delta, 2, 0).reshape(output.normalizer.shape)
        query, key, value, d_out = map(_by_head, (*inputs[:3], cotangent))
        gradients = _backward(self, query, key, value, d_out, visible, output.normalizer, delta)
        to_sinks = None
        if inputs.sinks is not None:
            to_sinks = -jnp.sum(jnp.exp(_beside(inputs.sinks) - output.normalizer) * delta, axis=(1, 2, 3))
        return Inputs(*(_by_row(x, len(inputs.query)) for x in gradients))._replace(sinks=to_sinks)

    def plain(self) -> Blockwise:
        """Second derivatives are those of plain JAX."""
        return Blockwise(Blocks(self.window, *self.block), self.softcap)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visibility,
    *,
    sinks: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`dense_attention` on a TPU, in memory that is linear in the tokens; same arguments and result.

    Gradients may be differentiated once more, backwards, which takes the time of `blockwise_attention`. The backward
    pass is given the inputs, the output and the log-sum-exp of the scores; the latter two bear the name `ATTENTION` for
    policies of `jax.checkpoint`. Products of float32 are exact to float32, those of bfloat16 are summed in float32.

    Args:
        query: `[B, Tq, N, H]`, rotated.
        key: `[B, Tk, K, H]`, rotated; query head n reads key head n // (N/K).
        value: `[B, Tk, K, H]`.
        visible: which keys each query sees; it sees itself at least.
        sinks: as of `dense_attention`. The kernels know nothing of them: their weight is taken off the output by way of
            the log-sum-exp, and gradients need no more than the two of them.
        window: how many levels of the tree a query sees, its own included; `None`: all.
        softcap: c in c·tanh(·/c) on the scores, or `None`.
        interpret: run as plain JAX, on any device, slowly.

    Returns:
        `[B, Tq, N, H]` in the type of the queries.

    Raises:
        ValueError: the rows are so many or so long that the list of blocks does not fit the scalar memory.
    """
    lengths = query.shape[1], key.shape[1]
    block = (_block(lengths[0]), _block(lengths[1]))
    pairs = query.shape[0] * pl.cdiv(lengths[0], block[0]) * pl.cdiv(lengths[1], block[1])
    if pairs > _PAIRS:
        raise ValueError(
            f"{query.shape[0]} rows of {lengths[0]} queries and {lengths[1]} keys on one device: {pairs} pairs of "
            f"blocks of {block[0]} × {block[1]}, of which the kernel can hold {_PAIRS}; use shorter or fewer rows on a "
            "device (more micro-batches, a larger mesh.context) or model.attention='blockwise'"
        )
    visible = Visibility(
        place=_pad(visible.place, block[0], "edge"),
        depth=_pad(visible.depth, block[0], "edge"),
        key_place=_pad(visible.key_place, block[1], "edge"),
        key_depth=_pad(visible.key_depth, block[1], "edge"),
        end=_pad(visible.end, block[1]),  # 0: nobody sees these keys
    )
    inputs = Inputs(_pad(query, block[0]), _pad(key, block[1]), _pad(value, block[1]), sinks)
    output: Output = attend(_Splash(window, softcap, block, interpret), inputs, visible)
    return output.mixed[:, : lengths[0]]


def _block(length: int) -> int:
    """Tokens in a block: the most that add no more than an eighth of padding."""
    return next((size for size in _BLOCKS if pl.cdiv(length, size) * size * 8 <= length * 9), _BLOCKS[-1])


def _pad(x: jax.Array, block: int, mode: str = "constant") -> jax.Array:
    missing = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)], mode=mode) if missing else x


def _beside(sinks: jax.Array) -> jax.Array:
    """`[N]`, beside normalizers."""
    return sinks[:, None, None, None]


def _by_head(x: jax.Array) -> jax.Array:
    """`[B, T, N, H]` → `[N, B · T, H]`."""
    return jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, x.shape[3])


def _by_row(x: jax.Array, rows: int) -> jax.Array:
    """`[N, B · T, H]` → `[B, T, N, H]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], rows, -1, x.shape[2]), 0, 2)


# ---- Grids: heads × pairs of blocks that meet --------------------------------------------------------------


def _forward(splash: _Splash, query: Any, key: Any, value: Any, visible: Visibility) -> tuple[jax.Array, jax.Array]:
    """Output `[N, B · Tq, H]` and log-sum-exp `[N, blocks, 1, block]`."""
    (heads, tokens, size), block, group = query.shape, splash.block, query.shape[0] // key.shape[0]
    return _call(
        _forward_kernel,
        splash,
        (heads,),
        walk(live_blocks(visible, block, splash.window)),
        (lambda n, s, q, k: (n, q[s]), lambda n, s, q, k: (n // group, k[s])),
        (query, key, value, *_places(visible, block)),
        {
            "query": jax.ShapeDtypeStruct(query.shape, query.dtype),
            "number": jax.ShapeDtypeStruct((heads, tokens // block[0], 1, block[0]), jnp.float32),
        },
        [(block[0], _LANES), (block[0], _LANES), (block[0], size)],
    )


def _backward(
    splash: _Splash, query: Any, key: Any, value: Any, d_out: Any, visible: Visibility, lse: Any, delta: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values, laid out as they are."""
    (heads, _, size), block, group = query.shape, splash.block, query.shape[0] // key.shape[0]
    live = live_blocks(visible, block, splash.window)
    arrays = (query, key, value, *_places(visible, block), d_out, lse, delta)
    (d_query,) = _call(
        _query_gradient_kernel,
        splash,
        (heads,),
        walk(live),
        (lambda n, s, q, k: (n, q[s]), lambda n, s, q, k: (n // group, k[s])),
        arrays,
        {"query": jax.ShapeDtypeStruct(query.shape, query.dtype)},
        [(block[0], size)],
    )
    d_key, d_value = _call(
        _key_gradient_kernel,
        splash,
        (heads // group, group),
        walk(live.swapaxes(1, 2)),
        (lambda n, s, g, k, q: (n * group + g, q[s]), lambda n, s, g, k, q: (n, k[s])),
        arrays,
        {"key": jax.ShapeDtypeStruct(key.shape, key.dtype), "value": jax.ShapeDtypeStruct(value.shape, value.dtype)},
        [(block[1], size)] * 2,
    )
    return d_query, d_key, d_value


def _places(visible: Visibility, block: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Place and depth of each block of queries; place, depth and end of each block of keys."""
    queries = jnp.stack([x.reshape(-1, block[0]) for x in (visible.place, visible.depth)], axis=1)
    keys = jnp.stack([x.reshape(-1, block[1]) for x in (visible.key_place, visible.key_depth, visible.end)], axis=1)
    return queries, keys


def _call(
    kernel: Callable[..., None],
    splash: _Splash,
    heads: tuple[int, ...],
    pairs: Walk,
    at: tuple[Callable[..., Any], Callable[..., Any]],
    arrays: tuple[jax.Array, ...],
    outputs: dict[str, Any],
    scratch: list[tuple[int, int]],
) -> Any:
    """Runs `kernel` over heads × pairs, or kv heads × pairs × the query heads of each.

    Args:
        kernel: is given the splash and references to `pairs`, a block of each array, of each output, the scratch.
        splash: what a compilation depends on.
        heads: the grid without the pairs.
        pairs: the walk over blocks.
        at: head and block of the queries and of the keys, from the grid's indices and the walk.
        arrays: those of `_KINDS`, the last three in the backward pass alone.
        outputs: shapes, by kind.
        scratch: shapes of what is kept from one step to the next, float32.
    """
    (rows, columns), size, (query, key) = splash.block, arrays[0].shape[2], at
    specs = {
        "query": pl.BlockSpec((None, rows, size), lambda *i: (*query(*i), 0)),
        "key": pl.BlockSpec((None, columns, size), lambda *i: (*key(*i), 0)),
        "query places": pl.BlockSpec((None, 2, rows), lambda *i: (query(*i)[1], 0, 0)),
        "key places": pl.BlockSpec((None, 3, columns), lambda *i: (key(*i)[1], 0, 0)),
        "number": pl.BlockSpec((None, None, 1, rows), lambda *i: (*query(*i), 0, 0)),
    }
    specs["value"] = specs["key"]
    grid = (heads[0], pairs.count, *heads[1:])
    order: list[Literal["parallel", "arbitrary"]] = ["parallel", "arbitrary", "arbitrary"]
    return pl.pallas_call(
        functools.partial(kernel, splash),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[specs[kind] for kind in _KINDS[: len(arrays)]],
            out_specs=[specs[kind] for kind in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=list(outputs.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=order[: len(grid)]),
        interpret=splash.interpret,
        name=f"splash{kernel.__name__.removesuffix('_kernel')}",
    )(pairs.outer, pairs.inner, *arrays)


# ---- One step: a block of queries and a block of keys --------------------------------------------------------


def _forward_kernel(splash: _Splash, outer, _, query, key, value, queries, keys, out, lse, peak, total, mixed) -> None:
    step = pl.program_id(1)

    @pl.when(_is_first(outer, step))
    def _():
        peak[...] = jnp.full_like(peak, _MASKED)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    scores = _scores(query[...], key[...], splash.softcap)
    scores = jnp.where(_seen(queries, keys, splash.window), scores, _MASKED)
    before = peak[...]
    now = jnp.maximum(before, jnp.max(scores, axis=1)[:, None])  # the same in all lanes
    weights = jnp.exp(scores - _widen(now, scores.shape[1]))
    fade = jnp.exp(before - now)
    peak[...] = now
    total[...] = fade * total[...] + jnp.sum(weights, axis=1)[:, None]
    mixed[...] = _widen(fade, mixed.shape[1]) * mixed[...] + _product(weights.astype(value.dtype), value[...])

    @pl.when(_is_last(outer, step))
    def _():
        out[...] = (mixed[...] / _widen(total[...], mixed.shape[1])).astype(out.dtype)
        lse[...] = (peak[...] + jnp.log(total[...])).T[:1]


def _query_gradient_kernel(
    splash: _Splash, outer, _, query, key, value, queries, keys, d_out, lse, delta, d_query, total
) -> None:
    step = pl.program_id(1)

    @pl.when(_is_first(outer, step))
    def _():
        total[...] = jnp.zeros_like(total)

    scores = _scores(query[...], key[...], splash.softcap)
    seen = _seen(queries, keys, splash.window)
    weights = jnp.exp(jnp.where(seen, scores, _MASKED) - lse[0][:, None])
    slope = weights * (_product(d_out[...], value[...], _TRANSPOSED) - delta[0][:, None])
    slope = _through_cap(slope, scores, splash.softcap)
    total[...] += _product(slope.astype(key.dtype), key[...])

    @pl.when(_is_last(outer, step))
    def _():
        d_query[...] = (total[...] * query.shape[-1] ** -0.5).astype(d_query.dtype)


def _key_gradient_kernel(
    splash: _Splash, outer, _, query, key, value, queries, keys, d_out, lse, delta, d_key, d_value, sum_key, sum_value
) -> None:
    """Of a kv head, over all query heads that read it; scores are keys × queries."""
    step, member, members = pl.program_id(1), pl.program_id(2), pl.num_programs(2)

    @pl.when(_is_first(outer, step) & (member == 0))
    def _():
        sum_key[...] = jnp.zeros_like(sum_key)
        sum_value[...] = jnp.zeros_like(sum_value)

    scores = _scores(key[...], query[...], splash.softcap)
    seen = _seen(queries, keys, splash.window, keys_first=True)
    weights = jnp.exp(jnp.where(seen, scores, _MASKED) - lse[...])
    sum_value[...] += _product(weights.astype(d_out.dtype), d_out[...])
    slope = weights * (_product(value[...], d_out[...], _TRANSPOSED) - delta[...])
    slope = _through_cap(slope, scores, splash.softcap)
    sum_key[...] += _product(slope.astype(query.dtype), query[...])

    @pl.when(_is_last(outer, step) & (member == members - 1))
    def _():
        d_key[...] = (sum_key[...] * query.shape[-1] ** -0.5).astype(d_key.dtype)
        d_value[...] = sum_value[...].astype(d_value.dtype)


def _scores(left: jax.Array, right: jax.Array, softcap: float | None) -> jax.Array:
    """left·rightᵀ/√H, capped, in float32."""
    scores = _product(left, right, _TRANSPOSED) * left.shape[-1] ** -0.5
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _through_cap(slope: jax.Array, capped: jax.Array, softcap: float | None) -> jax.Array:
    """Gradient of the scores before the cap, from that after it."""
    return slope if softcap is None else slope * (1 - jnp.square(capped / softcap))


def _product(left: jax.Array, right: jax.Array, dimensions: Any = _PLAIN) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _seen(queries: Any, keys: Any, window: int | None, *, keys_first: bool = False) -> jax.Array:
    """`Visibility.mask` of two blocks, queries × keys or keys × queries."""

    def lay(places: Any, line: int, down: bool) -> jax.Array:
        return places[line][:, None] if down else places[line : line + 1]

    place, depth = (lay(queries, line, not keys_first) for line in range(2))
    key_place, key_depth, end = (lay(keys, line, keys_first) for line in range(3))
    seen = (key_place <= place) & (place < end)
    return seen if window is None else seen & (depth - key_depth < window)


def _is_first(outer: Any, step: jax.Array) -> jax.Array:
    return (step == 0) | (outer[jnp.maximum(step - 1, 0)] != outer[step])


def _is_last(outer: Any, step: jax.Array) -> jax.Array:
    return outer[step + 1] != outer[step]


def _widen(x: jax.Array, width: int) -> jax.Array:
    """`[rows, lanes]`, the same in all lanes, → `[rows, width]`."""
    return jnp.tile(x, (1, pl.cdiv(width, _LANES)))[:, :width]
