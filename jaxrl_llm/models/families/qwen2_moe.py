"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, a mixture of small experts, and one that computes every token."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.entries import Json, require
from jaxrl_llm.models.families.base import (
    DECODER_NAMES,
    Family,
    plain_kinds,
    plain_logits,
    read_decoder,
    read_kinds,
    single_window,
    write_decoder,
)
from jaxrl_llm.models.families.qwen2 import read_windows, write_windows
from jaxrl_llm.models.families.qwen3_moe import EXPERT_NAMES, read_mixture, write_mixture

_LAYER = "model.layers.{layer}.mlp."


def _read(config: Json) -> ModelConfig:
    require(config, "num_key_value_heads")
    sizes, windows = read_decoder(config), read_windows(config)
    kinds = read_kinds(config, windows if len(windows) > 1 else windows * sizes["num_layers"])
    mixture = read_mixture(config, kinds)
    shared = require(config, "shared_expert_intermediate_size")
    return ModelConfig(
        **sizes,
        **(mixture | {"experts": dataclasses.replace(mixture["experts"], shared=shared)}),
        attention_bias=config.get("qkv_bias", True),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.experts is not None
    return {
        **write_decoder(config),
        **write_windows(config),
        **write_mixture(config),
        "qkv_bias": config.attention_bias,
        "shared_expert_intermediate_size": config.experts.shared,
    }


def _expresses(config: ModelConfig) -> bool:
    return (
        not config.qk_norm
        and not (config.output_bias or config.mlp_bias)
        and plain_kinds(config, experts=True)
        and config.experts is not None
        and config.experts.shared is not None
        and single_window(config)
        and plain_logits(config)
    )


QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _read,
    _write,
    _expresses,
    {
        **DECODER_NAMES,
        **EXPERT_NAMES,
        "layers.shared.gate.weight": _LAYER + "shared_expert.gate_proj.weight",
        "layers.shared.up.weight": _LAYER + "shared_expert.up_proj.weight",
        "layers.shared.down.weight": _LAYER + "shared_expert.down_proj.weight",
        "layers.shared_gate.weight": _LAYER + "shared_expert_gate.weight",
    },
)
"""Biases on queries, keys and values; a sigmoid says how much of the shared expert is taken."""
