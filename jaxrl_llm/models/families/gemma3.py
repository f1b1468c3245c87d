"""Gemma 3, the text model: Gemma 2 with norms on queries and keys, and a rotary embedding for each kind of layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxrl_llm.models.config import ModelConfig, RopeConfig
from jaxrl_llm.models.entries import Json, shown
from jaxrl_llm.models.families.base import Family
from jaxrl_llm.models.families.gemma2 import DEFAULTS, NAMES, expresses_gemma, read_gemma, read_windows, write_gemma
from jaxrl_llm.models.families.rope import read_rope, write_rope

_FULL, _LOCAL = "full_attention", "sliding_attention"
_PATTERN = 6


def _read_ropes(config: Json) -> dict[bool, RopeConfig]:
    """The rotary embedding of layers with a window (`True`), and of those without."""
    by_kind = config.get("rope_parameters") or {}
    if by_kind and not {_FULL, _LOCAL} & set(by_kind):
        raise ValueError(f"rope_parameters={shown(by_kind)} must be an object for each of {_FULL} and {_LOCAL}")
    alone = {key: config.get(key) for key in ("max_position_embeddings", "original_max_position_embeddings")}
    full = {"rope_theta": config.get("rope_theta") or 1e6, "rope_scaling": config.get("rope_scaling")}
    local = {"rope_theta": config.get("rope_local_base_freq") or 1e4}
    return {
        False: read_rope({**alone, **full, "rope_parameters": by_kind.get(_FULL)}),
        True: read_rope({**alone, **local, "rope_parameters": by_kind.get(_LOCAL)}),
    }


def _read(config: Json) -> ModelConfig:
    config = {**DEFAULTS, **config}
    if config.get("attn_logit_softcapping") is not None:
        cap = config["attn_logit_softcapping"]
        raise ValueError(f"attn_logit_softcapping={cap} must be null: transformers does not apply it in Gemma 3")
    ropes = _read_ropes(config)
    without = {key: value for key, value in config.items() if not key.startswith("rope_")}
    return ModelConfig(
        **read_gemma(config),
        qk_norm=True,
        logit_softcap=config.get("final_logit_softcapping"),
        layer_kinds=tuple(
            dataclasses.replace(kind, rope=ropes[kind.window is not None])
            for kind in read_windows(without, config.get("sliding_window_pattern") or _PATTERN)
        ),
    )


def _ropes(config: ModelConfig) -> dict[bool, set[RopeConfig | None]]:
    return {local: {k.rope for k in config.layer_kinds if (k.window is not None) == local} for local in (False, True)}


def _write(config: ModelConfig) -> dict[str, Any]:
    """In the spellings of transformers 4 and 5; layers that there are none of have the family's usual wavelengths."""
    found = {local: next(iter(ropes), None) for local, ropes in _ropes(config).items()}
    full, local = found[False] or RopeConfig(1e6), found[True] or RopeConfig(1e4)
    of_full = write_rope(full)
    return {
        **write_gemma(config),
        "sliding_window_pattern": next(
            (layer + 1 for layer, kind in enumerate(config.kinds) if kind.window is None), config.num_layers + 1
        ),
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": None,
        "rope_theta": full.theta,
        "rope_local_base_freq": local.theta,
        "rope_scaling": of_full["rope_scaling"],
        "rope_parameters": {
            _FULL: of_full["rope_parameters"],
            _LOCAL: write_rope(local)["rope_parameters"],
        },
    }


def _expresses(config: ModelConfig) -> bool:
    ropes = _ropes(config)
    whole = all(rope is not None and rope.partial == 1 for found in ropes.values() for rope in found)
    return (
        expresses_gemma(config)
        and config.qk_norm
        and config.attention_softcap is None
        and whole
        and all(len(found) <= 1 for found in ropes.values())
        and all(rope is not None and rope.scaling == "none" for rope in ropes[True])
    )


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _read,
    _write,
    _expresses,
    NAMES
    | {
        "layers.attention.query_norm.scale": "model.layers.{layer}.self_attn.q_norm.weight",
        "layers.attention.key_norm.scale": "model.layers.{layer}.self_attn.k_norm.weight",
    },
    scores="Gemma3Text",
)
"""Five layers with a window and wavelengths of their own, then one without; no soft-cap on scores."""
