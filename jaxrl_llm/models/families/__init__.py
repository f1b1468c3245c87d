"""Families of checkpoints: one file each. To add one, write its file and put it in `FAMILIES`."""

from __future__ import annotations

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.entries import Json, check_entries, shown
from jaxrl_llm.models.families.base import Family, plain_attention
from jaxrl_llm.models.families.config_json import CONFIG
from jaxrl_llm.models.families.gemma2 import GEMMA2
from jaxrl_llm.models.families.gemma3 import GEMMA3
from jaxrl_llm.models.families.gpt_oss import GPT_OSS
from jaxrl_llm.models.families.llama import LLAMA
from jaxrl_llm.models.families.mistral import MISTRAL
from jaxrl_llm.models.families.mixtral import MIXTRAL
from jaxrl_llm.models.families.nearest import nearest
from jaxrl_llm.models.families.olmo2 import OLMO2
from jaxrl_llm.models.families.phi3 import PHI3
from jaxrl_llm.models.families.qwen2 import QWEN2
from jaxrl_llm.models.families.qwen2_moe import QWEN2_MOE
from jaxrl_llm.models.families.qwen3 import QWEN3
from jaxrl_llm.models.families.qwen3_moe import QWEN3_MOE
from jaxrl_llm.models.families.smollm3 import SMOLLM3

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3),
    *(QWEN2_MOE, QWEN3_MOE, MIXTRAL, GPT_OSS),
    *(GEMMA2, GEMMA3, OLMO2, SMOLLM3, PHI3),
)
"""All families; of those that express a configuration, the one that it came from or else the first is its export."""


def family_of(config: Json) -> Family:
    """The family of a `config.json`, each entry of which is one that may be meant.

    Raises:
        ValueError: none has this `model_type`, the checkpoint is no causal language model, or an entry has a wrong type
            or lies outside its range.
    """
    check_entries(config, {key: CONFIG[key] for key in ("model_type", "architectures")})
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    family = next((family for family in FAMILIES if family.model_type == model_type), None)
    if family is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise ValueError(
            f"model_type={shown(model_type)} (architectures={shown(architectures)}) is not supported; known: {known}"
            f"{nearest(config, [family.model_type for family in FAMILIES])}"
        )
    if architectures and family.architecture not in architectures:
        scores = any("Classification" in str(name) for name in architectures)
        why = (
            f"writes no text, as {family.architecture} does"
            if scores
            else f"is not supported: {family.architecture} is"
        )
        raise ValueError(f"architectures={shown(architectures)} {why}")
    check_entries(config, CONFIG)
    return family


def family_for(config: ModelConfig) -> Family:
    """The family as which a model of this configuration is exported.

    Raises:
        ValueError: none of them can have this configuration.
    """
    known = FAMILIES if plain_attention(config) else (GPT_OSS,)
    possible = [family for family in known if family.expresses(config)]
    if possible:
        return next((family for family in possible if family.model_type == config.family), possible[0])
    traits = {
        name: getattr(config, name)
        for name in (
            *("embed_dim", "num_heads", "qk_norm", "attention_bias", "output_bias", "mlp_bias"),
            *("layer_kinds", "experts", "attention_sinks", "attention_softcap", "logit_softcap"),
            *("norm_offset", "scale_embeddings", "query_scalar"),
        )
    }
    raise ValueError(
        f"no family in {[family.model_type for family in FAMILIES]} has this combination, so that "
        f"transformers could not load it: {', '.join(f'{name}={value}' for name, value in traits.items())}"
    )
