"""Weights kept as integers: what they stand for, and that models with them compute what these floats would."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from jaxrl_llm.config import ModelSource
from jaxrl_llm.device_memory import bytes_per_device
from jaxrl_llm.models.checkpoints.pretrained import load_params, save_pretrained
from jaxrl_llm.models.config import ExpertsConfig, LayerKind, LoraConfig, Params
from jaxrl_llm.models.integers import BLOCK, Blocks, rounded, with_floats, with_whole_blocks
from jaxrl_llm.models.lora import add_adapters, join, merge_adapters, split_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, is_rounded, make_mesh

TOKENS = np.random.default_rng(1).integers(0, 64, (2, 7)).astype(np.int32)
SIZES = {"embed_dim": 64, "mlp_dim": 128, "num_kv_heads": 2, "head_dim": 16, "lora": LoraConfig(rank=3, alpha=6.0)}


@pytest.fixture
def made(tiny_config, lively_params, request):
    """A model with integers, its parameters, and the model of the floats that they stand for with its own."""
    dtype, *mixture = request.param.split()
    plain = Transformer(dataclasses.replace(tiny_config(**SIZES), **(EXPERTS if mixture else {})))
    model = Transformer(dataclasses.replace(plain.config, base_dtype=dtype))
    adapters, base = split_adapters(lively_params(plain))
    params = join(rounded(base, dtype), adapters)
    assert jax.tree.structure(params) == jax.tree.structure(model.abstract_params())
    return model, params, plain, with_floats(params, "float32")


EXPERTS = {
    "experts": ExpertsConfig(count=4, per_token=2, width=96, shared=64, bias=True),
    "layer_kinds": (LayerKind(experts=True),),
}
both = pytest.mark.parametrize("made", ["int8", "int4"], indirect=True)


# ---- The integers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integers_are_the_nearest(dtype):
    weight = np.random.default_rng(0).normal(size=(5, 3 * BLOCK)).astype(np.float32)
    weight[1, :BLOCK] = 0.0
    weight[2, :BLOCK] = 0.25
    blocks = Blocks.of(jnp.asarray(weight), dtype)
    got = np.asarray(blocks.floats(jnp.float32))
    for row in range(5):
        for block in range(3):
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            values = weight[row, place]
            if dtype == "int8":
                low, step, span = 0.0, np.float16(np.abs(values).max() / 127), range(-127, 128)
            else:
                low = np.float16(values.min())
                step, span = np.float16((values.max() - np.float32(low)) / 15), range(16)
            can_be = np.float32(low) + np.float32(step) * np.array(span, np.float32)
            nearest = can_be[np.abs(values[:, None] - can_be).argmin(axis=1)]
            np.testing.assert_allclose(got[row, place], nearest, atol=1e-6)
    assert np.array_equal(got[1, :BLOCK], np.zeros(BLOCK))


@pytest.mark.parametrize(("dtype", "kind"), [("int8", "Q8_0"), ("int4", "Q4_1"), ("int4", "Q4_0")])
def test_blocks_of_a_gguf_file_come_out_as_they_are(dtype, kind):
    weight = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    kind = GGMLQuantizationType[kind]
    theirs = dequantize(quantize(weight, kind), kind)
    ours = np.asarray(Blocks.of(jnp.asarray(theirs), dtype).floats(jnp.float32))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_rows_must_be_whole_blocks(tiny_config):
    with pytest.raises(ValueError, match=r"blocks of 32 .* rows of 48"):
        Transformer(tiny_config(base_dtype="int8", lora=LoraConfig(rank=2))).abstract_params()


# ---- Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["int8", "int4", "int4 experts"], indirect=True)
def test_a_model_computes_what_its_floats_would(made):
    model, params, plain, floats = made

    def loss(adapters: Params, model: Transformer, params: Params) -> jax.Array:
        return jnp.sum(jnp.sin(model.logits(join(split_adapters(params)[1], adapters), TOKENS)))

    one, other = (jax.jit(m.logits)(p, TOKENS) for m, p in ((model, params), (plain, floats)))
    np.testing.assert_allclose(one, other, atol=2e-5)
    adapters = split_adapters(params)[0]
    gradients = [
        jax.jit(jax.grad(loss), static_argnums=1)(adapters, m, p) for m, p in ((model, params), (plain, floats))
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * max(1, float(jnp.abs(theirs).max())))


@pytest.mark.parametrize(
    ("made", "sizes"),
    [
        ("int4", {"fsdp": 2, "tensor": 4}),
        ("int4", {"fsdp": 8}),
        ("int8", {"tensor": 8}),
        ("int4", {"tensor": 8}),
        ("int4 experts", {"expert": 2, "fsdp": 4}),
        ("int8 experts", {"expert": 2, "tensor": 4}),
    ],
    indirect=["made"],
    ids=str,
)
def test_on_eight_devices(made, sizes):
    """Heads of keys and values that are repeated; 2 blocks on 8 devices, which gather them; 4, which all read some."""
    model, params, _, floats = made
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    on_mesh = jax.device_put(params, model.shardings(mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(model.logits)(on_mesh, TOKENS)
    np.testing.assert_allclose(got, jax.jit(model.logits)(params, TOKENS), atol=2e-5)
    whole, own = ([leaf for leaf in jax.tree.leaves(tree) if is_rounded(leaf.dtype)] for tree in (params, on_mesh))
    assert bytes_per_device(own) == bytes_per_device(whole) / 8
    if mesh.shape["tensor"] == 8:
        with jax.set_mesh(mesh):
            parted = jax.jit(with_whole_blocks)(on_mesh)
        scale = parted["layers"]["mlp"]["down"]["weight_scale"]
        assert scale.shape == (2, 8, 64) and scale.sharding.shard_shape(scale.shape) == (2, 1, 64)
        jax.tree.map(np.testing.assert_array_equal, with_floats(parted, "float32"), floats)


@pytest.mark.parametrize("made", ["int4"], indirect=True)
def test_sampling_is_that_of_the_floats(made):
    model, params, plain, floats = made
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = SamplingConfig(max_tokens=6, temperature=0, slots=2)
    given = TOKENS, np.array([7, 5]), np.zeros(2, np.uint32), 0
    ours, theirs = (
        Sampler(m, config, group=2, stop_tokens=(0,), mesh=mesh)(p, *given)
        for m, p in ((model, params), (plain, floats))
    )
    assert np.array_equal(ours.completion, theirs.completion)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        (None, {}),
        ({"tensor": 8, "fsdp": 1}, {}),
        pytest.param({"fsdp": 4, "tensor": 2}, {}, marks=pytest.mark.slow),
        pytest.param({"expert": 2, "tensor": 4}, EXPERTS, marks=pytest.mark.slow),
    ],
    ids=["one device", "tensor", "fsdp", "experts"],
)
def test_a_sampler_may_round_the_weights(tiny_config, lively_params, sizes, changes):
    """Merged with their adapters: it draws as a model of the rounded weights does, and tells its log-probs."""
    model = Transformer(dataclasses.replace(tiny_config(**SIZES), **changes))
    params, devices = lively_params(model), jax.devices() if sizes else jax.devices()[:1]
    mesh = make_mesh(MeshConfig(**sizes or {}), devices)
    on_mesh = jax.device_put(params, model.shardings(mesh))
    settings = SamplingConfig(max_tokens=6, slots=1)
    given = np.tile(TOKENS, (2, 1)), np.array([7, 5, 6, 7]), np.zeros(2, np.uint32), 0

    def sampled(model: Transformer, params: Params, mesh: Any, **changes: Any) -> Any:
        config = dataclasses.replace(settings, **changes)
        return Sampler(model, config, group=2, stop_tokens=(0,), mesh=mesh)(params, *given)

    ours = sampled(model, on_mesh, mesh, weights_dtype="int8")
    integers = rounded(merge_adapters(params, model.config), "int8")
    theirs = sampled(model.rounded("int8"), integers, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert np.array_equal(ours.completion, theirs.completion)
    np.testing.assert_allclose(ours.sampler_logprobs, theirs.sampler_logprobs, atol=1e-4)
    exact = sampled(model, on_mesh, mesh)
    assert not np.array_equal(ours.sampler_logprobs, exact.sampler_logprobs)
    sampler, less = (
        Sampler(model, dataclasses.replace(settings, weights_dtype=dtype), group=2, stop_tokens=(), mesh=mesh)
        for dtype in (None, "int8")
    )
    name = "the sampler's own weights"
    assert sizes is None or less.footprint(4, 7).needs(1)[name] < 0.6 * sampler.footprint(4, 7).needs(1)[name]


@both
def test_checkpoints_are_read_to_integers_and_written_as_floats(made, tmp_path, lively_params):
    model, _, plain, _ = made
    base = lively_params(plain.base)
    save_pretrained(tmp_path / "base", plain.base, base)
    told: list[int] = []
    loaded = load_params(tmp_path / "base", model, told=told.append)
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded(base, model.config.base_dtype))
    assert sum(told) == bytes_per_device(plain.base.abstract_params())
    cut = load_params(tmp_path / "base", model, model.shardings(make_mesh(MeshConfig(fsdp=8))))
    jax.tree.map(np.testing.assert_array_equal, cut, loaded)
    up = cut["layers"]["mlp"]["up"]
    assert [leaf.sharding.shard_shape(leaf.shape)[1:] for leaf in (up["weight"], up["weight_scale"])] == [
        (up["weight"].shape[-2] // 8, 128),
        (2, 16),  # rows, for there are 2 blocks in each
    ]

    params = add_adapters(loaded, model, jax.random.key(0))
    save_pretrained(tmp_path / "merged", model, params)
    again = load_params(tmp_path / "merged", plain.base)
    jax.tree.map(np.testing.assert_array_equal, again, merge_adapters(params, model.config))


def test_memory_of_four_bits(tiny_config):
    sizes = {"embed_dim": 512, "mlp_dim": 2048, "head_dim": 64, "vocab_size": 512, "num_layers": 4}
    plain, rounded = (
        bytes_per_device(Transformer(tiny_config(**sizes, base_dtype=dtype)).abstract_params()["layers"])
        for dtype in (None, "int4")
    )
    assert rounded / plain == pytest.approx((0.5 + 2 * 2 / BLOCK) / 4, rel=0.01)


def test_what_is_not_trained_needs_adapters(tiny_config):
    with pytest.raises(ValueError, match=r"model\.base_dtype=int4.*--model\.lora\.rank"):
        ModelSource(path="x", base_dtype="int4")
    with pytest.raises(ValueError, match="int3"):
        tiny_config(base_dtype="int3")
    model = Transformer(tiny_config(**SIZES, base_dtype="int8"))
    with pytest.raises(ValueError, match=r"sampling\.weights_dtype=int4 is not for model\.base_dtype"):
        Sampler(model, SamplingConfig(weights_dtype="int4"), group=2, stop_tokens=(), mesh=make_mesh())
