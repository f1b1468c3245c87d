"""Tokenizers of checkpoints, and the tokens at which their completions stop."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxrl_llm.models.checkpoints.chat_templates import apply_template
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


def load_tokenizer(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Any:
    """The tokenizer of a checkpoint, with its chat template.

    Args:
        name: a folder, a `.gguf` file, or a hub id.
        revision: branch, tag or commit of a hub id.
        chat_template: a file or the text of another template.
        template_arguments: what the template is given beside the conversation, such as `{"enable_thinking": False}`.

    Returns:
        A `transformers` fast tokenizer (see `Tokenizer` for the part of it that is used).

    Raises:
        ValueError: there is no such checkpoint, it has no tokenizer, or one that is not known, or the template cannot
            be used.
    """
    tokenizer = _load(locate(name, weights=False, revision=revision))
    apply_template(tokenizer, chat_template, template_arguments or {})
    return tokenizer


def _load(path: Path) -> Any:
    if path.suffix == ".gguf" and path.is_file():
        from jaxrl_llm.models.checkpoints.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(path)
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((path / file).exists() for file in files):
        raise ValueError(f"{path} has no tokenizer: none of {', '.join(files)} is there")
    try:
        transformers = import_transformers()
        kind = transformers.PreTrainedTokenizerFast if _is_generic(path) else transformers.AutoTokenizer
        return kind.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # of many kinds, and of several packages: whatever the files hold
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the tokenizer in {path} cannot be loaded: {reason}") from error


_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")


def _is_generic(path: Path) -> bool:
    """Whether a tokenizer is surely of the class that reads `tokenizer.json` as it is: of a Llama that says so.

    `AutoTokenizer` finds the same one, after it has imported the model's configuration, and with it PyTorch wherever
    that is installed, which takes seconds.
    """
    files = [path / name for name in ("config.json", "tokenizer_config.json", "tokenizer.json")]
    if not all(file.exists() for file in files):
        return False
    model, tokenizer = (json.loads(file.read_text(encoding="utf-8")) for file in files[:2])
    return (
        model.get("model_type") == "llama"
        and tokenizer.get("tokenizer_class") in _GENERIC
        and "auto_map" not in tokenizer
    )


def known_tokens(tokenizer: Any) -> int:
    """The number of ids that a tokenizer can read: its highest one, and 1. Embeddings are often longer than that."""
    vocabulary = getattr(tokenizer, "get_vocab", None)
    return len(tokenizer) if vocabulary is None else max(vocabulary().values()) + 1


def token_table(tokenizer: Any) -> dict[int, str]:
    """Every id that a tokenizer can read, and what it stands for."""
    vocabulary = getattr(tokenizer, "get_vocab", None)
    if vocabulary is None:
        return {token: tokenizer.decode([token], skip_special_tokens=False) for token in range(len(tokenizer))}
    return {token: text for text, token in vocabulary().items()}


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


_PROBES = (("user", "assistant"), ("system", "user", "assistant"), ("assistant",))
"""Conversations of which chat templates accept at least one."""


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that directly follows an assistant's message in the chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    said = "jaxrl"
    for roles in _PROBES:
        messages = [{"role": role, "content": said if role == "assistant" else "hello"} for role in roles]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # templates raise errors of their own, of whatever type, where they refuse
            continue
        if said not in text:
            continue
        tail = tokenizer.encode(text.rpartition(said)[2].lstrip(), add_special_tokens=False)
        special = {
            *tokenizer.all_special_ids,
            *(n for n, t in tokenizer.added_tokens_decoder.items() if t.special),
        }
        return tail[0] if tail and tail[0] in special else None
    return None
