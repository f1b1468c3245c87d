"""Mixtral: Mistral's blocks with a mixture of experts in each layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxrl_llm.models.config import ExpertsConfig, ModelConfig
from jaxrl_llm.models.entries import Json, require
from jaxrl_llm.models.families.base import (
    DECODER_NAMES,
    Family,
    plain_kinds,
    plain_logits,
    read_decoder,
    read_kinds,
    write_decoder,
)

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}."


def _read(config: Json) -> ModelConfig:
    require(config, "num_key_value_heads")
    (kind,) = read_kinds(config, (config.get("sliding_window"),))
    experts = ExpertsConfig(
        count=require(config, "num_local_experts"),
        per_token=require(config, "num_experts_per_tok"),
        width=require(config, "intermediate_size"),
    )
    return ModelConfig(**read_decoder(config), layer_kinds=(dataclasses.replace(kind, experts=True),), experts=experts)


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.experts is not None
    return {
        **write_decoder(config),
        "head_dim": None if config.head_dim * config.num_heads == config.embed_dim else config.head_dim,
        "sliding_window": config.layer_kinds[0].window,
        "num_local_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
    }


def _expresses(config: ModelConfig) -> bool:
    return (
        not config.qk_norm
        and len(config.layer_kinds) == 1
        and plain_kinds(config, experts=True)
        and config.experts is not None
        and config.experts.normalize
        and config.experts.shared is None
        and config.experts.width == config.mlp_dim
        and not (config.attention_bias or config.output_bias or config.mlp_bias)
        and plain_logits(config)
    )


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _read,
    _write,
    _expresses,
    {path: tensor for path, tensor in DECODER_NAMES.items() if ".mlp." not in path}
    | {
        "layers.experts.router.weight": "model.layers.{layer}.block_sparse_moe.gate.weight",
        "layers.experts.gate.weight": _EXPERT + "w1.weight",
        "layers.experts.up.weight": _EXPERT + "w3.weight",
        "layers.experts.down.weight": _EXPERT + "w2.weight",
    },
)
"""The shares of a token's experts are a softmax among themselves."""
