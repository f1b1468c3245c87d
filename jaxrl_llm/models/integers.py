"""Weights that are not trained, kept as small integers: W = q·scale + offset, a scale for each 32 entries of a row.

Of 8 bits: q from −127 to 127, scale = max |W| / 127, no offset (GGUF's Q8_0). Of 4 bits: q from 0 to 15, offset =
min W, scale = (max W − min W) / 15 (Q4_1); of a block that has been rounded to Q4_0, what that has. Scales and offsets
are float16, as there, so that blocks of a GGUF file in these formats come out as they are in it. Adapters are trained
beside them (Dettmers et al. 2023, QLoRA).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxrl_llm.models.config import BaseDType, DType, LoraTarget, Params
from jaxrl_llm.models.operands import operand, times_transposed
from jaxrl_llm.sharding import blocks_of, constrain, gathered, head_shards

BLOCK = 32
"""Entries of a row that share a scale."""

BYTES: Mapping[BaseDType, float] = MappingProxyType({"int8": 1 + 2 / BLOCK, "int4": 1 / 2 + 4 / BLOCK})
"""Of an entry, with its part of scale and offset."""

_Axes = tuple[str, str]
"""Logical names of the axes of blocks: blocks of something, and rows."""


class Blocks(NamedTuple):
    """A weight `[..., out, in]`, of which the rows are the last axis here.

    So a TPU reads it as it lies: what is said of a block holds for whole lanes. Rows that lie one behind the other it
    turns first, those of all layers at once, in as much memory again.
    """

    values: jax.Array
    """Of 8 bits int8 `[..., in, out]`; of 4 uint8 `[..., in / 2, out]`, entries n and n + 16 of a block in a byte, the
    first in its low bits, as in a GGUF file."""
    scale: jax.Array
    """`[..., in / 32, out]` float16; more where a device has parts of blocks (`with_whole_blocks`)."""
    offset: jax.Array | None
    """The same, of 4 bits."""

    @classmethod
    def of(cls, weight: jax.Array, dtype: BaseDType) -> Blocks:
        """The nearest integers of a weight.

        Raises:
            ValueError: its rows are not whole blocks.
        """
        inner = weight.shape[-1]
        if inner % BLOCK:
            raise ValueError(
                f"{dtype} weights (model.base_dtype, sampling.weights_dtype) are in blocks of {BLOCK} entries of a "
                f"row, and one of shape {list(weight.shape)} has rows of {inner}; leave it out"
            )
        turned = jnp.swapaxes(weight.astype(jnp.float32), -1, -2)
        blocks = turned.reshape(*turned.shape[:-2], -1, BLOCK, turned.shape[-1])
        if dtype == "int8":
            low, scale = None, jnp.max(jnp.abs(blocks), axis=-2) / 127
        else:
            low, scale = _sixteen(blocks)
        scale = scale.astype(jnp.float16)
        steps = scale.astype(jnp.float32)[..., None, :]
        above = blocks if low is None else blocks - low.astype(jnp.float32)[..., None, :]
        steps = jnp.round(above / jnp.where(steps != 0, steps, 1))
        if low is None:
            return cls(jnp.clip(steps, -127, 127).astype(jnp.int8).reshape(turned.shape), scale, None)
        return cls(_packed(jnp.clip(steps, 0, 15).astype(jnp.uint8)), scale, low)

    @property
    def inner(self) -> int:
        """Entries of a row."""
        return self.values.shape[-2] * (1 if self.offset is None else 2)

    def turned(self, dtype: Any) -> jax.Array:
        """The weight `[..., in, out]`, computed in float32 and rounded to a type."""
        *outer, count, out = self.scale.shape
        values = self.values.reshape(*outer, count, -1, out) if self.offset is None else _unpacked(self.values, count)
        wide = values.astype(jnp.float32) * self.scale.astype(jnp.float32)[..., None, :]
        if self.offset is not None:
            wide = wide + self.offset.astype(jnp.float32)[..., None, :]
        return wide.astype(dtype).reshape(*outer, -1, out)

    def floats(self, dtype: Any) -> jax.Array:
        """The weight `[..., out, in]`, as `turned`."""
        return jnp.swapaxes(self.turned(dtype), -1, -2)


def _packed(blocks: jax.Array) -> jax.Array:
    """Numbers under 16 of blocks `[..., count, entries, out]`, two in a byte: `[..., count · entries / 2, out]`."""
    *outer, count, entries, out = blocks.shape
    low, high = jnp.split(blocks, 2, axis=-2)
    return (low | high << 4).reshape(*outer, count * entries // 2, out)


def _unpacked(values: jax.Array, count: int) -> jax.Array:
    """What `_packed` packed, of so many blocks."""
    *outer, _, out = values.shape
    pairs = values.reshape(*outer, count, -1, out)
    return jnp.concatenate([pairs & 15, pairs >> 4], axis=-2)


def _sixteen(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first of 16 numbers, float16, and the step between them, for each block `[..., 32, out]`.

    They go from the least to the greatest of the block; or from that which is farthest from 0 over 0 to seven eighths
    of its opposite, where all of it lies on these, as after Q4_0.
    """

    def away(first: jax.Array, step: jax.Array) -> jax.Array:
        """Steps between the block's entries and the nearest of the numbers, at most."""
        steps = (blocks - first.astype(jnp.float32)[..., None, :]) / jnp.where(step != 0, step, 1)[..., None, :]
        return jnp.max(jnp.abs(steps - jnp.clip(jnp.round(steps), 0, 15)), axis=-2)

    least, most = jnp.min(blocks, axis=-2), jnp.max(blocks, axis=-2)
    low = least.astype(jnp.float16)
    step = (most - low.astype(jnp.float32)) / 15
    farthest = jnp.where(most >= -least, most, least)
    over_zero = -farthest / 8
    away_then = away(farthest, over_zero)
    lies_on = (away_then < 1 / 16) & (away_then < away(low, step))
    return jnp.where(lies_on, farthest.astype(jnp.float16), low), jnp.where(lies_on, over_zero, step)


LEAVES = ("weight", "weight_scale", "weight_offset")
"""Where a linear layer's parameters have values, scale and offset."""


def blocks_in(linear: Params) -> Blocks | None:
    """Those of a linear layer's parameters; `None`: its weight is of floats."""
    return (
        Blocks(linear["weight"], linear["weight_scale"], linear.get("weight_offset")) if LEAVES[1] in linear else None
    )


def has_blocks(params: Params) -> bool:
    """Whether some linear layer of a tree has integers."""
    return LEAVES[1] in params or any(has_blocks(part) for part in params.values() if isinstance(part, dict))


def with_blocks(params: Any) -> Any:
    """A tree of parameters in which blocks that stand for weights are the leaves of their linear layers."""
    if not isinstance(params, dict):
        return params
    if isinstance(params.get("weight"), Blocks):
        found = zip(LEAVES, params["weight"], strict=True)
        return params | {name: leaf for name, leaf in found if leaf is not None}
    return {name: with_blocks(part) for name, part in params.items()}


def rounded(params: Params, dtype: BaseDType, axes: Params | None = None) -> Params:
    """Parameters of a model whose layers' linear maps are integers in place of floats. Pure; has no adapters.

    Routers of experts stay floats, as does what gates a shared one.

    Args:
        params: of the model with floats.
        dtype: of the integers.
        axes: logical names of the axes of what is returned, by which floats are laid out anew before they are rounded,
            whole blocks on a device; `None`: there is no mesh.
    """

    def one(name: str, tree: Any, names: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if "weight" in tree:
            if name not in get_args(LoraTarget):
                return tree
            weight = tree["weight"]
            if names:
                *outer, out, inner = weight.shape
                turned = jnp.swapaxes(weight, -1, -2)
                turned = constrain(turned, *names[LEAVES[1]], shape=(*outer, inner // BLOCK, out))
                weight = jnp.swapaxes(turned, -1, -2)
            return tree | {"weight": Blocks.of(weight, dtype)}
        return {name: one(name, part, names and names[name]) for name, part in tree.items()}

    return with_blocks(params | {"layers": one("layers", params["layers"], axes and axes["layers"])})


_READ_IN_PARTS = {"output": "heads", "down": "mlp"}
"""Linear maps of whose rows a device of the `tensor` axis has a part, and the name of that axis."""


def with_whole_blocks(params: Params) -> Params:
    """Parameters of the same function in which the ambient mesh's `tensor` axis divides the blocks of a row.

    Where it does not, blocks are taken for several, and each has the scale of all of them: of 24 blocks on 16 devices
    come 48. Other axes of a mesh cut weights for storage alone, and need no such thing.

    Args:
        params: of a model or of one of its blocks; those without integers are returned as they are.
    """
    if not has_blocks(params):
        return params

    def one(tree: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(tree, dict):
            return tree
        if path[-1:] and path[-1] in _READ_IN_PARTS and (blocks := blocks_in(tree)) is not None:
            rows = "embed_of_expert" if "experts" in path else "embed"
            parted = _parted(blocks, blocks_of(_READ_IN_PARTS[path[-1]]), rows)
            return tree | {name: leaf for name, leaf in zip(LEAVES, parted, strict=True) if leaf is not None}
        return {name: one(part, (*path, name)) for name, part in tree.items()}

    return one(params, ())


def _parted(blocks: Blocks, inner: str, rows: str) -> Blocks:
    scale, shards = blocks.scale, head_shards()
    if scale.shape[-2] % shards == 0:
        return blocks
    own = blocks.inner // scale.shape[-2]
    part = math.gcd(own, blocks.inner // shards)
    outer = (None,) * (scale.ndim - 3) + ("expert",) if rows == "embed_of_expert" else (None,) * (scale.ndim - 2)

    def one(leaf: jax.Array, cut: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return constrain(cut(constrain(leaf, *outer, None, rows)), *outer, inner, rows)

    def repeated(leaf: jax.Array) -> jax.Array:
        return jnp.repeat(leaf, own // part, axis=-2)

    if blocks.offset is None:
        return Blocks(blocks.values, one(scale, repeated), None)
    if part % 2:
        raise ValueError(
            f"rows of {blocks.inner} numbers of 4 bits, two in a byte, cannot be cut for a tensor axis of {shards} "
            "devices: choose a smaller mesh.tensor, or int8"
        )

    def packed_anew(values: jax.Array) -> jax.Array:
        whole = _unpacked(values, scale.shape[-2])
        return _packed(whole.reshape(*scale.shape[:-2], -1, part, scale.shape[-1]))

    return Blocks(one(blocks.values, packed_anew), one(scale, repeated), one(blocks.offset, repeated))


def with_floats(params: Any, dtype: Any) -> Any:
    """A tree of parameters with floats in place of integers. Pure; of a tree without integers it is itself."""
    if not isinstance(params, dict) or not has_blocks(params):
        return params
    if (blocks := blocks_in(params)) is not None:
        return {name: leaf for name, leaf in params.items() if name not in LEAVES} | {"weight": blocks.floats(dtype)}
    return {name: with_floats(part, dtype) for name, part in params.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def blocks_product(dtype: DType, axes: _Axes, x: jax.Array, blocks: Blocks) -> jax.Array:
    """x·Wᵀ in the type of x, its factors numbers of `dtype`; W, which is gathered as integers, has no gradient."""
    return _forward(dtype, axes, x, blocks)[0]


def _factor(dtype: DType, axes: _Axes, blocks: Blocks, x: jax.Array) -> jax.Array:
    whole = jax.tree.map(lambda leaf: gathered(leaf, *axes), blocks)
    return operand(dtype, whole.turned(x.dtype))


def _forward(dtype: DType, axes: _Axes, x: jax.Array, blocks: Blocks) -> tuple[jax.Array, Blocks]:
    x = operand(dtype, x)
    return jnp.einsum("...i,io->...o", x, _factor(dtype, axes, blocks, x)), blocks


def _backward(dtype: DType, axes: _Axes, blocks: Blocks, gradient: jax.Array) -> tuple[jax.Array, None]:
    gradient = operand(dtype, gradient)
    return times_transposed(gradient, _factor(dtype, axes, blocks, gradient)), None


blocks_product.defvjp(_forward, _backward)
