"""Device mesh, logical axis names, and the shardings of parameters, activations and states.

Parameters and activations carry *logical* axis names; one table of rules maps them to the mesh axes
`data` (rows), `fsdp` (rows, and parameters cut along the embedding), `tensor` (heads, MLP, vocabulary).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "tensor", "expert")

HOST = "pinned_host"
"""The kind of memory that belongs to the host and that devices read and write."""

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "rows": ("data", "fsdp"),
    "heads_activation": "tensor",
    "vocab_activation": "tensor",
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "norm": None,
    "lora_rank": None,
}
"""Logical axis → mesh axis. An axis that is absent or `None` is not sharded."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be −1: whatever is left over."""

    data: int = 1
    """Replicas of the parameters; rows of the batch are split over data × fsdp."""
    fsdp: int = -1
    """Shards of the parameters along the embedding; also splits rows."""
    context: int = 1
    """Shards of the time axis (not implemented yet: must be 1)."""
    tensor: int = 1
    """Shards of heads, MLP and vocabulary."""
    expert: int = 1
    """Shards of experts (not implemented yet: must be 1)."""

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Devices along each axis, the −1 filled in.

        Raises:
            ValueError: the product does not fit the number of devices, or an axis cannot be used yet.
        """
        sizes = dataclasses.asdict(self)
        for axis in ("context", "expert"):
            if sizes[axis] != 1:
                raise ValueError(
                    f"mesh.{axis}={sizes[axis]}: the {axis} axis is not implemented yet; set mesh.{axis}=1"
                )
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
            raise ValueError(f"mesh sizes must be positive, at most one of them -1; got {sizes}")
        fixed = int(np.prod([size for size in sizes.values() if size != -1]))
        if free:
            if num_devices % fixed:
                raise ValueError(f"{num_devices} devices cannot be split by the fixed mesh axes {sizes}")
            sizes[free[0]] = num_devices // fixed
        elif fixed != num_devices:
            raise ValueError(
                f"mesh {sizes} needs {fixed} devices, there are {num_devices}; set one axis to -1 to use all"
            )
        return sizes


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all), axes in the order of `MESH_AXES`."""
    devices = jax.devices() if devices is None else devices
    sizes = (config or MeshConfig()).sizes(len(devices))
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=list(devices))


def row_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Number of pieces into which rows are cut: data × fsdp, of which one that the mesh lacks counts as 1.

    Args:
        mesh: the device mesh; `None`: the ambient one (`jax.set_mesh`), or 1 where none is set. In a function that
            is compiled, that is the one set where it is traced, and another one compiles it again.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(mesh, "rows"))


def on_cpu() -> bool:
    """Whether what is traced here will run on CPUs: by the ambient mesh, or by JAX's default where none is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "cpu"


def spec(mesh: Mesh | AbstractMesh, axes: Sequence[str | None]) -> PartitionSpec:
    """The partition on `mesh` of an array whose dimensions have these logical names."""
    return PartitionSpec(*(_mesh_axes(mesh, axis) or None for axis in axes))


def _mesh_axes(mesh: Mesh | AbstractMesh, axis: str | None) -> tuple[str, ...]:
    """The axes of `mesh` over which a logical axis is split.

    Those that a `shard_map` around the caller has taken are left out: there every array is one device's part.
    """
    rule = () if axis is None else RULES[axis] or ()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    return tuple(name for name in ((rule,) if isinstance(rule, str) else rule) if name in free)


def check_host_memory(mesh: Mesh, setting: str, instead: str) -> None:
    """Checks that the devices can keep arrays in the memory of their host.

    Args:
        mesh: the devices.
        setting: what wants it, `name=value`.
        instead: what does without.

    Raises:
        ValueError: they cannot.
    """
    device = mesh.devices.flat[0]
    if HOST not in (kinds := [memory.kind for memory in device.addressable_memories()]):
        raise ValueError(
            f"{setting} needs memory of kind {HOST!r}, but devices of kind {device.device_kind!r} have only "
            f"{', '.join(kinds)}: choose {instead}"
        )


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is rows (prompts)."""
    return NamedSharding(mesh, spec(mesh, ("rows",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Shardings of a tree of parameters.

    Args:
        mesh: the device mesh.
        axes: tree of tuples of logical names.
        shapes: tree of arrays or `ShapeDtypeStruct` of the same structure.

    Raises:
        ValueError: a dimension cannot be split evenly; names the parameter, the axis and the sizes.
    """

    def one(path: Any, names: tuple[str | None, ...], leaf: Any) -> NamedSharding:
        for dimension, name in zip(leaf.shape, names, strict=True):
            for axis in _mesh_axes(mesh, name):
                if dimension % mesh.shape[axis]:
                    where = jax.tree_util.keystr(path, simple=True, separator=".")
                    raise ValueError(
                        f"parameter {where} has {dimension} entries along {name!r}, which mesh axis {axis!r} of size "
                        f"{mesh.shape[axis]} does not divide; choose a mesh.{axis} that does"
                    )
        return NamedSharding(mesh, spec(mesh, names))

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Keeps `x` laid out by its logical axes on the ambient mesh (`jax.set_mesh`); without one, does nothing.

    An axis that the mesh lacks counts as one of size 1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(MESH_AXES).isdisjoint(mesh.auto_axes):
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, axes))


def gather_for_sampling(params: Any, axes: Any, dtype: Any) -> Any:
    """Parameters in `dtype`, still split over `tensor` but no longer over `fsdp`: what a decoding loop wants.

    Scales of norms keep their type: norms are computed in float32, in the learner, too.
    """

    def one(names: tuple[str | None, ...], leaf: jax.Array) -> jax.Array:
        leaf = leaf if names[-1] == "norm" else leaf.astype(dtype)
        return constrain(leaf, *(None if name == "embed" else name for name in names))

    return jax.tree.map(one, axes, params, is_leaf=lambda node: isinstance(node, tuple))


def state_shardings(mesh: Mesh, abstract_state: Any, shardings: Any, trainable: Any = None) -> Any:
    """Shardings of a training state: the optimizer's copies of a parameter lie where the parameter does.

    Args:
        mesh: the device mesh.
        abstract_state: record with `params` and `opt_state`, of shapes.
        shardings: tree of the parameters' shardings.
        trainable: the part of that tree of which the optimizer has copies; `None`: all of it.
    """
    trainable = shardings if trainable is None else trainable
    structure = jax.tree.structure(trainable)
    whole = replicated(mesh)

    def is_like_params(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    opt_state = jax.tree.map(
        lambda node: trainable if is_like_params(node) else whole, abstract_state.opt_state, is_leaf=is_like_params
    )
    everything = jax.tree.map(lambda _: whole, abstract_state)
    return everything.replace(params=shardings, opt_state=opt_state)
