"""Phi-3, Phi-3.5 and Phi-4: Llama's blocks, queries, keys and values in one tensor, gate and up in another."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.entries import Json
from jaxrl_llm.models.families.base import (
    DECODER_NAMES,
    Family,
    plain_kinds,
    plain_logits,
    read_decoder,
    read_kinds,
    write_decoder,
)

_ORIGINAL = 4096  # of transformers, where config.json does not say
_OLD_NAMES = ("su", "yarn")


def _read(config: Json) -> ModelConfig:
    config = {"original_max_position_embeddings": _ORIGINAL, "rms_norm_eps": 1e-5, **config}
    for place in ("rope_scaling", "rope_parameters"):
        entries = config.get(place) or {}
        kinds = {key: "longrope" for key in ("type", "rope_type") if entries.get(key) in _OLD_NAMES}
        config = config | {place: entries | kinds}
    (kind,) = read_kinds(config, (config.get("sliding_window"),), partial=True)
    if kind.rope is not None and kind.rope.scaling not in ("none", "longrope"):
        raise ValueError(f"rope_type={kind.rope.scaling!r} is none of Phi-3's: it knows default and longrope")
    return ModelConfig(**read_decoder(config), layer_kinds=(kind,))


def _write(config: ModelConfig) -> dict[str, Any]:
    """Of longrope the three entries alone that transformers 4 allows in `rope_scaling`, unless there are others."""
    (kind,) = config.layer_kinds
    assert kind.rope is not None  # `plain_kinds`
    rope, written = kind.rope, write_decoder(config)
    original = rope.original_max_position_embeddings or _ORIGINAL
    parameters = written["rope_parameters"] | {"partial_rotary_factor": rope.partial}
    if rope.factor == config.max_position_embeddings / original:
        parameters.pop("factor", None)
    ours = ("type", "short_factor", "long_factor", "attention_factor", "factor")
    scaling = {key: value for key, value in {"type": "longrope", **parameters}.items() if key in ours}
    return {
        **written,
        "rope_parameters": parameters,
        "rope_scaling": scaling if rope.scaling == "longrope" else None,
        "partial_rotary_factor": rope.partial,
        "original_max_position_embeddings": original,
        "sliding_window": kind.window,
    }


def _expresses(config: ModelConfig) -> bool:
    rope = config.layer_kinds[0].rope
    return (
        not config.qk_norm
        and len(config.layer_kinds) == 1
        and plain_kinds(config, partial=True)
        and rope is not None
        and rope.scaling in ("none", "longrope")
        and not (config.attention_bias or config.output_bias or config.mlp_bias)
        and plain_logits(config)
    )


_LAYER = "model.layers.{layer}."
_QKV, _GATE_UP = _LAYER + "self_attn.qkv_proj.weight", _LAYER + "mlp.gate_up_proj.weight"

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    _read,
    _write,
    _expresses,
    DECODER_NAMES
    | {f"layers.attention.{part}.weight": _QKV for part in ("query", "key", "value")}
    | {f"layers.mlp.{part}.weight": _GATE_UP for part in ("gate", "up")},
)
"""No biases; a part of each head may be turned, and longrope has wavelengths for short texts and for long ones."""
