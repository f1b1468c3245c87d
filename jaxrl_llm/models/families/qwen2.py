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
    single_window,
    write_decoder,
)


def read_windows(config: Json) -> tuple[int | None, ...]:
    """Window of each layer, or one for all: from `layer_types`, or where that is absent from `max_window_layers`."""
    layers = require(config, "num_hidden_layers")
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28) if window is not None else layers
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if len(kinds) != layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for num_hidden_layers={layers}")
    if "sliding_attention" not in kinds:
        return (None,)
    if window is None:
        raise ValueError("layer_types asks for sliding_attention, but use_sliding_window and sliding_window do not")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_windows`, in the spelling of both `transformers` 4 and 5."""
    windows = [kind.window for kind in config.kinds]
    width = next((window for window in windows if window is not None), None)
    full = next((layer for layer, window in enumerate(windows) if window is not None), config.num_layers)
    return {
        "use_sliding_window": width is not None,
        "sliding_window": width,
        "max_window_layers": full,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
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
