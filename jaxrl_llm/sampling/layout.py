"""The sampler's mesh, and how parameters get to it from the learner's."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxrl_llm.sharding import MESH_AXES, constrain, head_shards, is_rounded, replicated, row_shards, spec


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """The arrays of a program as whole ones of `mesh`, on which another mesh of the same devices may go on."""
    whole = replicated(mesh)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), tree)


def sampling_mesh(mesh: Mesh, tensor: int | None = None) -> Mesh:
    """The devices of `mesh` as the sampler sees them: `tensor` of them share a copy of the weights, which rows need.

    Nothing is cut along the embedding there, nor are experts dealt out, and all that is not `tensor` splits rows.
    Devices that share a copy are neighbours on `mesh`: those along its `tensor` axis, and along the axes before it if
    these are not enough.

    Args:
        mesh: the learner's.
        tensor: shards of heads, MLP and vocabulary; `None`: as on `mesh`.

    Raises:
        ValueError: it is no multiple of the mesh's own, or the devices cannot be dealt so.
    """
    own = head_shards(mesh)
    tensor = own if tensor is None else tensor
    if tensor % own or mesh.size % tensor:
        raise ValueError(
            f"sampling.tensor={tensor} must be a multiple of the mesh's tensor={own} that divides its {mesh.size} "
            "devices"
        )
    return _with_sizes(mesh, data=mesh.size // tensor, tensor=tensor)


def common_mesh(mesh: Mesh, other: Mesh) -> Mesh:
    """The devices of the learner's `mesh` along axes of which those of the sampler's, `other`, are made, too.

    XLA writes all shardings of a program in the axes of that mesh of it that has most of them, and aborts where a
    `shard_map` of another one is over a part of such an axis (Shardy's `dedup_meshes`). So a program with both has to
    name this one: where the sampler's rows end within an axis of the learner, that is cut in two.
    """
    rows, before, sizes = row_shards(other), 1, {}
    for axis, size in mesh.shape.items():
        outer = rows // before
        if 1 < outer < size and size % outer == 0:
            sizes |= {f"outer_{axis}": outer, axis: size // outer}
        else:
            sizes[axis] = size
        before *= size
    shape = tuple(sizes.values())
    return Mesh(mesh.devices.reshape(shape), tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def _with_sizes(mesh: Mesh, **sizes: int) -> Mesh:
    """The devices of `mesh`, in their order, along the axes of `MESH_AXES`; those that are not named have size 1."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return Mesh(mesh.devices.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def gather_for_sampling(params: Any, axes: Any, dtype: Any, mesh: Mesh) -> Any:
    """Parameters in `dtype` as the ambient mesh, the sampler's, wants them.

    From the learner's layout they get there by way of one that is cut along the embedding *and* over the sampler's
    `tensor`: an all-to-all, and then a gathering of what a device needs. XLA's direct way is by whole weights.

    Scales of norms, routers and sinks keep their type: these are computed in float32, in the learner, too.

    Args:
        params: tree of parameters, laid out on `mesh`.
        axes: their logical axes.
        dtype: type to decode with.
        mesh: the learner's.
    """
    tensor, between = head_shards(), None
    if tensor != head_shards(mesh):
        rows = mesh.size // tensor
        data = math.gcd(rows, mesh.shape.get("data", 1))  # copies of the weights, as far as the sampler has them
        between = _with_sizes(mesh, data=data, fsdp=rows // data, tensor=tensor).abstract_mesh

    def one(names: tuple[str | None, ...], leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(dtype_read(names, leaf.dtype, dtype))
        if between is not None:
            leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(between, spec(between, names, leaf.shape)))
        return constrain(leaf, *names)

    return jax.tree.map(one, axes, params, is_leaf=lambda node: isinstance(node, tuple))


def dtype_read(names: tuple[str | None, ...], own: Any, dtype: Any) -> Any:
    """The type in which a parameter of its `own` type is read where one computes in `dtype`.

    Norms, routers and sinks are read in float32, and what is rounded to integers and their scales as it is.
    """
    in_float32 = not {"norm", "router", "sinks"}.isdisjoint(names)
    return own if in_float32 or is_rounded(own) else dtype
