"""Gemma 2: norms around both halves of a layer, every other layer with a window, and soft-caps."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxrl_llm.models.config import LayerKind, ModelConfig
from jaxrl_llm.models.entries import Json
from jaxrl_llm.models.families.base import (
    DECODER_NAMES,
    Family,
    read_decoder,
    read_kinds,
    read_sliding,
    single_window,
    write_decoder,
    write_layer_types,
)

NAMES = DECODER_NAMES | {
    "layers.attention_post_norm.scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers.mlp_norm.scale": "model.layers.{layer}.pre_feedforward_layernorm.weight",
    "layers.mlp_post_norm.scale": "model.layers.{layer}.post_feedforward_layernorm.weight",
}
"""Parameter → tensor name, of both generations."""
DEFAULTS: Json = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
"""What transformers takes where `config.json` does not say, of both generations."""
_SOFTCAPS = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}


def read_gemma(config: Json) -> dict[str, Any]:
    """The arguments of `ModelConfig` that both generations spell alike, kinds and soft-caps apart.

    The scales of norms are stored without the 1 that is added to them, and embeddings without their √D.
    """
    bias, sizes, scalar = config.get("attention_bias", False), read_decoder(config), config["query_pre_attn_scalar"]
    return {
        **sizes,
        "norm_offset": 1.0,
        "scale_embeddings": True,
        "query_scalar": None if scalar == sizes["head_dim"] else float(scalar),
        "attention_bias": bias,
        "output_bias": bias,
    }


def read_windows(config: Json, pattern: int) -> tuple[LayerKind, ...]:
    """The kind of each layer, of which each `pattern`-th has no window where `layer_types` does not say."""
    config = {**config, "hidden_act": config.get("hidden_activation") or "gelu_pytorch_tanh"}
    sliding = read_sliding(config, lambda layer: bool((layer + 1) % pattern))
    windows = [config["sliding_window"] if slides else None for slides in sliding]
    return read_kinds(config, windows, norms="sandwich")


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_gemma` and `read_windows`; transformers wants a window, though no layer has one."""
    scalar, entries = config.query_scalar or config.head_dim, write_decoder(config)
    windows = (kind.window for kind in config.layer_kinds if kind.window is not None)
    return {
        **entries,
        "hidden_activation": entries["hidden_act"],
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "sliding_window": next(windows, DEFAULTS["sliding_window"]),
        "layer_types": write_layer_types(config),
        "attention_bias": config.attention_bias,
    }


def expresses_gemma(config: ModelConfig) -> bool:
    """Whether the generations have all of this, rotary embeddings, norms on queries and soft-caps apart."""
    kinds = {dataclasses.replace(kind, window=None, rope=None) for kind in config.layer_kinds}
    return (
        config.norm_offset == 1
        and config.scale_embeddings
        and len(kinds) == 1
        and kinds.pop().norms == "sandwich"
        and single_window(config)
        and config.attention_bias == config.output_bias
        and not config.mlp_bias
        and not config.qk_norm_over_heads
        and config.experts is None
        and config.embed_dim % config.num_heads == 0  # transformers insists, though head_dim is set
    )


def _read(config: Json) -> ModelConfig:
    config = {**DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **config}
    caps = {field: config[key] for field, key in _SOFTCAPS.items()}
    return ModelConfig(**read_gemma(config), **caps, layer_kinds=read_windows(config, 2))


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_gemma(config), **{key: getattr(config, field) for field, key in _SOFTCAPS.items()}}


def _expresses(config: ModelConfig) -> bool:
    ropes = {kind.rope for kind in config.layer_kinds}
    whole = all(rope is not None and rope.partial == 1 for rope in ropes)
    return expresses_gemma(config) and not config.qk_norm and len(ropes) == 1 and whole


GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _read, _write, _expresses, NAMES)
"""Soft-caps on scores and logits; scores over the root of `query_pre_attn_scalar`."""
