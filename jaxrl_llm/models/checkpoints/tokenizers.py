"""Tokenizers of checkpoints, and the tokens at which their completions stop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from jaxrl_llm.models.checkpoints.locate import import_transformers, locate


class Tokenizer(Protocol):
    """What is asked of a tokenizer: a part of the interface of `transformers`' fast tokenizers."""

    chat_template: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: list[int], *, skip_special_tokens: bool = ...) -> str:
        """Text of token ids."""
        ...

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = ..., tokenize: bool = ...
    ) -> str:
        """A conversation as one text."""
        ...

    def save_pretrained(self, folder: str) -> Any:
        """Writes the tokenizer's files."""
        ...


def load_tokenizer(name: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint, with its chat template.

    Args:
        name: a folder, a `.gguf` file, or a hub id.
        revision: branch, tag or commit of a hub id.

    Returns:
        A `transformers` fast tokenizer (see `Tokenizer` for the part of it that is used).

    Raises:
        ValueError: there is no such checkpoint, it has no tokenizer, or one that is not known.
    """
    path = locate(name, weights=False, revision=revision)
    if path.suffix == ".gguf" and path.is_file():
        from jaxrl_llm.models.checkpoints.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(path)
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((path / file).exists() for file in files):
        raise ValueError(f"{path} has no tokenizer: none of {', '.join(files)} is there")
    try:
        return import_transformers().AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise ValueError(f"the tokenizer in {path} cannot be loaded: {error}") from error


def stop_token_ids(tokenizer: Any, generation_config: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """The tokens that end a completion.

    They are the tokenizer's end of sequence, those of the generation configuration, and the token with which
    the chat template ends an assistant's turn (`<|im_end|>`, `<|eot_id|>`), which many checkpoints do not
    list.

    Args:
        tokenizer: see `Tokenizer`.
        generation_config: the checkpoint's, from `load_generation_config`.

    Returns:
        Token ids without repetition, the tokenizer's end of sequence first; empty if none is known.
    """
    listed = (generation_config or {}).get("eos_token_id")
    listed = listed if isinstance(listed, list | tuple) else [listed]
    found = [tokenizer.eos_token_id, *listed, _end_of_turn(tokenizer)]
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that directly follows an assistant's message in the chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    said = "jaxrl"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    tail = tokenizer.encode(text.rpartition(said)[2].lstrip(), add_special_tokens=False)
    special = {
        *tokenizer.all_special_ids,
        *(n for n, t in tokenizer.added_tokens_decoder.items() if t.special),
    }
    return tail[0] if tail and tail[0] in special else None
