"""Products of rows with the matrix of the group that each belongs to, and the gradients of such products.

Rows of a group are neighbours: those of group 0 first, then those of group 1, … Rows behind the last group belong to
none: they cost nothing, and what is made of them is 0.

On TPUs these are the kernels of megablox. `jax.lax.ragged_dot` has a gradient there that is expanded over all groups,
and elsewhere so is the product itself: with 128 groups a CPU computes 130 times what is asked for. So elsewhere it is a
loop over blocks of rows, of which each belongs to one group; there are as many as the sizes of the groups make.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.sharding import platform

_TILE = 128
"""Rows of a block on an accelerator."""


_FLOATS = 2**25
"""Bytes of the matrices of several groups that are made at a time, on a TPU; or those of one."""


def grouped_product(
    x: jax.Array,
    weight: Any,
    sizes: jax.Array,
    *,
    transposed: bool = False,
    floats: Callable[[Any], jax.Array] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x·Wᵀ, of each row with the matrix of its group.

    Args:
        x: `[R, in]`.
        weight: `[E, out, in]`, of the type of x; `transposed`: `[E, in, out]`.
        sizes: `[E]` int32: rows of each group, R in all at most.
        transposed: as said.
        floats: makes such matrices, of some of the groups, of what `weight` then is: a tree of arrays `[E, …]`. Never
            are those of all groups in memory.
        interpret: run the TPU's kernel, interpreted, wherever this is.

    Returns:
        `[R, out]`.
    """
    if interpret or platform() == "tpu":
        made = _by_megablox if floats is None else functools.partial(_by_megablox_in_turns, floats=floats)
        return made(x, weight, sizes, transposed=transposed, interpret=interpret)
    block, (rows, _) = _block(len(x), len(sizes)), x.shape
    place, group, count = _blocks(sizes, rows, block)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def one(number: jax.Array, out: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(padded, place[number], block)
        matrix = _of_group(weight, group[number]) if floats is None else floats(_of_group(weight, group[number]))
        made = jnp.einsum("ri,io->ro" if transposed else "ri,oi->ro", part, matrix)
        # What the block has of the next group is overwritten: that group's first block begins where this group ends.
        return jax.lax.dynamic_update_slice_in_dim(out, made, place[number], axis=0)

    shape = weight if floats is None else jax.eval_shape(floats, weight)
    width = shape.shape[2 if transposed else 1]
    out = jax.lax.fori_loop(0, count, one, jnp.zeros((rows + block, width), x.dtype))[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(sizes), out, 0)


def grouped_outer(y: jax.Array, x: jax.Array, sizes: jax.Array, *, dtype: Any, interpret: bool = False) -> jax.Array:
    """Σ over the rows of each group of y·xᵀ: the gradient of the groups' matrices.

    Args:
        y: `[R, out]`.
        x: `[R, in]`.
        sizes: as of `grouped_product`.
        dtype: type of the sums.
        interpret: as of `grouped_product`.

    Returns:
        `[E, out, in]`.
    """
    if interpret or platform() == "tpu":
        return _outer_by_megablox(y, x, sizes, dtype=dtype, interpret=interpret)
    block = _block(len(x), len(sizes))
    place, group, count = _blocks(sizes, len(x), block)
    end = jnp.cumsum(sizes)
    y, x = (jnp.pad(rows, ((0, block), (0, 0))) for rows in (y, x))

    def one(number: jax.Array, out: jax.Array) -> jax.Array:
        at, of = place[number], group[number]
        left, right = (jax.lax.dynamic_slice_in_dim(rows, at, block) for rows in (y, x))
        left = jnp.where((at + jnp.arange(block) < end[of])[:, None], left, 0)
        made = jnp.einsum("ro,ri->oi", left, right, preferred_element_type=dtype)
        return out.at[of].add(made)

    return jax.lax.fori_loop(0, count, one, jnp.zeros((len(sizes), y.shape[1], x.shape[1]), dtype))


def _of_group(weight: Any, group: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, group, keepdims=False), weight)


def _block(rows: int, groups: int) -> int:
    """Rows of a block: about those of a group, a power of two."""
    mean = max(1, rows // groups)
    return min(_TILE, max(8, 1 << (mean - 1).bit_length()))


def _blocks(sizes: jax.Array, rows: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first row and the group of each block, and how many blocks there are."""
    of_group = -(-sizes // block)
    before = jnp.cumsum(of_group)
    number = jnp.arange(rows // block + len(sizes), dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(before, number, side="right"), len(sizes) - 1)
    first = jnp.cumsum(sizes) - sizes
    place = first[group] + (number - (before - of_group)[group]) * block
    return place.astype(jnp.int32), group.astype(jnp.int32), before[-1].astype(jnp.int32)


def _by_megablox(x: jax.Array, weight: jax.Array, sizes: jax.Array, *, transposed: bool, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # slow to import, and for TPUs alone

    rows = jnp.pad(x, ((0, -len(x) % _TILE), (0, 0)))
    tiling = _tiling(x.shape[1], weight.shape[2 if transposed else 1])
    out = gmm(rows, weight, sizes, x.dtype, tiling, transpose_rhs=not transposed, interpret=interpret)[: len(x)]
    # The kernel leaves the rows behind the last group as they lay in memory.
    return jnp.where(jnp.arange(len(x))[:, None] < jnp.sum(sizes), out, 0)


def _by_megablox_in_turns(
    x: jax.Array,
    weight: Any,
    sizes: jax.Array,
    *,
    transposed: bool,
    interpret: bool,
    floats: Callable[[Any], jax.Array],
) -> jax.Array:
    """One kernel after another, each for a few groups that are next to each other and have rows."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    shape, groups = jax.eval_shape(floats, weight), len(sizes)
    width, matrix = shape.shape[2 if transposed else 1], shape.shape[1] * shape.shape[2] * x.dtype.itemsize
    some = max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * matrix <= _FLOATS))
    rows, tiling = jnp.pad(x, ((0, -len(x) % _TILE), (0, 0))), _tiling(x.shape[1], width)
    has_rows = jnp.any(sizes.reshape(-1, some) > 0, axis=1)
    turns = jnp.argsort(~has_rows, stable=True).astype(jnp.int32) * some

    def one(turn: jax.Array, out: jax.Array) -> jax.Array:
        first = turns[turn]
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, some), weight)
        return gmm(
            *(rows, floats(part), sizes, x.dtype, tiling, first, out), transpose_rhs=not transposed, interpret=interpret
        )

    return jax.lax.fori_loop(0, jnp.sum(has_rows), one, jnp.zeros((len(rows), width), x.dtype))[: len(x)]


def _outer_by_megablox(y: jax.Array, x: jax.Array, sizes: jax.Array, *, dtype: Any, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    y, x = (jnp.pad(rows, ((0, -len(rows) % _TILE), (0, 0))) for rows in (y, x))
    return tgmm(y.T, x, sizes, dtype, _tiling(y.shape[1], x.shape[1]), interpret=interpret)


def _tiling(inner: int, outer: int) -> tuple[int, int, int]:
    """Rows and two sides of a weight that are computed at a time."""
    return _TILE, min(4 * _TILE, inner), min(4 * _TILE, outer)
