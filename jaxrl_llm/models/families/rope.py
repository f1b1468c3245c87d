"""Rotary embeddings in `config.json`: `rope_parameters` (transformers 5) or `rope_scaling` (4)."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.config import RopeConfig
from jaxrl_llm.models.entries import Json, check_entries, require
from jaxrl_llm.models.families.config_json import ROPE, SCALINGS


def read_rope(config: Json, *, partial: bool = False) -> RopeConfig:
    """Rotary embedding of a `config.json`, in the spelling of any version of `transformers`.

    Args:
        config: entries that `CONFIG` allows.
        partial: whether the family knows how to turn but a part of each head.

    Raises:
        ValueError: an entry that cannot be meant, an unknown scaling, a partial rotation in another family, or a
            different rotation per layer type.
    """
    place = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    entries: Json = config.get(place) or {}
    nested = [key for key, value in entries.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{place} per layer type ({', '.join(nested)}) are not implemented")
    check_entries(entries, ROPE, f"{place}.")
    shares = (place.get("partial_rotary_factor") for place in (entries, config))
    share = float(next((share for share in shares if share is not None), 1.0))
    if share != 1 and not partial:
        raise ValueError(f"partial_rotary_factor={share} is not implemented for this family; only 1.0 is")

    kind = SCALINGS[entries.get("rope_type", entries.get("type", "default"))]
    theta = float(entries.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if kind == "none":
        return RopeConfig(theta=theta, partial=share)
    # The order of precedence is that of transformers, which lets Phi-style top-level entries win.
    original = config.get("original_max_position_embeddings") or entries.get("original_max_position_embeddings")
    original = original or require(config, "max_position_embeddings")
    if kind in ("yarn", "longrope") and entries.get("factor") is None:
        factor = require(config, "max_position_embeddings") / original
    else:
        factor = require(entries, "factor", f"{place} of type {kind!r}: ")
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=float(factor), partial=share)
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=float(factor),
            original_max_position_embeddings=original,
            low_freq_factor=float(require(entries, "low_freq_factor", f"{place}.")),
            high_freq_factor=float(require(entries, "high_freq_factor", f"{place}.")),
            partial=share,
        )
    if kind == "longrope":
        return RopeConfig(
            theta=theta,
            scaling="longrope",
            factor=float(factor),
            original_max_position_embeddings=original,
            attention_factor=entries.get("attention_factor"),
            short_factors=tuple(map(float, require(entries, "short_factor", f"{place}."))),
            long_factors=tuple(map(float, require(entries, "long_factor", f"{place}."))),
            partial=share,
        )
    return RopeConfig(
        theta=theta,
        scaling="yarn",
        factor=float(factor),
        original_max_position_embeddings=original,
        beta_fast=float(entries.get("beta_fast") or 32.0),
        beta_slow=float(entries.get("beta_slow") or 1.0),
        attention_factor=entries.get("attention_factor"),
        mscale=entries.get("mscale"),
        mscale_all_dim=entries.get("mscale_all_dim"),
        truncate=entries.get("truncate", True),
        partial=share,
    )


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The entries of `config.json` for a rotary embedding, readable by `transformers` 4 and 5 alike."""
    scaling: dict[str, Any] = {}
    if rope.scaling != "none":
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        optional = {key: getattr(rope, key) for key in ("attention_factor", "mscale", "mscale_all_dim")}
        scaling |= {key: value for key, value in optional.items() if value is not None}
    if rope.scaling == "longrope":
        scaling |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        scaling |= {} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": rope.theta},
    }
