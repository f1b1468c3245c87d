"""Qwen2 and Qwen2.5: Llama's blocks with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.entries import Json, require
from jaxrl_llm.models.families.base import (
    Family,
    plain_kinds,
    plain_logits,
    read_decoder,
    read_kinds,
    read_sliding,
    single_window,
    write_decoder,
    write_layer_types,
)


def read_windows(config: Json) -> tuple[int | None, ...]:
    """Window of each layer, or one for all: from `layer_types`, or where that is absent from `max_window_layers`."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    sliding = read_sliding(config, lambda layer: window is not None and layer >= first)
    if window is None and any(sliding):
        raise ValueError("layer_types asks for sliding_attention, but use_sliding_window and sliding_window do not")
    return tuple(window if slides else None for slides in sliding)


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_windows`, in the spelling of both `transformers` 4 and 5."""
    windows = [kind.window for kind in config.kinds]
    width = next((window for window in windows if window is not None), None)
    full = next((layer for layer, window in enumerate(windows) if window is not None), config.num_layers)
    return {
        "use_sliding_window": width is not None,
        "sliding_window": width,
        "max_window_layers": full,
        "layer_types": write_layer_types(config),
    }


def _read(config: Json) -> ModelConfig:
    require(config, "num_key_value_heads")
    return ModelConfig(
        **read_decoder(config),
        layer_kinds=read_kinds(config, read_windows(config)),
        attention_bias=True,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), **write_windows(config)}


def _expresses(config: ModelConfig) -> bool:
    return (
        not config.qk_norm
        and config.attention_bias
        and not (config.output_bias or config.mlp_bias)
        and plain_kinds(config)
        and single_window(config)
        and plain_logits(config)
    )


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read, _write, _expresses)
"""Biases on queries, keys and values, none on the output; windows in the upper layers of some."""
