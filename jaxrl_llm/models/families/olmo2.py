"""OLMo 2: norms on what attention and MLP give, and on queries and keys over all heads at once."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.entries import Json
from jaxrl_llm.models.families.base import DECODER_NAMES, Family, plain_logits, read_decoder, read_kinds, write_decoder


def _read(config: Json) -> ModelConfig:
    bias = config.get("attention_bias", False)
    return ModelConfig(
        **read_decoder({"rms_norm_eps": 1e-5, **config}),
        layer_kinds=read_kinds(config, norms="post"),
        qk_norm=True,
        qk_norm_over_heads=True,
        attention_bias=bias,
        output_bias=bias,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), "attention_bias": config.attention_bias}


def _expresses(config: ModelConfig) -> bool:
    kind = config.layer_kinds[0]
    return (
        config.qk_norm_over_heads
        and len(config.layer_kinds) == 1
        and (kind.norms, kind.window) == ("post", None)
        and kind.rope is not None
        and kind.rope.partial == 1
        and config.attention_bias == config.output_bias
        and not config.mlp_bias
        and config.experts is None
        and plain_logits(config)
    )


_NAMES = {
    "layers.attention.query_norm.scale": "model.layers.{layer}.self_attn.q_norm.weight",
    "layers.attention.key_norm.scale": "model.layers.{layer}.self_attn.k_norm.weight",
    "layers.attention_post_norm.scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers.mlp_post_norm.scale": "model.layers.{layer}.post_feedforward_layernorm.weight",
}
_LACKS = ("layers.attention_norm.scale", "layers.mlp_norm.scale")

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _read,
    _write,
    _expresses,
    {name: tensor for name, tensor in DECODER_NAMES.items() if name not in _LACKS} | _NAMES,
)
"""No norm before attention and MLP; the attention's biases all or none."""
