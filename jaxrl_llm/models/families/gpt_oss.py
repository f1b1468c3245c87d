"""GPT-OSS: windows in every second layer, sinks beside the scores, biases everywhere, experts in fused tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxrl_llm.models.config import ExpertsConfig, ModelConfig
from jaxrl_llm.models.entries import Json, require
from jaxrl_llm.models.families.base import (
    DECODER_NAMES,
    Family,
    plain_logits,
    read_decoder,
    read_kinds,
    read_sliding,
    single_window,
    write_decoder,
    write_layer_types,
)
from jaxrl_llm.models.operands import SWIGLU_LIMIT, SWIGLU_SLOPE

_MLP = "model.layers.{layer}.mlp."
_ROPE = {  # of transformers, where config.json does not say
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
    "rope_theta": 150_000.0,
}


def _read(config: Json) -> ModelConfig:
    if (config.get("quantization_config") or {}).get("quant_method") == "mxfp4":  # read as plain numbers
        config = {**config, "quantization_config": None}
    for key, known in (("swiglu_alpha", SWIGLU_SLOPE), ("swiglu_limit", SWIGLU_LIMIT)):
        if config.get(key) not in (None, known):
            raise ValueError(f"{key}={config[key]} is not implemented: GPT-OSS has {known}")
    defaults = {"attention_bias": True, "rms_norm_eps": 1e-5, "head_dim": 64, "sliding_window": 128}
    config = {**defaults, "rope_theta": _ROPE["rope_theta"], **config}
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config["rope_parameters"] = _ROPE
    sliding = read_sliding(config, lambda layer: layer % 2 == 0)
    kinds = read_kinds(config, [config["sliding_window"] if has else None for has in sliding])
    experts = ExpertsConfig(
        count=require(config, "num_local_experts" if "num_local_experts" in config else "num_experts"),
        per_token=require(config, "num_experts_per_tok"),
        width=require(config, "intermediate_size"),
        bias=True,
    )
    return ModelConfig(
        **read_decoder(config),
        layer_kinds=tuple(dataclasses.replace(kind, activation="clamped_swiglu", experts=True) for kind in kinds),
        experts=experts,
        attention_bias=config["attention_bias"],
        output_bias=config["attention_bias"],
        attention_sinks=True,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.experts is not None
    return {
        **write_decoder(config),
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "layer_types": write_layer_types(config),
        "sliding_window": next((kind.window for kind in config.layer_kinds if kind.window is not None), None),
        "num_local_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "output_router_logits": False,
        "swiglu_alpha": SWIGLU_SLOPE,
        "swiglu_limit": SWIGLU_LIMIT,
    }


def _expresses(config: ModelConfig) -> bool:
    kinds = {dataclasses.replace(kind, window=None) for kind in config.layer_kinds}
    (kind, *others), experts = kinds, config.experts
    return (
        config.attention_sinks
        and not others
        and (kind.norms, kind.activation, kind.experts) == ("pre", "clamped_swiglu", True)
        and kind.rope is not None
        and kind.rope.partial == 1
        and experts is not None
        and (experts.bias, experts.normalize, experts.shared, experts.width) == (True, True, None, config.mlp_dim)
        and single_window(config)
        and config.attention_bias == config.output_bias
        and not config.qk_norm
        and plain_logits(config)
    )


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    _read,
    _write,
    _expresses,
    {path: tensor for path, tensor in DECODER_NAMES.items() if ".mlp." not in path}
    | {
        "layers.attention.sinks": "model.layers.{layer}.self_attn.sinks",
        "layers.experts.router.weight": _MLP + "router.weight",
        "layers.experts.router.bias": _MLP + "router.bias",
        "layers.experts.gate.weight": _MLP + "experts.gate_up_proj[..., 0::2].mT",
        "layers.experts.gate.bias": _MLP + "experts.gate_up_proj_bias[..., 0::2]",
        "layers.experts.up.weight": _MLP + "experts.gate_up_proj[..., 1::2].mT",
        "layers.experts.up.bias": _MLP + "experts.gate_up_proj_bias[..., 1::2]",
        "layers.experts.down.weight": _MLP + "experts.down_proj.mT",
        "layers.experts.down.bias": _MLP + "experts.down_proj_bias",
    },
)
"""The shares of a token's experts are a softmax among themselves; gate and up are clamped (`operands.py`)."""
