"""Which family an unknown checkpoint is nearest to: by its name, which tells the generation, or by its settings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jaxrl_llm.checks import nearest_name
from jaxrl_llm.models.entries import Json, shown

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_FOREIGN = {
    "kv_lora_rank": "keys and values of a low rank",
    "parallel_attn": "attention and MLP side by side",
    "use_parallel_residual": "attention and MLP side by side",
    "alibi": "distances in place of rotations",
    "layer_norm_eps": "LayerNorm in place of RMSNorm",
    "layer_norm_epsilon": "LayerNorm in place of RMSNorm",
    "logit_scale": "scaled logits",
    "logits_scaling": "scaled logits",
    "residual_multiplier": "scaled halves of layers",
    "n_group": "experts chosen by groups",
    "first_k_dense_replace": "first layers without experts",
    "mamba_d_state": "layers with a state in place of attention",
    "linear_num_value_heads": "layers with a state in place of attention",
    "vision_config": "a model that also sees",
}
"""Entries that no family here has, and what they stand for."""


def nearest(config: Json, names: Sequence[str], alike: int = 3) -> str:
    """Names the nearest family, and what it has not; the end of a sentence.

    Args:
        config: the unknown checkpoint's `config.json`.
        names: `model_type` of each family.
        alike: letters at the beginning that families have in common.
    """
    model_type = str(config.get("model_type"))
    pairs = {name: zip(name, model_type.lower(), strict=False) for name in names}
    begin = {name: len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs[name])]) for name in names}
    best = max(names, key=lambda name: begin[name])
    if begin[best] >= alike:
        by_name = f"; the nearest is {best!r}"
    elif not (by_name := nearest_name(model_type, list(names))):
        by_name = f"; by its settings the nearest is {_by_settings(config)!r}" if len(config) > 2 else ""
    foreign = {what: key for key, what in _FOREIGN.items() if config.get(key) not in (None, False)}
    without = "; ".join(f"{key}={shown(config[key])}, {what}" for what, key in foreign.items())
    return f"{by_name}, which has not {without}" if by_name and without else by_name


def _by_settings(config: Json) -> str:
    if any(config.get(key) for key in _EXPERTS):
        if config.get("shared_expert_intermediate_size") or config.get("n_shared_experts"):
            return "qwen2_moe"
        return "qwen3_moe" if config.get("use_qk_norm") else "mixtral"
    if config.get("final_logit_softcapping"):
        return "gemma2"
    if config.get("use_qk_norm") or config.get("qk_norm"):
        return "qwen3"
    if config.get("sliding_window"):
        return "mistral"
    return "qwen2" if config.get("attention_bias") else "llama"
