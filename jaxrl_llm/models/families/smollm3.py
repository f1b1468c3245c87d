"""SmolLM3: Llama's blocks, of which each fourth does not turn queries and keys."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.entries import Json, require
from jaxrl_llm.models.families.base import Family, plain_logits, read_decoder, read_kinds, single_window, write_decoder
from jaxrl_llm.models.families.qwen2 import read_windows, write_windows

_INTERVAL, _THETA = 4, 2e6  # of transformers, where config.json does not say


def _read(config: Json) -> ModelConfig:
    config = {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": _THETA, **config}
    layers = require(config, "num_hidden_layers")
    turns, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", _INTERVAL)
    if turns is None:
        turns = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if len(turns) < layers:
        raise ValueError(f"no_rope_layers has {len(turns)} entries for num_hidden_layers={layers}")
    if config.get("layer_types") is None:
        has_window = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
        types = ["sliding_attention" if has_window and not turn else "full_attention" for turn in turns[:layers]]
        config = config | {"layer_types": types}
    kinds = read_kinds(config, read_windows(config))
    return ModelConfig(
        **read_decoder(config),
        layer_kinds=tuple(
            kind if turn else dataclasses.replace(kind, rope=None)
            for kind, turn in zip(kinds, turns[:layers], strict=True)
        ),
        attention_bias=config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        **write_windows(config),
        "no_rope_layers": [int(kind.rope is not None) for kind in config.kinds],
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _expresses(config: ModelConfig) -> bool:
    kinds = {dataclasses.replace(kind, window=None, rope=None) for kind in config.layer_kinds}
    ropes = {kind.rope for kind in config.layer_kinds} - {None}
    return (
        not config.qk_norm
        and len(kinds) == 1
        and kinds.pop().norms == "pre"
        and len(ropes) <= 1
        and all(rope is not None and rope.partial == 1 for rope in ropes)
        and single_window(config)
        and config.experts is None
        and config.attention_bias == config.output_bias
        and plain_logits(config)
    )


SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", _read, _write, _expresses)
"""`no_rope_layers` has 1 where a layer does turn them."""
