"""GPT-OSS beside PyTorch: what other families do not have, by every loop of the sampler and on meshes; gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm.models.checkpoints.hf import WEIGHTS, write_weights
from jaxrl_llm.models.checkpoints.mxfp4 import Unpacked
from jaxrl_llm.models.checkpoints.peft import load_adapters, load_lora_config, save_adapters
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained, load_config, load_params, save_pretrained
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.models.families import family_for, family_of
from jaxrl_llm.models.families.gpt_oss import GPT_OSS
from jaxrl_llm.models.lora import add_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh

CASE = "gpt_oss_long"


@pytest.fixture
def torch_model(golden_module: Any, tmp_path: Path) -> Any:
    """The golden case, which lies in a folder, too."""
    pytest.importorskip("torch", reason="PyTorch is needed only to compare with it: pip install -e '.[parity]'")
    model = golden_module.torch_model(CASE)
    model.save_pretrained(tmp_path / "torch")
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        pytest.param({}, {}, marks=pytest.mark.slow),
        ({"slots": 3, "attention": "xla"}, {}),
        pytest.param(
            *({"slots": 3, "attention": "pallas_interpret", "speculate": "prompt", "speculative_tokens": 2}, {}),
            marks=pytest.mark.slow,
        ),
        pytest.param({"slots": 3, "attention": "pallas_interpret"}, {"fsdp": 2, "tensor": 4}, marks=pytest.mark.slow),
    ],
    ids=["together", "slots", "kernel, drafts", "kernel, mesh"],
)
def test_greedy_texts_are_those_of_generate(settings, sizes, torch_model, golden_module, tmp_path):
    import torch

    transformer, params = from_pretrained(tmp_path / "torch")
    batch = golden_module.tokens(CASE)
    mesh = make_mesh(MeshConfig(**sizes)) if sizes else make_mesh(devices=jax.devices()[:1])
    sampling = SamplingConfig(max_tokens=8, temperature=0.0, **settings)
    sampler = Sampler(transformer, sampling, group=2, stop_tokens=(), mesh=mesh)
    params = jax.device_put(params, transformer.shardings(mesh))
    rollout = sampler(params, batch["prompt"], batch["prompt_lengths"], np.zeros(2, np.uint32), 0)
    for prompt, length, ours in zip(batch["prompt"], batch["prompt_lengths"], rollout.completion, strict=True):
        ids = torch.tensor(prompt[None, :length].astype(np.int64))
        ways = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
        theirs = torch_model.generate(ids, attention_mask=torch.ones_like(ids), **ways)[0, length:]
        np.testing.assert_array_equal(ours, np.broadcast_to(theirs.numpy(), (2, 8)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("attention", ["dense", pytest.param("blockwise", marks=pytest.mark.slow)])
def test_gradients_are_those_of_pytorch(attention, torch_model, golden_module, tmp_path):
    """Of every parameter, written as a checkpoint's tensors are."""
    import torch

    config = load_config(tmp_path / "torch")
    model = Transformer(dataclasses.replace(config, attention=attention))
    tokens = golden_module.tokens(CASE)["prompt"]
    weights = np.random.default_rng(0).normal(size=(*tokens.shape, 48)).astype(np.float32) / tokens.size
    (torch_model(torch.tensor(tokens.astype(np.int64))).logits * torch.tensor(weights)).sum().backward()

    params = load_params(tmp_path / "torch", model)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(model.logits(params, tokens) * weights)))(params)
    write_weights(tmp_path, gradient, GPT_OSS.tensor_names, model.stack)
    ours = load_file(tmp_path / WEIGHTS)
    for name, p in torch_model.named_parameters():
        expected = p.grad.numpy()
        np.testing.assert_allclose(
            ours.pop(name), expected, atol=3e-5 * max(1, np.abs(expected).max()), rtol=1e-4, err_msg=name
        )
        assert not name.endswith("sinks") or np.abs(expected).max() > 1e-3
    assert not ours


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"expert": 2, "context": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"expert": 4, "tensor": 2}, marks=pytest.mark.slow),
        {"fsdp": 2, "context": 2, "tensor": 2},
    ],
    ids=str,
)
def test_eight_devices_compute_what_one_does(sizes, checkpoint, golden_module):
    """Biases of experts, which devices sum parts of, are added once; sinks go with their heads."""
    transformer, params = from_pretrained(checkpoint(CASE))
    model = Transformer(dataclasses.replace(transformer.config, attention="blockwise"))
    tokens = golden_module.tokens(CASE)["prompt"]
    weights = np.random.default_rng(0).normal(size=(*tokens.shape, 48)).astype(np.float32) / tokens.size
    both = jax.value_and_grad(lambda params: jnp.sum(model.logits(params, tokens) * weights))
    value, slopes = jax.jit(both)(params)
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    with jax.set_mesh(mesh):
        shardings = model.shardings(mesh)
        found, ours = jax.jit(both, out_shardings=(None, shardings))(jax.device_put(params, shardings))
    np.testing.assert_allclose(found, value, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-6), ours, slopes)


@pytest.mark.slow
def test_adapters_are_merged_and_written(checkpoint, golden_module, tmp_path):
    tokens, folder = golden_module.tokens(CASE)["prompt"][:, :9], checkpoint(CASE)
    for targets in (("query", "output"), ("value", "gate", "up", "down")):
        lora = LoraConfig(rank=2, targets=targets)
        model = Transformer(dataclasses.replace(load_config(folder), lora=lora))
        params = add_adapters(load_params(folder, model), model, jax.random.key(0))
        params = jax.tree.map_with_path(
            lambda path, leaf: 0.2 * jnp.ones_like(leaf) if path[-1].key == "lora_b" else leaf, params
        )
        plain, merged = from_pretrained(save_pretrained(tmp_path / targets[0], model, params))
        expected = jax.jit(model.logits)(params, tokens)
        np.testing.assert_allclose(jax.jit(plain.logits)(merged, tokens), expected, atol=1e-4)
        assert jnp.max(jnp.abs(jax.jit(plain.logits)(load_params(folder, plain), tokens) - expected)) > 0.01
        written = save_adapters(tmp_path / f"adapters_{targets[0]}", model, params)
        again = Transformer(dataclasses.replace(model.config, lora=load_lora_config(written, plain.config)))
        found = load_adapters(written, again, load_params(folder, again))
        np.testing.assert_allclose(jax.jit(again.logits)(found, tokens), expected, atol=1e-4)


def test_mxfp4_is_read_as_the_numbers_it_stands_for(checkpoint, golden_tensors):
    """Bytes as transformers unpacks them; the experts' other tensors may be plain."""
    torch = pytest.importorskip("torch", reason="PyTorch is needed only to compare with it")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng, plain, packed = np.random.default_rng(0), golden_tensors(CASE), golden_tensors(CASE)
    for name in [name for name in plain if name.endswith("gate_up_proj")]:
        experts, inner, out = packed.pop(name).shape
        blocks = rng.integers(0, 256, (experts, out, inner // 32, 16), np.uint8)
        scales = rng.integers(118, 126, blocks.shape[:-1], np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(*map(torch.tensor, (blocks, scales))).float().numpy()
    expected = from_pretrained(checkpoint(CASE, tensors=plain))[1]
    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    found = from_pretrained(checkpoint(CASE, config=quantised, tensors=packed))[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_part_of_mxfp4_is_read_by_itself():
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (2, 6, 3, 16), np.uint8), rng.integers(100, 130, (2, 6, 3), np.uint8)

    class Source:
        stored: ClassVar = {"x_blocks": blocks, "x_scales": scales}
        shapes: ClassVar = {name: array.shape for name, array in stored.items()}

        def read(self, name: str, index: Any) -> np.ndarray:
            return self.stored[name][index]

    source = Unpacked(Source())
    assert source.shapes == {"x": (2, 96, 6)}
    part = (slice(1, 2), slice(40, 71), slice(2, 5))
    whole = source.read("x", (slice(None),) * 3)
    np.testing.assert_array_equal(source.read("x", part), whole[part])


def test_known_checkpoint():
    """gpt-oss-20b, as its model card counts it: 20.9 billion, 3.6 of them active (the embedding not counted)."""
    entries = {
        **{"model_type": "gpt_oss", "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880},
        **{"num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64},
        **{"num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4, "sliding_window": 128},
        **{"max_position_embeddings": 131_072, "initial_context_length": 4096, "attention_bias": True},
        **{"rms_norm_eps": 1e-5, "rope_theta": 150_000, "hidden_act": "silu", "swiglu_limit": 7.0},
        "rope_scaling": {
            **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
            **{"rope_type": "yarn", "truncate": False},
        },
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    }
    config = family_of(entries).read_config(entries)
    assert config.num_parameters == 20_914_757_184
    assert [kind.window for kind in config.layer_kinds] == [128, None]
    assert family_for(config) == GPT_OSS
    without = {key: value for key, value in entries.items() if key not in ("rope_scaling", "layer_types")}
    assert family_of(without).read_config(without) == config  # transformers' defaults
    published = {**entries, "quantization_config": {"quant_method": "mxfp4"}}
    assert family_of(published).read_config(published) == config
    with pytest.raises(ValueError, match=r"swiglu_limit=5\.0 is not implemented: GPT-OSS has 7.0"):
        family_of(entries).read_config({**entries, "swiglu_limit": 5.0})
    with pytest.raises(ValueError, match="attention_sinks=True"):
        family_for(dataclasses.replace(config, attention_bias=False))


def test_parameters_are_counted(golden_config):
    config = family_of(golden_config(CASE)).read_config(golden_config(CASE))
    assert sum(leaf.size for leaf in jax.tree.leaves(Transformer(config).abstract_params())) == config.num_parameters
