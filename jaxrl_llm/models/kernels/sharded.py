"""Attention on a mesh: a `shard_map` over rows, heads and time around a kernel that knows one device.

The partitioner of XLA refuses Mosaic kernels, and would gather what a loop over blocks indexes.

Where time is split, a device has some queries of a row and gathers all of its keys and values, which with grouped heads
are a fraction of the residual stream. They are not passed around in a ring, as one kernel call then knows the whole
mask, and what no query of the device sees costs it nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.sharding import MESH_AXES, context_shards, row_shards, spec

_HEADS = ("rows", "time", "heads_activation", None)  # [B, T, N or K, H]
_TIME = "context"


def over_mesh(
    attention: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visibility,
    *,
    sinks: jax.Array | None = None,
    **settings: Any,
) -> jax.Array:
    """`attention(query, key, value, visible, sinks=sinks, **settings)` on each device's rows, heads and queries.

    Those axes of the ambient mesh (`jax.set_mesh`) that a `shard_map` around the caller has taken are left alone;
    without others, or without a mesh, the function is called as it is. Where devices do not divide the rows,
    the last one fills up.

    Args:
        attention: has the signature of `dense_attention`.
        query: `[B, Tq, N, H]`.
        key: `[B, Tk, K, H]`.
        value: `[B, Tk, K, H]`.
        visible: which keys each query sees.
        sinks: `[N]` of the heads, or `None`.
        **settings: handed on.

    Raises:
        ValueError: tokens or heads are not divided by the axes over which they are split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = set(MESH_AXES).intersection(mesh.auto_axes)
    if not free:
        return attention(query, key, value, visible, sinks=sinks, **settings)
    heads, rows, splits_time = spec(mesh, _HEADS), spec(mesh, ("rows", "time")), context_shards(mesh) > 1
    _check(mesh, heads, query.shape, "query")
    _check(mesh, heads, key.shape, "key and value")
    count = len(query)
    query, key, value, visible = jax.tree.map(functools.partial(_filled, mesh), (query, key, value, visible))

    def of_device(
        query: jax.Array, key: jax.Array, value: jax.Array, visible: Visibility, sinks: jax.Array | None
    ) -> jax.Array:
        if splits_time:
            key, value = _whole_rows(key), _whole_rows(value)
            visible = Visibility(*visible[:2], *map(_whole_rows, visible[2:]))
        return attention(query, key, value, visible, sinks=sinks, **settings)

    mixed = jax.shard_map(
        of_device,
        in_specs=(heads, heads, heads, rows, spec(mesh, ("heads_activation",))),
        out_specs=heads,
        axis_names=free,
        check_vma=False,  # a Pallas kernel does not tell over which axes its results differ
    )(query, key, value, visible, sinks)
    return mixed if len(mixed) == count else mixed[:count]


def _filled(mesh: Any, x: jax.Array) -> jax.Array:
    """`[B, …]` with the last row again until the devices have as many each."""
    missing = -len(x) % row_shards(mesh)
    return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), mode="edge") if missing else x


@jax.custom_vjp
def _whole_rows(x: jax.Array) -> jax.Array:
    """`[B, T/C, …]` of each device → `[B, T, …]`, in the order of the devices. Gradients are summed in float32."""
    return jax.lax.all_gather(x, _TIME, axis=1, tiled=True)


def _whole_rows_forward(x: jax.Array) -> tuple[jax.Array, None]:
    return _whole_rows(x), None


def _whole_rows_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Exchanged and summed here: of a `psum_scatter` XLA makes, on large slices, a sum of whole rows in the narrow type.
    parts = gradient.reshape(len(gradient), jax.lax.axis_size(_TIME), -1, *gradient.shape[2:])
    parts = jax.lax.all_to_all(parts, _TIME, split_axis=1, concat_axis=1, tiled=True)
    total = jnp.sum(parts, axis=1, dtype=jnp.float32)
    return (total.astype(gradient.dtype),)


_whole_rows.defvjp(_whole_rows_forward, _whole_rows_backward)


def _check(mesh: Any, partition: PartitionSpec, shape: tuple[int, ...], what: str) -> None:
    for count, axes, name in zip(shape[1:], partition[1:], ("tokens", "heads", "entries of heads"), strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        shards = math.prod(mesh.shape[axis] for axis in names)
        if count % shards:
            way_out = ", or repeat the heads" if name == "heads" else ""
            raise ValueError(
                f"{what} of attention: {count} {name} are not divided by the {shards} shards of "
                f"mesh.{' × '.join(names)}; choose a mesh that divides them{way_out}"
            )
