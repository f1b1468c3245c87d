from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxrl_llm.models.checkpoints.pretrained import from_pretrained
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="session")
def golden_module() -> ModuleType:
    """make_golden.py: the cases, and the weights and tokens they are made of."""
    spec = importlib.util.spec_from_file_location("make_golden", Path(__file__).with_name("make_golden.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden_tensors(golden_module: ModuleType) -> Callable[[str], dict[str, np.ndarray]]:
    """The tensors of a golden case, by name, as the checkpoint holds them."""

    def tensors(case: str) -> dict[str, np.ndarray]:
        shapes = json.loads((GOLDEN / f"{case}.json").read_text())["tensors"]
        return {name: golden_module.tensor(name, shape) for name, shape in shapes.items()}

    return tensors


@pytest.fixture(scope="session")
def golden_config() -> Callable[[str], dict[str, Any]]:
    """The `config.json` of a golden case, as transformers wrote it."""
    return lambda case: json.loads((GOLDEN / f"{case}.json").read_text())["config"]


@pytest.fixture
def checkpoint(
    tmp_path: Path,
    golden_tensors: Callable[[str], dict[str, np.ndarray]],
    golden_config: Callable[[str], dict[str, Any]],
) -> Callable[..., Path]:
    """Makes a Hugging Face folder of a golden case, its configuration or tensors changed at will."""

    def make(case: str, *, config: dict[str, Any] | None = None, tensors: dict[str, np.ndarray] | None = None) -> Path:
        folder = tmp_path / f"{case}_checkpoint"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**golden_config(case), **(config or {})}))
        save_file(golden_tensors(case) if tensors is None else tensors, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def load_case() -> Callable[[str, Path], tuple[Transformer, Params]]:
    """Loads the folder of a golden case for texts of its length: past its context, longrope is a setting of ours."""

    def load(case: str, folder: Path) -> tuple[Transformer, Params]:
        model, params = from_pretrained(folder)
        return (Transformer(model.config.with_long_rope()) if case.endswith("longrope_long") else model), params

    return load


def _gguf_name(name: str, arch: str, layers: int) -> str:
    """As llama.cpp's converter names a tensor."""
    number = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == arch)
    found = gguf.get_tensor_name_map(number, layers).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of queries and keys: the two halves of a head in turns."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _with_stacked_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As llama.cpp's converter has experts: each projection of all of them in one tensor, `[E, out, in]`."""
    made, experts = {}, {}
    for name, value in tensors.items():
        if one := re.fullmatch(r"model\.(layers\.\d+\.)(mlp|block_sparse_moe)\.experts\.(\d+)\.(.*)", name):
            layer, kind, number, rest = one.groups()
            whole = f"model.{layer}mlp.experts.{rest}" if kind == "mlp" else f"{layer}feed_forward.experts.{rest}"
            experts.setdefault(whole, {})[int(number)] = value
        elif ".experts.gate_up_proj" in name:  # GPT-OSS: columns in turns, and turned over
            turned = value if name.endswith("_bias") else value.swapaxes(1, 2)
            prefix, kind = name.split(".experts.")[0], "bias" if name.endswith("_bias") else "weight"
            made |= {f"{prefix}.experts.{part}_proj.{kind}": turned[:, i::2] for i, part in enumerate(("gate", "up"))}
        elif name.endswith(".experts.down_proj_bias"):
            made[name.replace("_bias", ".bias")] = value
        elif name.endswith(".experts.down_proj"):
            made[f"{name}.weight"] = value.swapaxes(1, 2)
        else:
            made[name + ".weight" * name.endswith("sinks")] = value
    return made | {name: np.stack([found[e] for e in sorted(found)]) for name, found in experts.items()}


_ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
}
_WINDOWS = ("mistral", "mixtral", "gemma2", "gemma3_text", "gpt_oss")


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Writes a checkpoint as llama.cpp's converter does; `kinds`: part of a matrix's name → its type."""
    arch = _ARCHITECTURES.get(config["model_type"], config["model_type"])
    rope = config["rope_parameters"]
    local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    if arch != "phi3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if arch != "llama":
            writer.add_expert_feed_forward_length(config.get("moe_intermediate_size") or config["intermediate_size"])
    if config["model_type"] in _WINDOWS and config["sliding_window"]:
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if local is not None:
        writer.add_sliding_window_pattern(config["layer_types"].index("full_attention") + 1)
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if arch == "phi3":
        original = config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_sliding_window(config["sliding_window"] or 0)
        if rope.get("rope_type") == "longrope":
            factor = config["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
            for kind in ("long", "short"):
                writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))
    extra(writer)
    for name, value in _with_stacked_experts(tensors).items():
        if arch in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            value = _interleave(value, heads if "q_proj" in name else kv_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + np.float32(1)
        kind = gguf.GGMLQuantizationType.F32
        if value.ndim >= 2:
            kind = next((kind for part, kind in (kinds or {}).items() if part in name), kind)
        writer.add_tensor(
            _gguf_name(name, arch, config["num_hidden_layers"]), gguf.quants.quantize(value, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def gguf_writer() -> Callable[..., Path]:
    """`write_gguf`."""
    return write_gguf
