"""Products of rows with the weights of their experts, floats or integers, which are gathered before they are read.

On a device, in the `shard_map` of `experts.py`: what is cut for storage alone is put together there, by hand.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from jaxrl_llm.models.config import DType, Params
from jaxrl_llm.models.integers import Blocks, blocks_in
from jaxrl_llm.models.kernels.grouped import grouped_outer, grouped_product
from jaxrl_llm.models.operands import operand

_STORAGE = ("fsdp", "context")
"""Mesh axes over which weights of experts are cut for storage alone."""

Gathers = tuple[tuple[int, tuple[str, ...]], ...]
"""Axes of a weight and the mesh axes over which each is cut for storage alone."""


def gathers_of(cut: PartitionSpec, mesh: AbstractMesh) -> Gathers:
    """What has to be put together of a leaf that is cut so."""

    def stored(axes: Any) -> tuple[str, ...]:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in names if name in _STORAGE and mesh.shape[name] > 1)

    return tuple((place, over) for place, axes in enumerate(cut) if (over := stored(axes)))


def expert_product(
    dtype: DType,
    sums: DType,
    leaves: Params,
    gathers: dict[str, Gathers],
    rows: jax.Array,
    sizes: jax.Array,
) -> jax.Array:
    """x·Wᵀ of each row `[R, in]` with the weight of its group, in the type of x.

    Args:
        dtype: of whose numbers the factors are.
        sums: type in which a weight's gradient is summed over devices; integers have none.
        leaves: of a linear layer of each expert: `weight` `[E, out, in]` or its part on this device, or blocks.
        gathers: of each leaf.
        rows: x, those of a group next to each other.
        sizes: `[E]`: rows of each group.
    """
    blocks = blocks_in(leaves)
    if blocks is None:
        return _product(dtype, sums, gathers["weight"], rows, leaves["weight"], sizes)
    return _blocks_product(dtype, (gathers["weight"], gathers["weight_scale"]), rows, blocks, sizes)


def _put_together(leaf: jax.Array, gathers: Gathers) -> jax.Array:
    for place, axes in gathers:
        leaf = jax.lax.all_gather(leaf, axes, axis=place, tiled=True)
    return leaf


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    dtype: DType, sums: DType, gathers: Gathers, x: jax.Array, weight: jax.Array, sizes: jax.Array
) -> jax.Array:
    """With floats; factors and gradients are those of `Linear`.

    The weight is gathered in the narrow type, and its gradient is summed over devices in the type `sums`.
    """
    return _product_forward(dtype, sums, gathers, x, weight, sizes)[0]


def _whole(dtype: DType, gathers: Gathers, weight: jax.Array, x: jax.Array) -> jax.Array:
    return _put_together(operand(dtype, weight.astype(x.dtype)), gathers)


_Saved = tuple[jax.Array, jax.Array, jax.Array]


def _product_forward(
    dtype: DType, sums: DType, gathers: Gathers, x: jax.Array, weight: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, _Saved]:
    x = operand(dtype, x)
    return grouped_product(x, _whole(dtype, gathers, weight, x), sizes), (x, weight, sizes)


def _product_backward(
    dtype: DType, sums: DType, gathers: Gathers, saved: _Saved, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, weight, sizes = saved
    gradient = operand(dtype, gradient)
    to_x = grouped_product(gradient, _whole(dtype, gathers, weight, x), sizes, transposed=True)
    to_weight = grouped_outer(gradient, x, sizes, dtype=sums)
    for place, axes in gathers:
        to_weight = jax.lax.psum_scatter(to_weight, axes, scatter_dimension=place, tiled=True)
    return to_x, to_weight.astype(weight.dtype), None


_product.defvjp(_product_forward, _product_backward)

_OfLeaves = tuple[Gathers, Gathers]
"""Of integers, and of their scales and offsets."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocks_product(dtype: DType, gathers: _OfLeaves, x: jax.Array, blocks: Blocks, sizes: jax.Array) -> jax.Array:
    """With integers, which are gathered as such, and of which a few experts at a time are floats."""
    return _blocks_forward(dtype, gathers, x, blocks, sizes)[0]


def _read(
    dtype: DType, gathers: _OfLeaves, blocks: Blocks, x: jax.Array, sizes: jax.Array, *, transposed: bool
) -> jax.Array:
    of_values, of_scales = gathers
    offset = None if blocks.offset is None else _put_together(blocks.offset, of_scales)
    whole = Blocks(_put_together(blocks.values, of_values), _put_together(blocks.scale, of_scales), offset)

    def floats(some: Blocks) -> jax.Array:
        return operand(dtype, some.turned(x.dtype))

    return grouped_product(x, whole, sizes, transposed=transposed, floats=floats)


def _blocks_forward(
    dtype: DType, gathers: _OfLeaves, x: jax.Array, blocks: Blocks, sizes: jax.Array
) -> tuple[jax.Array, tuple[Blocks, jax.Array]]:
    return _read(dtype, gathers, blocks, operand(dtype, x), sizes, transposed=True), (blocks, sizes)


def _blocks_backward(
    dtype: DType, gathers: _OfLeaves, saved: tuple[Blocks, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    blocks, sizes = saved
    return _read(dtype, gathers, blocks, operand(dtype, gradient), sizes, transposed=False), None, None


_blocks_product.defvjp(_blocks_forward, _blocks_backward)
