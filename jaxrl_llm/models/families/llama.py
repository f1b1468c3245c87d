"""Llama 2, 3 and 3.x, and what took over its architecture: SmolLM2, TinyLlama, TinyStories-sized models."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.entries import Json, require
from jaxrl_llm.models.families.base import Family, plain_kinds, plain_logits, read_decoder, read_kinds, write_decoder


def _read(config: Json) -> ModelConfig:
    width, heads = require(config, "hidden_size"), require(config, "num_attention_heads")
    if width % heads:  # transformers insists, even where head_dim is set
        raise ValueError(f"hidden_size={width} must be a multiple of num_attention_heads={heads}")
    bias = config.get("attention_bias", False)
    return ModelConfig(
        **read_decoder(config),
        layer_kinds=read_kinds(config),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=config.get("mlp_bias", False),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _expresses(config: ModelConfig) -> bool:
    return (
        not config.qk_norm
        and not any(kind.window for kind in config.layer_kinds)
        and plain_kinds(config)
        and config.attention_bias == config.output_bias
        and config.embed_dim % config.num_heads == 0
        and plain_logits(config)
    )


LLAMA = Family("llama", "LlamaForCausalLM", _read, _write, _expresses)
"""Grouped-query attention, no norm on queries and keys, the attention's biases all or none."""
