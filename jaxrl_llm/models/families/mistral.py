"""Mistral: Llama's blocks with one sliding attention window for all layers."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.entries import Json, require
from jaxrl_llm.models.families.base import Family, plain_logits, read_decoder, write_decoder
from jaxrl_llm.models.families.rope import read_rope, write_rope

_DEFAULT_WINDOW = 4096  # what transformers takes where config.json does not say; null means no window


def _read(config: Json) -> ModelConfig:
    require(config, "num_key_value_heads")
    sizes = read_decoder(config)
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    kinds = set(config.get("layer_types") or ())
    if len(kinds) > 1:
        raise ValueError(f"layer_types {sorted(kinds)}: Mistral has the same attention in every layer")
    windows = None if window is None else (window,) * sizes["num_layers"]
    return ModelConfig(**sizes, rope=read_rope(config), sliding_windows=windows)


def _write(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_windows[0] if config.sliding_windows else None
    return {**write_decoder(config), **write_rope(config.rope), "sliding_window": window}


def _expresses(config: ModelConfig) -> bool:
    return (
        not config.qk_norm
        and len(set(config.sliding_windows or ())) <= 1
        and not (config.attention_bias or config.output_bias or config.mlp_bias)
        and plain_logits(config)
    )


MISTRAL = Family("mistral", "MistralForCausalLM", _read, _write, _expresses)
"""No biases; `sliding_window` tokens visible in every layer."""
