"""Text models inside of models that also see: a `text_config` in `config.json`, and tensors under a name of its own.

Only the text model is read, and exported as the text model that it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxrl_llm.models.entries import Json, shown


class Wrapper(NamedTuple):
    """A class of models around a text model."""

    architecture: str
    """Name of the `transformers` class."""
    text_type: str
    """`model_type` of the text model, which is a `Family`."""
    text_architecture: str
    """The class that the text model has by itself."""
    defaults: Json
    """What `text_config` means where it does not say: files are written without what is by default."""


WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper(
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
        },
    ),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", "mistral", "MistralForCausalLM", {}),
}
"""By `model_type`."""

_TEXT = re.compile(r"(?:model\.)?language_model\.(?=.)")
_OTHER = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")


def text_config(config: Json) -> Json:
    """The `config.json` of the text model alone; of a model that is nothing else, as it is.

    Raises:
        ValueError: `text_config` is no object, or of another family than this class has inside.
    """
    if (wrapper := WRAPPERS.get(str(config.get("model_type")))) is None:
        return config
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        raise ValueError(f"text_config={shown(inner)} must be an object, where model_type={config['model_type']!r}")
    if (found := inner.get("model_type", wrapper.text_type)) != wrapper.text_type:
        raise ValueError(
            f"text_config.model_type={shown(found)} is not supported inside of {config['model_type']!r}: "
            f"{wrapper.text_type!r} is"
        )
    architectures = config.get("architectures") or [wrapper.architecture]
    own = {
        "model_type": wrapper.text_type,
        "architectures": [wrapper.text_architecture if a == wrapper.architecture else a for a in architectures],
    }
    outer = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
    return {**wrapper.defaults, **inner, **outer, **own}


def text_tensor(name: str) -> str | None:
    """The name that a tensor of the whole has in the text model alone; `None`: it belongs to what sees.

    Of both spellings, `language_model.model.…` and `model.language_model.…`.
    """
    if _OTHER.match(name):
        return None
    inner = _TEXT.sub("", name, count=1) if _TEXT.match(name) else name
    return inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}"


def left_out(config: Json) -> str | None:
    """A sentence on what is not read of a checkpoint, if anything is not."""
    if (wrapper := WRAPPERS.get(str(config.get("model_type")))) is None:
        return None
    return (
        f"{wrapper.architecture}: the text model alone is read, without vision_tower and multi_modal_projector; it is "
        f"saved as a {wrapper.text_architecture}"
    )
