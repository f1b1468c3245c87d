"""What llama.cpp's converter makes of each architecture: names of tensors, what it changes in them, what it leaves out.

What a `config.json` says and the metadata do not, llama.cpp itself takes as given, and so do we.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from jaxrl_llm.models.config import RopeConfig
from jaxrl_llm.models.rope import frequencies

TENSOR_NAMES: Mapping[str, str] = {
    "embed.weight": "token_embd.weight",
    "layers.attention_norm.scale": "blk.{layer}.attn_norm.weight",
    "layers.attention_post_norm.scale": "blk.{layer}.post_attention_norm.weight",
    "layers.attention.query.weight": "blk.{layer}.attn_q.weight",
    "layers.attention.query.bias": "blk.{layer}.attn_q.bias",
    "layers.attention.query_norm.scale": "blk.{layer}.attn_q_norm.weight",
    "layers.attention.key.weight": "blk.{layer}.attn_k.weight",
    "layers.attention.key.bias": "blk.{layer}.attn_k.bias",
    "layers.attention.key_norm.scale": "blk.{layer}.attn_k_norm.weight",
    "layers.attention.value.weight": "blk.{layer}.attn_v.weight",
    "layers.attention.value.bias": "blk.{layer}.attn_v.bias",
    "layers.attention.output.weight": "blk.{layer}.attn_output.weight",
    "layers.attention.output.bias": "blk.{layer}.attn_output.bias",
    "layers.mlp_norm.scale": "blk.{layer}.ffn_norm.weight",
    "layers.mlp_post_norm.scale": "blk.{layer}.post_ffw_norm.weight",
    "layers.mlp.gate.weight": "blk.{layer}.ffn_gate.weight",
    "layers.mlp.gate.bias": "blk.{layer}.ffn_gate.bias",
    "layers.mlp.up.weight": "blk.{layer}.ffn_up.weight",
    "layers.mlp.up.bias": "blk.{layer}.ffn_up.bias",
    "layers.mlp.down.weight": "blk.{layer}.ffn_down.weight",
    "layers.mlp.down.bias": "blk.{layer}.ffn_down.bias",
    "layers.experts.router.weight": "blk.{layer}.ffn_gate_inp.weight",
    "layers.experts.gate.weight": "blk.{layer}.ffn_gate_exps.weight",
    "layers.experts.up.weight": "blk.{layer}.ffn_up_exps.weight",
    "layers.experts.down.weight": "blk.{layer}.ffn_down_exps.weight",
    "final_norm.scale": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
"""Parameter → tensor name in a GGUF file; parameters of one name are its rows, as in `Family.tensor_names`."""

_FUSED = {f"layers.attention.{part}.weight": "blk.{layer}.attn_qkv.weight" for part in ("query", "key", "value")}
_FUSED |= {f"layers.mlp.{part}.weight": "blk.{layer}.ffn_up.weight" for part in ("gate", "up")}

_GPT_OSS = {
    "layers.attention.sinks": "blk.{layer}.attn_sinks.weight",
    "layers.mlp_norm.scale": "blk.{layer}.post_attention_norm.weight",
    "layers.experts.router.bias": "blk.{layer}.ffn_gate_inp.bias",
    "layers.experts.gate.bias": "blk.{layer}.ffn_gate_exps.bias",
    "layers.experts.up.bias": "blk.{layer}.ffn_up_exps.bias",
    "layers.experts.down.bias": "blk.{layer}.ffn_down_exps.bias",
}


class File(Protocol):
    """A GGUF file, as far as its architecture reads it."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...

    def get(self, key: str, *default: Any) -> Any:
        """An entry of the architecture's metadata; `ValueError` where it is missing and there is no default."""
        ...

    def table(self, name: str) -> np.ndarray:
        """A tensor of one axis."""
        ...


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture as llama.cpp names it."""

    entries: Callable[[File, dict[str, Any]], dict[str, Any]]
    """The file, and the entries of `config.json` that all architectures have → those that this one has beside them, or
    in their place."""
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: TENSOR_NAMES)
    """Parameter → tensor name."""
    turns_neighbours: bool = False
    """Its rotary embedding turns numbers 2i and 2i + 1 of a head, and not i and i + H/2: queries and keys are
    permuted."""
    norm_offset: float = 0.0
    """Added to the scales of norms."""
    window: bool = False
    """Whether its metadata may have a sliding window."""
    experts: bool = False
    """Whether its layers may be mixtures of experts."""


def decimal(stored: float) -> float:
    """The number that was meant, of one stored in float32: 1e-5 for 9.999999747378752e-06."""
    return float(np.format_float_positional(np.float32(stored)))


def _llama(file: File, config: dict[str, Any]) -> dict[str, Any]:
    """Mistral's file is a Llama's, with a window, and Mixtral's one with experts."""
    window = file.get("attention.sliding_window", 0)
    if file.get("expert_count", 0):
        return {"model_type": "mixtral", "sliding_window": window or None, **_experts(file)}
    entries = {"attention_bias": _has_bias(file), "mlp_bias": "blk.0.ffn_up.bias" in file.shapes}
    return {"model_type": "mistral", "sliding_window": window, **entries} if window else entries


def _has_bias(file: File) -> bool:
    return "blk.0.attn_q.bias" in file.shapes


def _biased(file: File, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": _has_bias(file)}


def _experts(file: File) -> dict[str, Any]:
    return {"num_local_experts": file.get("expert_count"), "num_experts_per_tok": file.get("expert_used_count")}


def _qwen3_moe(file: File, config: dict[str, Any]) -> dict[str, Any]:
    """With experts in each layer, the shares of a token's adding up to 1."""
    return {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": file.get("expert_feed_forward_length"),
        "norm_topk_prob": True,
        **_experts(file),
        **_biased(file, config),
    }


def _gpt_oss(file: File, config: dict[str, Any]) -> dict[str, Any]:
    """Each second layer has a window, the first one, too."""
    return {
        "model_type": "gpt_oss",
        "intermediate_size": file.get("expert_feed_forward_length", config["intermediate_size"]),
        "sliding_window": file.get("attention.sliding_window"),
        "rope_parameters": {**config["rope_parameters"], "truncate": False},
        **_experts(file),
        **_biased(file, config),
    }


def _gemma(file: File, config: dict[str, Any], largest: int) -> dict[str, Any]:
    """Scores are over √H, but in the largest model, which is told by its layers, over √(D/N)."""
    is_largest = config["num_hidden_layers"] == largest
    by_width = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": by_width if is_largest else config["head_dim"], "attention_bias": _has_bias(file)}


def _gemma2(file: File, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_gemma(file, config, 46),
        "sliding_window": file.get("attention.sliding_window", 4096) or None,
        "attn_logit_softcapping": decimal(file.get("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": decimal(file.get("final_logit_softcapping", 30.0)),
    }


def _gemma3(file: File, config: dict[str, Any]) -> dict[str, Any]:
    window, layers = file.get("attention.sliding_window", 0), config["num_hidden_layers"]
    pattern = file.get("attention.sliding_window_pattern", 6) if window else 1
    local = {"rope_type": "default", "rope_theta": file.get("rope.freq_base_swa", 10_000.0)}
    cap = file.get("final_logit_softcapping", 0.0)
    return {
        **_gemma(file, config, 62),
        "model_type": "gemma3_text",
        "sliding_window": window or 4096,
        "layer_types": ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)],
        "final_logit_softcapping": decimal(cap) if cap else None,
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


def _phi3(file: File, config: dict[str, Any]) -> dict[str, Any]:
    original = file.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    rope = config["rope_parameters"]
    if "rope_factors_long.weight" in file.shapes:
        kinds = ("short", "long")
        factors = {f"{kind}_factor": [*map(decimal, file.table(f"rope_factors_{kind}.weight"))] for kind in kinds}
        rope = rope | {"rope_type": "longrope", **factors} | _attention_factor(file, config, original)
    window = file.get("attention.sliding_window", 0) or None
    return {"rope_parameters": rope, "original_max_position_embeddings": original, "sliding_window": window}


def _attention_factor(file: File, config: dict[str, Any], original: int) -> dict[str, float]:
    """The stored multiplier, where it is another than the one that follows from the lengths."""
    factor = config["max_position_embeddings"] / original
    ones = (1.0,) * (config["head_dim"] // 2)
    usual = RopeConfig(1e4, "longrope", max(factor, 1.0), original, short_factors=ones, long_factors=ones)
    derived = frequencies(usual, config["head_dim"])[1]
    stored = file.get("rope.scaling.attn_factor", derived)
    return {} if np.isclose(stored, derived, rtol=1e-6) else {"attention_factor": stored}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_llama, turns_neighbours=True, window=True, experts=True),
    "qwen2": Architecture(lambda file, config: {}),
    "qwen3": Architecture(_biased),
    "qwen3moe": Architecture(_qwen3_moe, experts=True),
    "gemma2": Architecture(_gemma2, norm_offset=1.0, window=True),
    "gemma3": Architecture(_gemma3, norm_offset=1.0, window=True),
    "olmo2": Architecture(_biased),
    "phi3": Architecture(_phi3, {**TENSOR_NAMES, **_FUSED}, window=True),
    "smollm3": Architecture(_biased, turns_neighbours=True),
    "gpt-oss": Architecture(_gpt_oss, {**TENSOR_NAMES, **_GPT_OSS}, window=True, experts=True),
}
"""By name."""
