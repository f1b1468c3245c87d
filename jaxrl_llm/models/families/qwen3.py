"""Qwen3: norms on queries and keys, and a head size of its own."""

from __future__ import annotations

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

_DEFAULT_HEAD_DIM = 128  # of transformers; not hidden_size / num_attention_heads


def _read(config: Json) -> ModelConfig:
    require(config, "num_key_value_heads")
    bias = config.get("attention_bias", False)
    return ModelConfig(
        **read_decoder({"head_dim": _DEFAULT_HEAD_DIM, **config}),
        layer_kinds=read_kinds(config, read_windows(config)),
        qk_norm=True,
        attention_bias=bias,
        output_bias=bias,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        **write_windows(config),
        "attention_bias": config.attention_bias,
    }


def _expresses(config: ModelConfig) -> bool:
    return (
        config.qk_norm
        and config.attention_bias == config.output_bias
        and not config.mlp_bias
        and plain_kinds(config)
        and single_window(config)
        and plain_logits(config)
    )


QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _read,
    _write,
    _expresses,
    DECODER_NAMES
    | {
        "layers.attention.query_norm.scale": "model.layers.{layer}.self_attn.q_norm.weight",
        "layers.attention.key_norm.scale": "model.layers.{layer}.self_attn.k_norm.weight",
    },
)
"""RMS norms over the head on queries and keys."""
