"""Device mesh, logical axis names, and the shardings of parameters, activations and states.

Parameters and activations carry *logical* axis names; one table of rules maps them to the mesh axes
`data` (rows), `fsdp` (rows, and parameters cut along the embedding), `context` (the time axis of rows, and parameters
as `fsdp`), `expert` (experts; outside of them as `fsdp`), `tensor` (heads, MLP, vocabulary).

The learner wants `fsdp`: it reads each weight a few times a step. The sampler reads all of them for every token and
wants `tensor`: it sees the same devices as a mesh of its own (`sampling/layout.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "expert", "tensor")
"""From those along which devices talk least to those along which they talk most: neighbours are near one another."""

HOST = "pinned_host"
"""The kind of memory that belongs to the host and that devices read and write."""

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "rows": ("data", "fsdp", "expert"),
    "rows_of_replica": "data",
    "time": "context",
    "entries_activation": "context",
    "embed_of_context": ("fsdp", "expert"),
    "heads_activation": "tensor",
    "vocab_activation": "tensor",
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "context", "expert"),
    "expert": "expert",
    "embed_of_expert": ("fsdp", "context"),
    "router": None,
    "shared_gate": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "sinks": "tensor",
    "mlp": "tensor",
    "norm": None,
    "whole": None,
    "lora_rank": None,
}
"""Logical axis → mesh axis. An axis that is absent or `None` is not sharded."""

_BLOCKS = "blocks of "


def blocks_of(axis: str) -> str:
    """The name of an axis with an entry for several of another one each; an array's last but one. See `spec`."""
    return _BLOCKS + axis


def _has_blocks(axis: str | None) -> bool:
    return axis is not None and axis.startswith(_BLOCKS)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be −1: whatever is left over."""

    data: int = 1
    """Replicas of the parameters; rows of the batch are split over data × fsdp × expert. With several TPU slices, a
    multiple of their number: it is what goes over the network between them."""
    fsdp: int = -1
    """Shards of the parameters along the embedding; also splits rows."""
    context: int = 1
    """Shards of the learner's time axis, for rows too long for one device: each row of tokens is split over so many
    devices, which gather its keys and values in each layer. Also shards parameters, as fsdp does. To the sampler it is
    more rows. Lengths of rows that are multiples of 1024 × context need no filling up."""
    tensor: int = 1
    """Shards of heads, MLP and vocabulary."""
    expert: int = 1
    """Shards of the experts of a mixture: in layers that have some, devices along it gather one another's tokens, and
    each computes those of its experts. Everywhere else it is as fsdp, and to the sampler it is more rows."""

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Devices along each axis, the −1 filled in.

        Raises:
            ValueError: the product does not fit the number of devices, or an axis cannot be used yet.
        """
        sizes = dataclasses.asdict(self)
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
    """The mesh of `config` over `devices` (default: all), axes in the order of `MESH_AXES`.

    Where the devices belong to several slices of TPUs, `data` is what goes over the network between them: parameters
    are there once in each slice (or oftener), and a gradient is all that crosses in an update.

    Raises:
        ValueError: the sizes do not fit the devices, or `data` not the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (config or MeshConfig()).sizes(len(devices))
    shape, automatic = tuple(sizes[axis] for axis in MESH_AXES), (AxisType.Auto,) * len(MESH_AXES)
    if (slices := len({getattr(device, "slice_index", 0) for device in devices})) == 1:
        try:
            return jax.make_mesh(shape, MESH_AXES, axis_types=automatic, devices=list(devices))
        except NotImplementedError:  # no axis of the torus is as long as one of the mesh: axes share one
            placed = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
            return Mesh(placed, MESH_AXES, axis_types=automatic)
    if sizes["data"] % slices:
        raise ValueError(
            f"the devices are {slices} slices, between which only mesh.data may be split: set mesh.data={slices}, or "
            f"a multiple of it, instead of {sizes['data']}"
        )
    inner = (sizes["data"] // slices, *shape[1:])
    outer = (slices, *(1 for _ in inner[1:]))
    placed = mesh_utils.create_hybrid_device_mesh(inner, outer, list(devices), allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=automatic)


def row_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Number of pieces into which rows are cut: data × fsdp × expert, of which one that the mesh lacks counts as 1.

    Args:
        mesh: the device mesh; `None`: the ambient one (`jax.set_mesh`), or 1 where none is set. In a function that
            is compiled, that is the one set where it is traced, and another one compiles it again.
    """
    return _pieces("rows", mesh)


def row_axes() -> tuple[str, ...]:
    """The axes of the ambient mesh over which rows are cut; not those of size 1, nor those that a caller has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in _mesh_axes(mesh, "rows") if mesh.shape[axis] > 1)


def context_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Number of pieces into which the time of rows of tokens is cut; `mesh` as for `row_shards`."""
    return _pieces("time", mesh)


def replicas() -> int:
    """Number of pieces into which rows are cut on the ambient mesh that hold parameters of their own: `data`."""
    return _pieces("rows_of_replica", None)


def token_shards() -> int:
    """Number of pieces into which the tokens of the ambient mesh's rows are cut: data × fsdp × expert × context."""
    return row_shards() * context_shards()


def head_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Number of pieces into which heads are cut: the size of `tensor`; `mesh` as for `row_shards`."""
    return _pieces("heads_activation", mesh)


def _pieces(axis: str, mesh: Mesh | AbstractMesh | None) -> int:
    """Number of pieces into which a logical axis is cut on a mesh, or on the ambient one."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return _product(mesh, _mesh_axes(mesh, axis))


def platform() -> str:
    """What that is traced here will run on, as `cpu`: by the ambient mesh, or by JAX's default where none is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_cpu() -> bool:
    """Whether what is traced here will run on CPUs."""
    return platform() == "cpu"


def spec(mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int] = ()) -> PartitionSpec:
    """The partition on `mesh` of an array whose dimensions have these logical names.

    Of an axis of blocks there are less than of that which they are of: a mesh axis that does not divide it cuts the
    axis behind it in its place, if that has a name and so many entries, or else nothing.

    Args:
        mesh: the device mesh.
        axes: the names.
        shape: of the array; needed where one is an axis of blocks.
    """
    parts = [_mesh_axes(mesh, axis) for axis in axes]
    if len(axes) > 1 and _has_blocks(axes[-2]):
        *_, blocks, rows = shape
        *_, wanted, of_rows = parts
        of_blocks: tuple[str, ...] = ()
        for name in wanted:
            if blocks % _product(mesh, (*of_blocks, name)) == 0:
                of_blocks = (*of_blocks, name)
            elif axes[-1] is not None and rows % _product(mesh, (*of_rows, name)) == 0:
                of_rows = (*of_rows, name)
        parts[-2:] = of_blocks, of_rows
    return PartitionSpec(*(part or None for part in parts))


def _product(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _mesh_axes(mesh: Mesh | AbstractMesh, axis: str | None) -> tuple[str, ...]:
    """The axes of `mesh` over which a logical axis is split.

    Those that a `shard_map` around the caller has taken are left out: there every array is one device's part.
    """
    rule = () if axis is None else RULES[axis.removeprefix(_BLOCKS)] or ()
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


def in_host_memory(x: jax.Array) -> bool:
    """Whether an array, be it traced, lies in the memory of the host (`HOST`)."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def to_device_memory(x: jax.Array) -> jax.Array:
    """An array in the devices' own memory; for compiled functions, which compute with none that lies elsewhere."""
    return jax.device_put(x, jax.memory.Space.Device) if in_host_memory(x) else x


def to_host_memory(x: jax.Array) -> jax.Array:
    """An array in the memory of the host; for compiled functions."""
    return x if in_host_memory(x) else jax.device_put(x, jax.memory.Space.Host)


def on_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """A whole array in this process's memory; where others have parts of it, all of them must ask."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is rows (prompts)."""
    return NamedSharding(mesh, spec(mesh, ("rows",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def rows_or_whole(mesh: Mesh, rows: int) -> NamedSharding:
    """Sharding of arrays of so many rows: cut along these, or whole on each device if the mesh does not divide them."""
    return replicated(mesh) if rows % row_shards(mesh) else row_sharding(mesh)


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
            axes = [axis for axis in _mesh_axes(mesh, name) if mesh.shape[axis] > 1]
            shards = _product(mesh, axes)
            if dimension % shards and not _has_blocks(name):
                where = jax.tree_util.keystr(path, simple=True, separator=".")
                many = len(axes) > 1
                raise ValueError(
                    f"parameter {where} has {dimension} entries along {name!r}, which mesh "
                    f"{'axes' if many else 'axis'} {' × '.join(map(repr, axes))} of size {shards} "
                    f"{'do' if many else 'does'} not divide; choose a mesh.{' × mesh.'.join(axes)} that does"
                )
        return NamedSharding(mesh, spec(mesh, names, leaf.shape))

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))


def constrain(x: jax.Array, *axes: str | None, shape: Sequence[int] | None = None) -> jax.Array:
    """Keeps `x` laid out by its logical axes on the ambient mesh (`jax.set_mesh`); without one, does nothing.

    An axis that the mesh lacks counts as one of size 1.

    Args:
        x: the array.
        axes: names of its axes.
        shape: of an array as which it is laid out, where that is not its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(MESH_AXES).isdisjoint(mesh.auto_axes):
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape if shape is None else shape))


def gathered(weight: jax.Array, *axes: str | None) -> jax.Array:
    """A weight as products read it on the ambient mesh: whole along `embed`, which is cut for storage alone.

    Left to itself, XLA multiplies part after part while the next one is on its way. Of a cut inner axis that makes as
    many narrow products as there are devices, and each of them reads and writes the whole result, rounded to its type:
    by the compiler's own estimate three times the time of the one product (Qwen2.5-1.5B, eight v5e chips), and many
    times the code.

    Args:
        weight: laid out by its logical axes.
        axes: their names.
    """
    return constrain(constrain(weight, *axes), *_whole_along_embed(axes))


def dealt_again(gradient: jax.Array, *axes: str | None) -> jax.Array:
    """The gradient of what was `gathered`, summed over devices and laid out as the weight.

    Whole in between, it is made by one product (as in `gathered`), but would be summed whole over replicas, too. Where
    there are some, XLA is told its layout alone: it makes one product all the same, sums that over the devices of a
    replica, of which each takes its part (a reduce-scatter), and then this part over replicas.
    """
    if replicas() == 1:
        gradient = constrain(gradient, *_whole_along_embed(axes))
    return constrain(gradient, *axes)


def _whole_along_embed(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    return tuple(None if axis in ("embed", blocks_of("embed")) else axis for axis in axes)


def is_rounded(dtype: Any) -> bool:
    """Whether it is the type of integers or of their scales, which no compute type takes the place of."""
    return dtype not in (np.float32, jax.numpy.bfloat16)


def state_shardings(
    mesh: Mesh, abstract_state: Any, shardings: Any, trainable: Any = None, *, offload: bool = False
) -> Any:
    """Shardings of a training state: the optimizer's copies of a parameter lie where the parameter does.

    Args:
        mesh: the device mesh.
        abstract_state: record with `params` and `opt_state`, of shapes.
        shardings: tree of the parameters' shardings.
        trainable: the part of that tree of which the optimizer has copies; `None`: all of it.
        offload: whether these copies lie in the host's memory.
    """
    trainable = shardings if trainable is None else trainable
    if offload:
        trainable = jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST), trainable)
    structure = jax.tree.structure(trainable)
    whole = replicated(mesh)

    def is_like_params(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    opt_state = jax.tree.map(
        lambda node: trainable if is_like_params(node) else whole, abstract_state.opt_state, is_leaf=is_like_params
    )
    everything = jax.tree.map(lambda _: whole, abstract_state)
    return everything.replace(params=shardings, opt_state=opt_state)
