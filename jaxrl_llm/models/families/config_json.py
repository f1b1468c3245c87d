"""What a checkpoint's `config.json` may say: every entry that is read, with its type, its range and its meaning.

The upper bounds lie far beyond any model that there is; they keep what is wrong by powers of ten from being counted,
named or allocated. Entries that are not listed have no effect here.
"""

from __future__ import annotations

from jaxrl_llm.models.config import Activation, RopeScaling
from jaxrl_llm.models.entries import (
    Table,
    list_of,
    mapping,
    number,
    number_between,
    one_of,
    one_or_list_of,
    text,
    truth,
    whole,
)

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
SCALINGS: dict[str, RopeScaling] = {
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
}
LAYER_TYPES = ("full_attention", "sliding_attention")

_MOST_TOKENS = 10**9

POSITIONS: Table = {
    "rope_theta": number_between("base of the rotary embedding's wavelengths", 1, 1e30).or_null(),
    "partial_rotary_factor": number("share of a head that is rotated", 0, 1).or_null(),
    "original_max_position_embeddings": whole("tokens of context before the extension", 1, _MOST_TOKENS).or_null(),
}
"""Entries on positions, which `config.json` may hold itself or in `rope_parameters`."""

ROPE: Table = {
    **POSITIONS,
    "rope_type": one_of("how the context was extended", *SCALINGS),
    "type": one_of("how the context was extended", *SCALINGS),
    "factor": number("by how much the context was extended", 1, 1e6).or_null(),
    "low_freq_factor": number_between("llama3: turns below which a wave is scaled", 0, 1e6).or_null(),
    "high_freq_factor": number_between("llama3: turns above which a wave is kept", 0, 1e6).or_null(),
    "beta_fast": number_between("yarn: turns above which a wave is kept", 0, 1e6).or_null(),
    "beta_slow": number_between("yarn: turns below which a wave is scaled", 0, 1e6).or_null(),
    "attention_factor": number_between("yarn, longrope: multiplier of cosine and sine", 0, 1e3).or_null(),
    "short_factor": list_of(number_between("longrope: of wavelengths in short texts", 0, 1e6)).or_null(),
    "long_factor": list_of(number_between("longrope: of wavelengths in long texts", 0, 1e6)).or_null(),
    "mscale": number("yarn: coefficient of the multiplier", 0, 1e3).or_null(),
    "mscale_all_dim": number("yarn: coefficient of the divisor", 0, 1e3).or_null(),
    "truncate": truth("yarn: whether the range is rounded to whole dimensions"),
}
"""Entries of `rope_parameters` (transformers 5) and `rope_scaling` (4)."""


def special_tokens(last: int = 10**8) -> Table:
    """Special tokens in `config.json` and `generation_config.json`; `last` is the vocabulary's last one."""
    return {
        "bos_token_id": whole("first token of a text", 0, last).or_null(),
        "eos_token_id": one_or_list_of(whole("tokens that end a text", 0, last)).or_null(),
        # Never read by a model, and outside the vocabulary in some that are widely used.
        "pad_token_id": whole("token for padding", -1, 10**8).or_null(),
    }


CONFIG: Table = {
    "model_type": text("family of the model"),
    "architectures": list_of(text("classes of transformers")).or_null(),
    "vocab_size": whole("rows of the embedding", 1, 10**8),
    "hidden_size": whole("width of the model", 1, 10**6),
    "intermediate_size": whole("width of the MLP", 1, 10**7),
    "num_hidden_layers": whole("layers", 1, 10**4),
    "num_attention_heads": whole("query heads", 1, 10**4),
    "num_key_value_heads": whole("key and value heads", 1, 10**4).or_null(),
    "head_dim": whole("width of a head", 1, 10**4).or_null(),
    "max_position_embeddings": whole("tokens of context", 1, _MOST_TOKENS),
    "rms_norm_eps": number_between("ε of the RMS norms", 0, 1),
    "hidden_act": one_of("activation of the MLP", *ACTIVATIONS),
    "hidden_activation": one_of("activation of the MLP, of Gemma", *ACTIVATIONS).or_null(),
    "tie_word_embeddings": truth("whether the LM head is the embedding"),
    "attention_bias": truth("whether the attention's projections have biases"),
    "mlp_bias": truth("whether the MLP's projections have biases"),
    "sliding_window": whole("tokens of the attention window", 0, _MOST_TOKENS).or_null(),
    "use_sliding_window": truth("whether some layers have the attention window"),
    "max_window_layers": whole("first layer with the attention window", 0, 10**4),
    "num_experts": whole("experts of a layer", 1, 10**6),
    "num_local_experts": whole("experts of a layer", 1, 10**6),
    "num_experts_per_tok": whole("experts that compute a token", 1, 10**6),
    "moe_intermediate_size": whole("width of an expert", 1, 10**7),
    "shared_expert_intermediate_size": whole("width of the expert that computes all tokens", 1, 10**7),
    "swiglu_alpha": number_between("GPT-OSS: slope of the gate's sigmoid", 0, 1e3).or_null(),
    "swiglu_limit": number_between("GPT-OSS: what gate and up are clamped to", 0, 1e6).or_null(),
    "qkv_bias": truth("whether queries, keys and values have biases"),
    "norm_topk_prob": truth("whether the shares of a token's experts add up to 1"),
    "decoder_sparse_step": whole("of so many layers one has experts", 1, 10**4),
    "mlp_only_layers": list_of(whole("layers without experts", 0, 10**4)).or_null(),
    "layer_types": list_of(one_of("attention of each layer", *LAYER_TYPES)).or_null(),
    "sliding_window_pattern": whole("Gemma 3: each so manieth layer has no attention window", 1, 10**4).or_null(),
    "use_bidirectional_attention": one_of("whether tokens see those behind them", False).or_null(),
    "query_pre_attn_scalar": number_between("by whose root scores are divided", 0, 1e6),
    "attn_logit_softcapping": number_between("soft-cap of the scores", 0, 1e6).or_null(),
    "final_logit_softcapping": number_between("soft-cap of the logits", 0, 1e6).or_null(),
    "no_rope_layers": list_of(whole("1 of each layer that turns queries and keys, 0 of others", 0, 1)).or_null(),
    "no_rope_layer_interval": whole("SmolLM3: each so manieth layer turns none", 1, 10**4),
    "rope_local_base_freq": number_between("base of the wavelengths in layers with a window", 1, 1e30).or_null(),
    **POSITIONS,
    "rope_parameters": mapping("rotary embedding").or_null(),
    "rope_scaling": mapping("rotary embedding").or_null(),
    "quantization_config": mapping("how the weights are quantised").or_null(),
    **special_tokens(),
}
"""All entries that are read."""
