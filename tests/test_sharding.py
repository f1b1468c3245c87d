"""Meshes, the shardings of parameters and states, and what cannot be laid out."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl_llm import sharding
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.layout import gather_for_sampling, sampling_mesh
from jaxrl_llm.sharding import (
    MESH_AXES,
    MeshConfig,
    check_host_memory,
    constrain,
    head_shards,
    make_mesh,
    parameter_shardings,
    replicated,
    row_sharding,
    row_shards,
    state_shardings,
)


@pytest.mark.parametrize(
    ("config", "devices", "expected"),
    [
        (MeshConfig(), 8, (1, 8, 1, 1, 1)),
        (MeshConfig(), 1, (1, 1, 1, 1, 1)),
        (MeshConfig(tensor=4), 8, (1, 2, 1, 1, 4)),
        (MeshConfig(data=-1, fsdp=2), 8, (4, 2, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 2, 1, 1, 2)),
        (MeshConfig(fsdp=1, tensor=-1), 6, (1, 1, 1, 1, 6)),
        (MeshConfig(context=4), 8, (1, 2, 4, 1, 1)),
        (MeshConfig(expert=4), 8, (1, 2, 1, 4, 1)),
        (MeshConfig(fsdp=1, context=-1), 8, (1, 1, 8, 1, 1)),
    ],
)
def test_sizes(config, devices, expected):
    assert tuple(config.sizes(devices)[axis] for axis in MESH_AXES) == expected


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(context=3), 8, "8 devices cannot be split"),
        (MeshConfig(data=-1, fsdp=-1), 8, "at most one of them -1"),
        (MeshConfig(data=0), 8, "must be positive"),
        (MeshConfig(fsdp=-2), 8, "must be positive"),
        (MeshConfig(tensor=3), 8, "8 devices cannot be split"),
        (MeshConfig(fsdp=4), 8, "needs 4 devices, there are 8"),
        (MeshConfig(fsdp=16), 8, "needs 16 devices, there are 8"),
        (MeshConfig(data=16), 8, "8 devices cannot be split"),
    ],
)
def test_impossible_meshes_raise(config, devices, message):
    with pytest.raises(ValueError, match=message):
        config.sizes(devices)


def test_make_mesh_uses_the_given_devices():
    whole = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert whole.axis_names == MESH_AXES
    assert whole.devices.size == 8
    assert row_shards(whole) == 4
    part = make_mesh(devices=jax.devices()[2:4])
    assert set(part.devices.flat) == set(jax.devices()[2:4])
    assert dict(part.shape) == {"data": 1, "fsdp": 2, "context": 1, "tensor": 1, "expert": 1}


def test_an_axis_may_have_a_part_of_one_of_the_torus(monkeypatch: pytest.MonkeyPatch):
    """On 2 × 2 × 4 chips JAX itself refuses tensor=2 beside context=2 and fsdp=4."""

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("Failed to find assignment for logical_axis_index 2")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    assert mesh.shape["fsdp"] == 4 and mesh.shape["tensor"] == 2 and mesh.axis_types == (AxisType.Auto,) * 5
    assert set(mesh.devices.flat) == set(jax.devices())


def test_parameters_are_cut_along_embedding_and_heads(tiny_config):
    model = Transformer(tiny_config(tie_embeddings=False, attention_bias=True, mlp_bias=True, qk_norm=True))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    shardings = parameter_shardings(mesh, model.logical_axes(), model.abstract_params())
    assert jax.tree.structure(shardings) == jax.tree.structure(model.abstract_params())

    def parts(path: str) -> list[int]:
        sharding, leaf = shardings, model.abstract_params()
        for key in path.split("."):
            sharding, leaf = sharding[key], leaf[key]
        shard = sharding.shard_shape(leaf.shape)
        return [whole // own for whole, own in zip(leaf.shape, shard, strict=True)]

    expected = {
        "embed.weight": [4, 2],
        "lm_head.weight": [4, 2],
        "final_norm.scale": [1],
        "layers.attention.query.weight": [1, 4, 2],
        "layers.attention.key.weight": [1, 4, 2],
        "layers.attention.output.weight": [1, 2, 4],
        "layers.attention.query.bias": [1, 4],
        "layers.attention.query_norm.scale": [1, 1],
        "layers.attention_norm.scale": [1, 1],
        "layers.mlp.gate.weight": [1, 4, 2],
        "layers.mlp.down.weight": [1, 2, 4],
        "layers.mlp.down.bias": [1, 2],
    }
    assert {path: parts(path) for path in expected} == expected


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"vocab_size": 66}, MeshConfig(tensor=4), r"embed\.weight has 66 entries along 'vocab'.*'tensor' of size 4"),
        ({"embed_dim": 36}, MeshConfig(), r"embed\.weight has 36 entries along 'embed'.*'fsdp' of size 8"),
        (
            {"embed_dim": 36},
            MeshConfig(fsdp=2, context=4),
            r"embed\.weight has 36 entries along 'embed'.*axes 'fsdp' × 'context' of size 8.*fsdp × mesh.context",
        ),
        ({"mlp_dim": 50}, MeshConfig(tensor=4), r"layers\.mlp\.\w+\.weight has 50 entries along 'mlp'"),
    ],
)
def test_parameters_that_cannot_be_cut_raise_by_name(changes, config, message, tiny_config):
    model = Transformer(tiny_config(**changes))
    with pytest.raises(ValueError, match=message):
        parameter_shardings(make_mesh(config), model.logical_axes(), model.abstract_params())


def test_moments_lie_where_their_parameters_do(tiny_config):
    model = Transformer(tiny_config())
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    params = model.abstract_params()
    shardings = parameter_shardings(mesh, model.logical_axes(), params)
    config = OptimizerConfig(weight_decay=0.1, warmup_steps=2)
    optimizer = make_optimizer(config, make_schedule(config, 10))
    abstract = jax.eval_shape(lambda p: make_train_state(p, optimizer, 0), params)
    of_state = state_shardings(mesh, abstract, shardings)
    assert jax.tree.structure(of_state) == jax.tree.structure(abstract)
    assert of_state.params == shardings
    for moment in ("mu", "nu"):
        assert optax.tree.get(of_state.opt_state, moment) == shardings
    rest = {replicated(mesh)} | set(jax.tree.leaves(shardings))
    assert set(jax.tree.leaves(of_state.opt_state)) <= rest
    assert of_state.step == of_state.key == replicated(mesh)
    # What they say can be done.
    state = jax.jit(lambda: make_train_state(model.init(jax.random.key(0)), optimizer, 0), out_shardings=of_state)()
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == of_state


def partial_mesh() -> jax.sharding.Mesh:
    """A mesh of a user's own: two of our axes and one of theirs."""
    return jax.make_mesh((2, 2, 2), ("stage", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def test_an_axis_that_a_mesh_lacks_counts_as_one(tiny_config):
    mesh = partial_mesh()
    assert row_shards(mesh) == 2
    assert row_sharding(mesh).spec == PartitionSpec("fsdp")
    model = Transformer(tiny_config())
    shardings = parameter_shardings(mesh, model.logical_axes(), model.abstract_params())
    up = shardings["layers"]["mlp"]["up"]["weight"]
    assert up.spec == PartitionSpec(None, "tensor", "fsdp")
    assert row_shards(jax.make_mesh((8,), ("x",))) == 1
    with jax.set_mesh(mesh):
        laid = jax.jit(lambda x: constrain(x, "rows", "vocab_activation"))(jnp.zeros((8, 8)))
    assert laid.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), 2)


def test_row_shards_of_the_mesh_that_is_set(mesh):
    """The number is that of the mesh under which a function is traced; none inside a shard_map over rows."""
    seen = []

    @jax.jit
    def trace(x: jax.Array) -> jax.Array:
        seen.append(row_shards())
        return constrain(x, "rows")

    assert row_shards() == 1
    x = jnp.zeros(8)
    trace(x)
    with jax.set_mesh(mesh):
        trace(x)
        names = {"data", "fsdp"}
        rows = PartitionSpec(("data", "fsdp"))
        jax.jit(jax.shard_map(trace, in_specs=rows, out_specs=rows, axis_names=names))(x)
    with jax.set_mesh(partial_mesh()):
        trace(x)
    assert seen == [1, 4, 1, 2]


def test_constrain_is_nothing_without_a_mesh_of_ours():
    x = jnp.arange(16.0).reshape(8, 2)
    assert constrain(x, "rows", None) is x
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):
        np.testing.assert_array_equal(jax.jit(lambda x: constrain(x, "rows", None))(x), x)


def test_constrain_lays_rows_out_over_data_and_fsdp(mesh):
    x = jnp.arange(16.0).reshape(8, 2)
    with jax.set_mesh(mesh):
        laid = jax.jit(lambda x: constrain(x, "rows", None))(x)
    np.testing.assert_array_equal(laid, x)
    assert laid.sharding.is_equivalent_to(row_sharding(mesh), 2)
    assert laid.sharding.shard_shape(x.shape) == (2, 2)


@pytest.mark.parametrize("tensor", [4, 8])
def test_gathering_for_sampling_keeps_tensor_and_casts(tensor, tiny_config, lively_params):
    """Over the tensor axis of the mesh, or over more devices, which are then the sampler's tensor axis."""
    model = Transformer(tiny_config())
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    axes, own = model.logical_axes(), sampling_mesh(mesh, tensor)
    params = jax.device_put(lively_params(model), model.shardings(mesh))
    with jax.set_mesh(own):
        gathered = jax.jit(lambda p: gather_for_sampling(p, axes, jnp.bfloat16, mesh))(params)

    def check(path: Any, leaf: jax.Array, whole: jax.Array) -> None:
        kept = path[-1].key == "scale"  # of a norm, which is computed in float32
        assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16)
        np.testing.assert_array_equal(leaf, whole.astype(leaf.dtype), err_msg=str(path))
        assert leaf.size == leaf.addressable_shards[0].data.size * (1 if kept else tensor), path

    jax.tree_util.tree_map_with_path(check, gathered, params)
    up = gathered["layers"]["mlp"]["up"]["weight"]
    assert up.sharding.is_equivalent_to(NamedSharding(own, PartitionSpec(None, "tensor", None)), 3)


def test_devices_without_memory_of_their_host_are_told():
    class Device:
        device_kind = "abacus"

        def addressable_memories(self) -> list[Any]:
            return [SimpleNamespace(kind="device"), SimpleNamespace(kind="unpinned_host")]

    check_host_memory(make_mesh(), "a=b", "a=c")  # CPUs have
    with pytest.raises(
        ValueError, match=r"^a=b needs .*'pinned_host'.*'abacus' have only device, unpin.*: choose a=c$"
    ):
        check_host_memory(cast(Any, SimpleNamespace(devices=np.array([Device()]))), "a=b", "a=c")


def test_weights_go_to_the_samplers_layout_without_being_gathered_whole(tiny_config):
    """From fsdp 8 to tensor 4: no device receives more than the quarter of a weight that it is to hold."""
    model, mesh = Transformer(tiny_config()), make_mesh(MeshConfig(fsdp=8))
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.abstract_params(),
        model.shardings(mesh),
    )
    own = sampling_mesh(mesh, 4)
    with jax.set_mesh(own):
        gather = jax.jit(lambda p: gather_for_sampling(p, model.logical_axes(), jnp.float32, mesh))
        text = gather.lower(params).compile().as_text()
    kinds = re.findall(r" = .*? (all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    gathered = re.findall(r" = f32\[([\d,]+)\]\S* all-gather\(", text)
    assert kinds.count("all-to-all") == len(gathered) == 8 and set(kinds) == {"all-to-all", "all-gather"}
    parts = {math.prod(shape) // 4 for shape in ((64, 32), (2, 32, 32), (2, 16, 32), (2, 48, 32))}
    assert {math.prod(map(int, shape.split(","))) for shape in gathered} == parts


def test_the_samplers_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    own = sampling_mesh(mesh)
    assert dict(own.shape) == {"data": 4, "fsdp": 1, "context": 1, "tensor": 2, "expert": 1}
    np.testing.assert_array_equal(own.devices.flat, mesh.devices.flat)
    assert row_shards(own) == 4 and head_shards(own) == 2
    assert dict(sampling_mesh(mesh, 8).shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 8, "expert": 1}
    for impossible in (1, 3, 6, 16):
        with pytest.raises(
            ValueError, match=rf"sampling\.tensor={impossible} must be a multiple .* tensor=2 that divides"
        ):
            sampling_mesh(mesh, impossible)
    assert row_shards(sampling_mesh(partial_mesh(), 4)) == 2
    with_experts = sampling_mesh(make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2)))
    assert row_shards(with_experts) == 4 and with_experts.shape["expert"] == 1


# ---- Several slices -------------------------------------------------------------------------------


class FakeDevice(SimpleNamespace):
    """What a mesh asks of a TPU of one of several slices."""

    __hash__ = object.__hash__


def two_slices() -> list[Any]:
    """Two slices of four chips, dealt out as a runtime may list them: by turns."""
    return [
        FakeDevice(id=10 * part + chip, slice_index=part, process_index=part, platform="cpu", device_kind="cpu")
        for chip in range(4)
        for part in range(2)
    ]


@pytest.mark.parametrize(
    "config", [MeshConfig(data=2), MeshConfig(data=4, tensor=2, fsdp=1), MeshConfig(data=2, fsdp=2, tensor=2)], ids=repr
)
def test_data_alone_goes_from_slice_to_slice(config: MeshConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(sharding, "Mesh", lambda devices, *_, **__: made.append(devices))
    make_mesh(config, two_slices())
    (devices,) = made
    sizes = config.sizes(8)
    assert devices.shape == tuple(sizes[axis] for axis in MESH_AXES)
    of_slice = np.vectorize(lambda device: device.slice_index)(devices)
    for row, first in enumerate(of_slice[:, 0, 0, 0, 0]):
        assert (of_slice[row] == first).all() and first == row // (sizes["data"] // 2)


def test_slices_that_data_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the devices are 2 slices, .* set mesh.data=2, .* instead of 1"):
        make_mesh(MeshConfig(), two_slices())
