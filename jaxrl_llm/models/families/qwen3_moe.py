"""Qwen3-MoE: Qwen3's attention, and in all or some of the layers a mixture of many small experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxrl_llm.models.config import ExpertsConfig, LayerKind, ModelConfig
from jaxrl_llm.models.entries import Json, require
from jaxrl_llm.models.families.base import (
    Family,
    plain_kinds,
    plain_logits,
    read_decoder,
    read_kinds,
    write_decoder,
)
from jaxrl_llm.models.families.qwen3 import QWEN3

_EXPERT = "model.layers.{layer}.mlp.experts.{expert}."
EXPERT_NAMES: dict[str, str] = {
    "layers.experts.router.weight": "model.layers.{layer}.mlp.gate.weight",
    "layers.experts.gate.weight": _EXPERT + "gate_proj.weight",
    "layers.experts.up.weight": _EXPERT + "up_proj.weight",
    "layers.experts.down.weight": _EXPERT + "down_proj.weight",
}
"""Parameter of experts → tensor name, `{expert}` for each expert."""


def read_mixture(config: Json, kinds: Sequence[LayerKind]) -> dict[str, Any]:
    """Which of the layers, of these kinds, have experts, and what these are.

    Raises:
        ValueError: none has, or an entry is missing.
    """
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    has_experts = [layer not in dense and (layer + 1) % step == 0 for layer in range(len(kinds))]
    if not any(has_experts):
        raise ValueError(f"mlp_only_layers={list(dense)} and decoder_sparse_step={step} leave no layer with experts")
    experts = ExpertsConfig(
        count=require(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        per_token=require(config, "num_experts_per_tok"),
        width=require(config, "moe_intermediate_size"),
        normalize=config.get("norm_topk_prob", False),
    )
    of_layer = zip(kinds, has_experts, strict=True)
    return {"layer_kinds": tuple(dataclasses.replace(kind, experts=has) for kind, has in of_layer), "experts": experts}


def write_mixture(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_mixture`."""
    assert config.experts is not None
    return {
        "num_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "moe_intermediate_size": config.experts.width,
        "norm_topk_prob": config.experts.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, kind in enumerate(config.kinds) if not kind.experts],
        "output_router_logits": False,
    }


def _read(config: Json) -> ModelConfig:
    require(config, "num_key_value_heads")
    sizes, bias = read_decoder(config), config.get("attention_bias", False)
    (kind,) = read_kinds(config, (config.get("sliding_window") if config.get("use_sliding_window") else None,))
    return ModelConfig(
        **sizes,
        **read_mixture(config, [kind] * sizes["num_layers"]),
        qk_norm=True,
        attention_bias=bias,
        output_bias=bias,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    window = config.layer_kinds[0].window
    return {
        **write_decoder(config),
        "attention_bias": config.attention_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        **write_mixture(config),
    }


def _expresses(config: ModelConfig) -> bool:
    return (
        config.qk_norm
        and config.attention_bias == config.output_bias
        and not config.mlp_bias
        and plain_kinds(config, experts=True)
        and config.experts is not None
        and config.experts.shared is None
        and len({kind.window for kind in config.layer_kinds}) == 1
        and plain_logits(config)
    )


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _read,
    _write,
    _expresses,
    {**QWEN3.tensor_names, **EXPERT_NAMES},
)
"""Shares of experts add up to 1 or not; `mlp_only_layers` have an MLP."""
