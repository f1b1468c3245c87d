"""What a model family is: how its Hugging Face `config.json` and tensor names map to ours.

A family is a table, not a fork: one `Transformer` computes all of them. The functions here read and write
the parts of `config.json` that the families share; what differs is in each family's own file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_llm.models.config import LayerKind, ModelConfig, Norms, RopeConfig
from jaxrl_llm.models.entries import Json, require, shown
from jaxrl_llm.models.families.config_json import ACTIVATIONS
from jaxrl_llm.models.families.rope import read_rope, write_rope

DECODER_NAMES: dict[str, str] = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.attention_norm.scale": "model.layers.{layer}.input_layernorm.weight",
    "layers.attention.query.weight": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers.attention.query.bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "layers.attention.key.weight": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers.attention.key.bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "layers.attention.value.weight": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers.attention.value.bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "layers.attention.output.weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers.attention.output.bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "layers.mlp_norm.scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers.mlp.gate.weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers.mlp.gate.bias": "model.layers.{layer}.mlp.gate_proj.bias",
    "layers.mlp.up.weight": "model.layers.{layer}.mlp.up_proj.weight",
    "layers.mlp.up.bias": "model.layers.{layer}.mlp.up_proj.bias",
    "layers.mlp.down.weight": "model.layers.{layer}.mlp.down_proj.weight",
    "layers.mlp.down.bias": "model.layers.{layer}.mlp.down_proj.bias",
    "final_norm.scale": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
"""Parameter → tensor name in a checkpoint, `{layer}` for each layer; shared by Llama's descendants."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints, as `transformers` names it."""

    model_type: str
    """`model_type` of `config.json`."""
    architecture: str
    """Name of the `transformers` class, in `architectures` of `config.json`."""
    read_config: Callable[[Json], ModelConfig]
    """`config.json` → configuration; raises `ValueError` on what is not implemented."""
    write_config: Callable[[ModelConfig], dict[str, Any]]
    """Configuration → the entries of `config.json` that describe the architecture."""
    expresses: Callable[[ModelConfig], bool]
    """Whether a checkpoint of this family can have this configuration."""
    tensor_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: DECODER_NAMES)
    """Parameter → tensor name. Parameters of one name are its rows, one after another in this order, unless a layout
    is written behind it (`checkpoints/weights.py`)."""
    scores: str | None = None
    """What classes with a head of scores are called before `ForSequenceClassification`, where that is not what
    `architecture` begins with."""


def read_decoder(config: Json) -> dict[str, Any]:
    """The arguments of `ModelConfig` that all families spell alike, `read_kinds` apart.

    Args:
        config: entries that `CONFIG` allows.

    Raises:
        ValueError: a size is missing, sizes do not fit together, or the checkpoint needs something that is not
            implemented.
    """
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ValueError(
            f"quantization_config (quant_method={shown(method)}) is not implemented; only plain float weights "
            "can be read from safetensors: use the unquantised checkpoint, or a GGUF file"
        )
    heads, width = require(config, "num_attention_heads"), require(config, "hidden_size")
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim")
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}")
    if head_dim is None and width % heads:
        raise ValueError(
            f"hidden_size={width} must be a multiple of num_attention_heads={heads} where head_dim is not set"
        )
    head_dim = head_dim or width // heads
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even, for the rotary embedding turns pairs")
    return {
        "vocab_size": require(config, "vocab_size"),
        "embed_dim": width,
        "mlp_dim": require(config, "intermediate_size"),
        "num_layers": require(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": require(config, "max_position_embeddings"),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def read_kinds(
    config: Json, windows: Sequence[int | None] = (None,), *, norms: Norms = "pre", partial: bool = False
) -> tuple[LayerKind, ...]:
    """The kinds of layers that differ in their windows alone.

    Args:
        config: entries that `CONFIG` allows.
        windows: of each layer, or one for all.
        norms: of all layers.
        partial: as for `read_rope`.

    Raises:
        ValueError: as in `read_rope`.
    """
    rope, activation = read_rope(config, partial=partial), ACTIVATIONS[config.get("hidden_act", "silu")]
    return tuple(LayerKind(window, rope, activation, norms) for window in windows)


def read_sliding(config: Json, by_number: Callable[[int], bool]) -> tuple[bool, ...]:
    """Whether each layer has the sliding window: as `layer_types` says, or where that is absent, by its number.

    Raises:
        ValueError: `layer_types` has not as many entries as there are layers.
    """
    layers, types = require(config, "num_hidden_layers"), config.get("layer_types")
    if types is None:
        return tuple(map(by_number, range(layers)))
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries for num_hidden_layers={layers}")
    return tuple(kind == "sliding_attention" for kind in types)


def write_layer_types(config: ModelConfig) -> list[str]:
    """`layer_types`, of each layer whether it has a window."""
    return ["full_attention" if kind.window is None else "sliding_attention" for kind in config.kinds]


def write_decoder(config: ModelConfig) -> dict[str, Any]:
    """The entries of `config.json` that all families spell alike: the inverse of `read_decoder` and `read_kinds`.

    The rotary embedding is that of the first layer that has one.
    """
    kind = config.layer_kinds[0]
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu" if kind.activation == "silu" else "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        **write_rope(next((kind.rope for kind in config.layer_kinds if kind.rope is not None), RopeConfig())),
    }


def plain_logits(config: ModelConfig) -> bool:
    """Whether the model has none of Gemma's soft-caps and factors: no other family here has them."""
    factors = config.attention_softcap, config.logit_softcap, config.query_scalar
    return factors == (None, None, None) and not config.norm_offset and not config.scale_embeddings


def plain_attention(config: ModelConfig) -> bool:
    """Whether the model has none of GPT-OSS's sinks, gates and biases of experts: no other family has them."""
    gates = any(kind.activation == "clamped_swiglu" for kind in config.layer_kinds)
    return not (config.attention_sinks or gates or (config.experts is not None and config.experts.bias))


def plain_kinds(config: ModelConfig, *, partial: bool = False, experts: bool = False) -> bool:
    """Whether layers differ in their windows alone, have Llama's norms and turn queries and keys, whole or `partial`.

    Norms on queries and keys, if any, are over each head. With `experts`, layers may differ in that some have experts,
    and some have.
    """
    kinds = {dataclasses.replace(kind, window=None, experts=False) for kind in config.layer_kinds}
    turned = all(kind.rope is not None and (partial or kind.rope.partial == 1) for kind in kinds)
    alike = len(kinds) == 1 and turned and kinds.pop().norms == "pre" and not config.qk_norm_over_heads
    return alike and experts == (config.experts is not None)


def single_window(config: ModelConfig) -> bool:
    """Whether all layers with a sliding window have the same one, as these families need."""
    return len({kind.window for kind in config.layer_kinds} - {None}) <= 1
