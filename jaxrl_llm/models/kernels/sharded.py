"""Attention on a mesh: a `shard_map` over rows and heads around a kernel that knows one device.

The partitioner of XLA refuses Mosaic kernels, and would gather what a loop over blocks indexes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.sharding import MESH_AXES, spec

_HEADS = ("rows", None, "heads_activation", None)  # [B, T, N or K, H]


def over_mesh(
    attention: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visibility,
    **settings: Any,
) -> jax.Array:
    """`attention(query, key, value, visible, **settings)` on each device's rows and heads.

    Those axes of the ambient mesh (`jax.set_mesh`) that a `shard_map` around the caller has taken are left alone;
    without others, or without a mesh, the function is called as it is.

    Args:
        attention: has the signature of `dense_attention`.
        query: `[B, Tq, N, H]`.
        key: `[B, Tk, K, H]`.
        value: `[B, Tk, K, H]`.
        visible: which keys each query sees.
        **settings: handed on.

    Raises:
        ValueError: rows or heads are not divided by the axes over which they are split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = set(MESH_AXES).intersection(mesh.auto_axes)
    if not free:
        return attention(query, key, value, visible, **settings)
    heads, rows = spec(mesh, _HEADS), spec(mesh, ("rows", None))
    _check(mesh, heads, query.shape, "query")
    _check(mesh, heads, key.shape, "key and value")
    return jax.shard_map(
        lambda *arrays: attention(*arrays, **settings),
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        axis_names=free,
        check_vma=False,  # a Pallas kernel does not tell over which axes its results differ
    )(query, key, value, visible)


def _check(mesh: Any, partition: PartitionSpec, shape: tuple[int, ...], what: str) -> None:
    for count, axes, name in zip(shape, partition, ("rows", "tokens", "heads", "entries of heads"), strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        shards = math.prod(mesh.shape[axis] for axis in names)
        if count % shards:
            way_out = ", or repeat the heads" if name == "heads" else ""
            raise ValueError(
                f"{what} of attention: {count} {name} are not divided by the {shards} shards of "
                f"mesh.{' × '.join(names)}; choose a mesh that divides them{way_out}"
            )
