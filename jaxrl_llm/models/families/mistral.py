"""Mistral: Llama's blocks with one sliding attention window for all layers."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.entries import Json, require
from jaxrl_llm.models.families.base import Family, plain_kinds, plain_logits, read_decoder, read_kinds, write_decoder

_DEFAULT_WINDOW = 4096  # what transformers takes where config.json does not say; null means no window


def _read(config: Json) -> ModelConfig:
    require(config, "num_key_value_heads")
    sizes = read_decoder(config)
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    kinds = set(config.get("layer_types") or ())
    if len(kinds) > 1:
        raise ValueError(f"layer_types {sorted(kinds)}: Mistral has the same attention in every layer")
    return ModelConfig(**sizes, layer_kinds=read_kinds(config, (window,)))


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), "sliding_window": config.layer_kinds[0].window}


def _expresses(config: ModelConfig) -> bool:
    return (
        not config.qk_norm
        and len(config.layer_kinds) == 1
        and plain_kinds(config)
        and not (config.attention_bias or config.output_bias or config.mlp_bias)
        and plain_logits(config)
    )


MISTRAL = Family("mistral", "MistralForCausalLM", _read, _write, _expresses)
"""No biases; `sliding_window` tokens visible in every layer."""
