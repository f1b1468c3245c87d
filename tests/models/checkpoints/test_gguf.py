"""GGUF files as llama.cpp's converter writes them."""

from __future__ import annotations

import dataclasses

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jaxrl_llm.models.checkpoints.gguf import GGUFSource
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained, load_config, load_params
from jaxrl_llm.models.config import RopeConfig
from jaxrl_llm.models.integers import with_floats
from jaxrl_llm.models.rope import frequencies
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh, parameter_shardings


def close(config):
    """The configuration with ε as float32, which is what a GGUF file stores."""
    return dataclasses.replace(config, norm_eps=float(np.float32(config.norm_eps)))


@pytest.fixture
def write(tmp_path, gguf_writer, golden_config, golden_tensors):
    def write(case, *, tensors=None, config=None, **options):
        config = {**golden_config(case), **(config or {})}
        return gguf_writer(tmp_path / f"{case}.gguf", config, tensors or golden_tensors(case), **options)

    return write


@pytest.mark.parametrize(
    "case",
    [
        "llama",
        "llama_tied_mha",
        "llama_long",
        "mistral",
        "mistral_window",
        "qwen2",
        "qwen3",
        "qwen3_tied_bias",
        "gemma2",
        "gemma3_long",
        "olmo2",
        "phi3",
        "phi3_longrope",
        "phi3_partial_tied",
        "smollm3",
        "mixtral",
        "qwen3_moe",
        "gpt_oss_long",
    ],
)
def test_equals_the_hugging_face_checkpoint(case, write, checkpoint, golden_tensors):
    """Names, shapes, llama's permuted queries and keys, tied heads, biases; the same configuration.

    Norms are of bfloat16, as in checkpoints of Gemma, so that llama.cpp can add 1 to them and lose nothing.
    """
    changes = {"query_pre_attn_scalar": 8} if case.startswith("gemma") else {}
    tensors = {
        name: value.astype(jnp.bfloat16).astype(np.float32) if "norm" in name else value
        for name, value in golden_tensors(case).items()
    }
    ours, params = from_pretrained(write(case, tensors=tensors, config=changes))
    theirs, expected = from_pretrained(checkpoint(case, tensors=tensors, config=changes))
    if case == "mistral":  # without a window it is a llama in GGUF, and in arithmetic
        assert [kind.window for kind in ours.config.layer_kinds] == [None]
    assert ours.config == theirs.config or close(ours.config) == close(theirs.config)
    chex.assert_trees_all_equal(params, expected)


def test_biases_of_llama_are_permuted_too(write, checkpoint):
    """(llama.cpp knows no tanh-gelu llama: only the weights are compared.)"""
    _, params = from_pretrained(write("llama_biases"))
    chex.assert_trees_all_equal(params, from_pretrained(checkpoint("llama_biases"))[1])


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_quantised_matrices(kind, write, golden_tensors):
    tensors = golden_tensors("llama")
    path = write("llama", kinds={"q_proj": kind, "v_proj": kind, "embed": kind})
    _, params = from_pretrained(path)

    def expected(name):
        return gguf.quants.dequantize(gguf.quants.quantize(tensors[name], kind), kind)

    layer = params["layers"]["attention"]
    np.testing.assert_array_equal(params["embed"]["weight"], expected("model.embed_tokens.weight"))
    # blocks run along rows, so that the permutation of rows commutes with quantisation
    for index in range(2):
        name = f"model.layers.{index}.self_attn.q_proj.weight"
        np.testing.assert_array_equal(layer["query"]["weight"][index], expected(name))
        error = np.abs(np.asarray(layer["query"]["weight"][index]) - tensors[name]).max()
        assert 0 < error < 0.1
    assert GGUFSource(path).shapes["blk.0.attn_q.weight"] == (32, 32)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.MXFP4])
def test_quantised_experts(kind, write, golden_tensors):
    """Expert by expert, and a part of them on each device."""
    path, tensors = write("gpt_oss_long", kinds={"experts.gate_proj.weight": kind}), golden_tensors("gpt_oss_long")
    model, params = from_pretrained(path)
    gate = np.stack([tensors[f"model.layers.{i}.mlp.experts.gate_up_proj"][..., ::2].swapaxes(1, 2) for i in range(3)])
    expected = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(gate), kind), kind)
    np.testing.assert_array_equal(params["layers"]["experts"]["gate"]["weight"], expected)
    cut = load_params(path, model, model.shardings(make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))))
    chex.assert_trees_all_equal(cut, params)


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.Q8_0, "int8"), (Kind.Q4_1, "int4"), (Kind.Q4_0, "int4")])
def test_experts_in_blocks_are_kept_as_they_are(kind, dtype, write, golden_module, golden_tensors):
    tensors = {
        name: golden_module.tensor(name, [32 if size == 24 else size for size in value.shape])
        for name, value in golden_tensors("qwen3_moe").items()
    }
    config = {"moe_intermediate_size": 32}
    path = write("qwen3_moe", config=config, tensors=tensors, kinds={"experts": kind})
    plain, floats = from_pretrained(path)
    model = Transformer(dataclasses.replace(plain.config, base_dtype=dtype))
    kept = with_floats(load_params(path, model), "float32")
    for name in ("gate", "up", "down"):
        ours, theirs = (params["layers"]["experts"][name]["weight"] for params in (kept, floats))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants(kind, tmp_path):
    """Written block by block: the package reads these types, but does not write them."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.RandomState(int(kind))
    data = random.randint(0, 0x3C, (8, 2 * size)).astype(np.uint8)  # any two bytes are a float16 below 2
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_head_count(2)
    for name in ("blk.0.ffn_up.weight", "blk.0.attn_q.weight"):
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    source = GGUFSource(tmp_path / "k.gguf")
    whole = (slice(None), slice(None))
    up = source.read("blk.0.ffn_up.weight", whole)
    assert source.shapes["blk.0.ffn_up.weight"] == up.shape == (8, 2 * block)
    np.testing.assert_array_equal(up, gguf.quants.dequantize(data, kind))
    assert np.isfinite(up).all() and up.std() > 0
    np.testing.assert_array_equal(source.read("blk.0.ffn_up.weight", (slice(2, 5), slice(7, 300))), up[2:5, 7:300])
    query = source.read("blk.0.attn_q.weight", whole)
    np.testing.assert_array_equal(query, up[[0, 2, 1, 3, 4, 6, 5, 7]])  # two heads of four rows
    np.testing.assert_array_equal(source.read("blk.0.attn_q.weight", (slice(1, 6), whole[1])), query[1:6])


def test_sharded(write, checkpoint, mesh):
    path = write("llama", kinds={"q_proj": Kind.Q8_0})

    def shardings(transformer):
        return parameter_shardings(mesh, transformer.logical_axes(), transformer.abstract_params())

    chex.assert_trees_all_equal(from_pretrained(path, shardings=shardings)[1], from_pretrained(path)[1])


# ---------------------------------------------------------------- rope


@pytest.mark.parametrize(("factor", "length"), [(8.0, 8192), (32.0, 8192), (4.0, 2048)])
def test_llama3_scaling_is_read_from_its_table(factor, length, write):
    theta, head_dim = 500_000.0, 8
    rope = RopeConfig(theta, "llama3", factor, length, 1.0, 4.0)
    table = frequencies(RopeConfig(theta), head_dim)[0] / frequencies(rope, head_dim)[0]

    def extra(writer):
        writer.add_tensor("rope_freqs.weight", table.astype(np.float32))

    config = load_config(write("llama", config={"rope_parameters": {"rope_theta": theta}}, extra=extra))
    (read,) = (kind.rope for kind in config.layer_kinds)
    np.testing.assert_allclose(frequencies(read, head_dim)[0], frequencies(rope, head_dim)[0], rtol=1e-6)
    assert read.scaling == "llama3" and read.factor == factor


def test_llama3_table_with_other_parameters_is_refused(write):
    def extra(writer):
        writer.add_tensor("rope_freqs.weight", np.array([1, 3, 8, 2], np.float32))

    with pytest.raises(ValueError, match=r"rope_freqs\.weight is no Llama 3 scaling"):
        load_config(write("llama", extra=extra))


def test_yarn_and_linear(write):
    def yarn(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    def linear(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    assert load_config(write("qwen2", extra=yarn)).layer_kinds[0].rope == RopeConfig(10_000.0, "yarn", 4.0, 16)
    assert load_config(write("llama", extra=linear)).layer_kinds[0].rope == RopeConfig(10_000.0, "linear", 4.0)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_count", 8, r"mixtures of experts \(expert_count=8\)"),
        ("rope.scaling.type", "longrope", "'longrope'"),
        ("rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor=0.5"),
        ("attention.sliding_window", 16, "sliding window"),
    ],
)
def test_what_is_not_implemented_is_named(key, value, message, write):
    def extra(writer):
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"qwen2.{key}", value)
        if key.startswith("rope"):
            writer.add_rope_scaling_factor(2.0)
            if key != "rope.scaling.type":
                writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)

    with pytest.raises(ValueError, match=message):
        load_config(write("qwen2", extra=extra))


def test_partial_rotation_is_refused(write):
    path = write("qwen2")
    data = path.read_bytes()
    key = b"qwen2.rope.dimension_count"
    at = data.index(key) + len(key) + 4
    path.write_bytes(data[:at] + (4).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5"):
        load_config(path)


def test_unknown_architecture_lists_the_known(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="'gpt2' is not supported; known: llama, qwen2, qwen3, qwen3moe"):
        from_pretrained(tmp_path / "x.gguf")


def test_unknown_quantisation(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor(
        "token_embd.weight", np.zeros((4, gguf.GGML_QUANT_SIZES[Kind.Q8_1][1]), np.uint8), raw_dtype=Kind.Q8_1
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"Q8_1 \(of 'token_embd\.weight'\)"):
        from_pretrained(tmp_path / "x.gguf")


def test_missing_tensor_is_named(write, golden_tensors):
    tensors = golden_tensors("llama")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"llama\.gguf.*missing tensors: blk\.1\.ffn_up\.weight"):
        from_pretrained(write("llama", tensors=tensors))


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 2000, -4])
def test_truncated_file(keep, write):
    path = write("llama")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"llama\.gguf is truncated or no GGUF file"):
        from_pretrained(path)


def test_a_file_that_changed_is_read_again(write, golden_tensors):
    path = write("llama")
    _, first = from_pretrained(path)
    path.unlink()
    write("llama", tensors={name: 2 * value for name, value in golden_tensors("llama").items()})
    chex.assert_trees_all_equal(from_pretrained(path)[1], jax.tree.map(lambda leaf: 2 * leaf, first))
