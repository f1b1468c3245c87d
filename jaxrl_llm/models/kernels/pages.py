"""Attention over listed pages of caches on TPUs, in Pallas: a page is read once, and one that no row sees is not.

Not `jax.experimental.pallas.ops.tpu.paged_attention` or `ragged_paged_attention`: these take pages of one layer (the
former heads first, the latter keys and values in turns, both with the entries of keys in lanes), so that ours would be
cut out and laid out anew at every token, and know no page that several sequences read.

The grid walks a traced list of pages, those of a unit of rows one behind the other and some at a time. The caches stay
in the chip's memory, stacked as they are; a step starts the copies of the next step's pages and waits for its own, so
that nothing but these pages is moved. Rows of a unit share all of its pages, and a mask tells which of them sees what.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl_llm.models.kept import Kept

_MASKED = -1e30
_LEAST = -1e29  # a row that sees nothing gives no NaN, and masked scores no weights
LANES = 128
"""Numbers side by side in a register: a page has a multiple of so many tokens."""
NO_PAGE = 2**30
"""A position that no row sees."""


class Pages(NamedTuple):
    """Pages of two caches, `at_a_time` a step, those of one unit one behind the other.

    A page of the first cache at `[i, j]` is written i·2¹⁶ + j, one of the second as the complement (−1 − x) of that.
    """

    unit: jax.Array
    """`[steps + 1]` int32, ascending: whose pages a step reads; from `count` on, one past the last unit."""
    place: jax.Array
    """`[steps · at_a_time]` int32: where they lie."""
    begin: jax.Array
    """`[steps · at_a_time]` int32: position of a page's first token; `NO_PAGE`: there is none."""
    count: jax.Array
    """Scalar int32: steps in the list."""

    @property
    def at_a_time(self) -> int:
        """Pages that a step reads."""
        return len(self.place) // (len(self.unit) - 1)

    @classmethod
    def listed(cls, live: jax.Array, place: jax.Array, begin: jax.Array, at_a_time: int) -> Pages:
        """Those that are live, of each unit in their order; a unit without any has a step all the same.

        Args:
            live: `[units, X]` bool.
            place: `[units, X]`, as in `Pages`.
            begin: `[units, X]`, as in `Pages`.
            at_a_time: pages of a step.
        """
        units, most = live.shape
        order = jnp.argsort(~live, axis=1)  # stable: those that are live come first
        numbers = jnp.sum(live, axis=1)
        ends = jnp.cumsum(jnp.maximum(1, -(-numbers // at_a_time)))
        steps = jnp.arange(units * -(-most // at_a_time) + 1)
        unit = jnp.searchsorted(ends, steps, side="right").astype(jnp.int32)
        row = jnp.minimum(unit[:-1], units - 1)
        turn = steps[:-1] - jnp.where(row > 0, ends[row - 1], 0)
        rank = turn[:, None] * at_a_time + jnp.arange(at_a_time)
        column = order[row[:, None], jnp.minimum(rank, most - 1)]
        there = (rank < numbers[row][:, None]) & (unit[:-1, None] < units)
        row = row[:, None]
        return cls(
            unit,
            jnp.where(there, place[row, column], 0).astype(jnp.int32).reshape(-1),
            jnp.where(there, begin[row, column], NO_PAGE).astype(jnp.int32).reshape(-1),
            ends[-1].astype(jnp.int32),
        )


class Rows(NamedTuple):
    """Which tokens each row sees, `[units, m]` int32 each: none where an end is 0."""

    first: jax.Array
    """i of the pages of the first cache that it sees."""
    first_from: jax.Array
    first_to: jax.Array
    """Positions that it sees of these: from ≤ position < to."""
    second: jax.Array
    """j of the pages of the second cache that it sees."""
    second_from: jax.Array
    second_to: jax.Array
    """Positions that it sees of these."""


def attend_to_pages(
    query: jax.Array,
    rows: Rows,
    first: Kept,
    second: Kept,
    layer: jax.Array | int,
    pages: Pages,
    *,
    sinks: jax.Array | None = None,
    softcap: float | None = None,
    interpret: Any = False,
) -> jax.Array:
    """softmax(q·k)·v of each row over what it sees of its unit's pages.

    By an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) in float32; products of float32 are exact to
    float32, those of bfloat16 are summed in float32. What is kept in less than the type of the queries is read as that:
    scores are multiplied by the keys' scales, and weights by the values'.

    Args:
        query: `[units, K, m, H]`, rotated and scaled; m rows read each kv head.
        rows: what each sees.
        first: `[l, I, J]` before the axes of `Kept`, over B tokens each.
        second: `[l, I', J']` before them.
        layer: which of the l it is.
        pages: of each unit.
        sinks: `[K, m]` float32 of the rows of each unit, or `None`: scores beside those of tokens, of value 0.
        softcap: c in c·tanh(·/c) on the scores, or `None`.
        interpret: run as plain JAX, on any device, slowly.

    Returns:
        `[units, K, m, H]` in the type of the queries; 0 where nothing is seen.

    Raises:
        ValueError: on a TPU, a page is no multiple of 128 tokens.
    """
    count, head_dim, page = *query.shape[2:], first.key.shape[-1]
    if page % LANES and not interpret:
        raise ValueError(f"pages of {page} tokens: the kernel reads pages of multiples of {LANES}")
    filled = -count % (32 // query.dtype.itemsize)  # whole registers
    query = jnp.pad(query, [(0, 0), (0, 0), (0, filled), (0, 0)])
    seen = jnp.pad(jnp.stack(rows, axis=-1), [(0, 0), (0, filled), (0, 0)])
    turned = head_dim % LANES != 0 and page % LANES == 0  # entries in lanes would fill half of them
    if turned:
        first, second = (x._replace(value=jnp.swapaxes(x.value, -1, -2)) for x in (first, second))

    def of_unit(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda step, layer, unit, *_: (unit[step], *(0 for _ in shape)))

    if sinks is not None:
        sinks = jnp.broadcast_to(jnp.pad(sinks, [(0, 0), (0, filled)])[..., None], (*query.shape[1:3], LANES))
    block, dtype, parts = query.shape[1:], query.dtype, jax.tree.leaves(first)
    caches = [*parts, *jax.tree.leaves(second)]
    if not interpret:  # small ones XLA would bring elsewhere, whole
        caches = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in caches]
    stored = [pl.BlockSpec(memory_space=pltpu.HBM)] * len(caches)
    beside = [] if sinks is None else [pl.BlockSpec(sinks.shape, lambda *_: (0, 0, 0))]
    mixed = pl.pallas_call(
        functools.partial(_kernel, with_sinks=sinks is not None, softcap=softcap, turned=turned),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pages.count,),
            in_specs=[of_unit(*block), of_unit(*seen.shape[1:]), *beside, *stored],
            out_specs=of_unit(*block),
            scratch_shapes=[
                *(pltpu.VMEM((2, pages.at_a_time, *part.shape[3:]), part.dtype) for part in parts),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((*block[:2], LANES), jnp.float32),
                pltpu.VMEM((*block[:2], LANES), jnp.float32),
                pltpu.VMEM(block, jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=["arbitrary"], disable_bounds_checks=True),
        interpret=interpret,
        name="attend_to_pages",
    )(jnp.full(1, layer, jnp.int32), *pages[:3], query, seen, *([] if sinks is None else [sinks]), *caches)
    return mixed[:, :, :count]


def _kernel(
    layer: Any,
    unit: Any,
    place: Any,
    begin: Any,
    query: Any,
    rows: Any,
    *refs: Any,
    with_sinks: bool,
    softcap: float | None,
    turned: bool,
) -> None:
    """One step: some pages of one unit."""
    sinks, refs = (refs[0], refs[1:]) if with_sinks else (None, refs)
    *stored, arrived, peak, total, mixed = refs
    count = (len(stored) - 1) // 3  # arrays of a cache: two caches, the output, the pages of a step
    caches, out, here = (stored[:count], stored[count : 2 * count]), stored[2 * count], stored[2 * count + 1 :]
    keys, values, *scales = here
    step, page = pl.program_id(0), keys.shape[-1]
    at_a_time, buffer = keys.shape[1], jax.lax.rem(step, 2)

    def scaled(x: Any, which: int, number: int) -> Any:
        return x * scales[which][buffer, number][:, None] if scales else x

    @pl.when(step == 0)
    def _():
        for part in here[1:]:  # what no page was copied to may be no number, and is given no weight
            part[...] = jnp.zeros_like(part)
        _copy_pages(layer, place, begin, caches, here, arrived, step)

    @pl.when(step + 1 < pl.num_programs(0))
    def _():
        _copy_pages(layer, place, begin, caches, here, arrived, step + 1)

    @pl.when((step == 0) | (unit[jnp.maximum(step - 1, 0)] != unit[step]))
    def _():
        peak[...] = jnp.full_like(peak, _LEAST) if sinks is None else sinks[...]
        total[...] = jnp.full_like(total, 0.0 if sinks is None else 1.0)
        mixed[...] = jnp.zeros_like(mixed)

    _await_pages(begin, caches, here, arrived, step)
    within = jax.lax.broadcasted_iota(jnp.int32, (1, page), 1)
    scores = []
    for number in range(at_a_time):
        at, position = (x[step * at_a_time + number] for x in (place, begin))
        score = scaled(_product(query[...], keys[buffer, number]), 0, number)
        score = score if softcap is None else softcap * jnp.tanh(score / softcap)
        scores.append(jnp.where(_seen(rows, at, position + within)[None], score, _MASKED))
    before = peak[:, :, :1]
    now = jnp.maximum(before, jnp.max(functools.reduce(jnp.maximum, scores), axis=-1, keepdims=True))
    fade = jnp.exp(before - now)
    weights = [jnp.exp(score - now) for score in scores]  # 0 where masked: `now` is far more
    add = fade * total[:, :, :1] + jnp.sum(functools.reduce(jnp.add, weights), axis=-1, keepdims=True)
    mix = fade * mixed[...]
    for number, weight in enumerate(weights):
        weight = scaled(weight, 1, number).astype(query.dtype)
        mix += _product(weight, values[buffer, number], turned=turned)
    peak[...] = jnp.broadcast_to(now, peak.shape)
    total[...] = jnp.broadcast_to(add, total.shape)
    mixed[...] = mix

    @pl.when(unit[step + 1] != unit[step])
    def _():
        out[...] = (mix / jnp.maximum(add, 1e-30)).astype(out.dtype)


def _copy_pages(layer: Any, place: Any, begin: Any, caches: Any, here: Any, arrived: Any, step: jax.Array) -> None:
    """Starts the copies of a step's pages into one of two buffers; where there is no page, nothing is moved."""
    at_a_time, buffer = here[0].shape[1], jax.lax.rem(step, 2)
    for number in range(at_a_time):
        at, there = place[step * at_a_time + number], begin[step * at_a_time + number] != NO_PAGE
        for cache, asked, x in ((caches[0], at >= 0, at), (caches[1], at < 0, -1 - at)):
            where = layer[0], jax.lax.shift_right_logical(x, 16), jax.lax.bitwise_and(x, 0xFFFF)

            @pl.when(there & asked)
            def _(cache: Any = cache, where: Any = where, number: int = number):
                for source, target in zip(cache, here, strict=True):
                    pltpu.make_async_copy(source.at[where], target.at[buffer, number], arrived.at[buffer]).start()


def _await_pages(begin: Any, caches: Any, here: Any, arrived: Any, step: jax.Array) -> None:
    """Waits for a step's pages; all are of one size, so that whose copy is named does not matter."""
    at_a_time, buffer = here[0].shape[1], jax.lax.rem(step, 2)
    for number in range(at_a_time):

        @pl.when(begin[step * at_a_time + number] != NO_PAGE)
        def _(number: int = number):
            for source, target in zip(caches[0], here, strict=True):
                pltpu.make_async_copy(source.at[0, 0, 0], target.at[buffer, number], arrived.at[buffer]).wait()


def _seen(rows: Any, at: jax.Array, position: jax.Array) -> jax.Array:
    """`[m, B]`: which positions of the page at `at` each row sees."""
    column = [rows[:, number : number + 1] for number in range(6)]
    is_first = at >= 0
    index = jnp.where(is_first, jax.lax.shift_right_logical(at, 16), jax.lax.bitwise_and(-1 - at, 0xFFFF))
    owner, begin, end = (jnp.where(is_first, *pair) for pair in zip(column[:3], column[3:], strict=True))
    return (owner == index) & (begin <= position) & (position < end)


def _product(left: jax.Array, right: jax.Array, *, turned: bool = False) -> jax.Array:
    """`[K, m, X] × [K, X, Y] → [K, m, Y]`, of the right `[K, Y, X]` if it is turned, in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    right = right.astype(left.dtype)
    dimensions = (((2,), (2 if turned else 1,)), ((0,), (0,)))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
