"""What a GGUF file says of its tokenizer: the entries `tokenizer.…`, each one that may be meant."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from gguf import TokenType

from jaxrl_llm.models.checkpoints.gguf import contents, open_gguf
from jaxrl_llm.models.entries import (
    Entry,
    Json,
    Table,
    check_entries,
    errors_name,
    list_of,
    number,
    shown,
    text,
    truth,
    whole,
)

PREFIX = "tokenizer."
_STOPS = tuple(f"ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
_SPECIAL = (*_STOPS, *(f"ggml.{name}_token_id" for name in ("bos", "unknown", "padding")))

_ENTRIES: Table = {
    "ggml.model": text("kind of tokenizer"),
    "ggml.pre": text("how text is split before merging"),
    "ggml.tokens": list_of(Entry(lambda value: isinstance(value, str), "a text", "the vocabulary")),
    "ggml.token_type": list_of(whole("kind of each token", 0, max(TokenType))),
    "ggml.scores": list_of(number("of each token", -1e30, 1e30)),
    "ggml.merges": list_of(text("pairs of tokens that make another")),
    "ggml.add_bos_token": truth("whether a text begins with a token of its own"),
    "ggml.add_eos_token": truth("whether a text ends with a token of its own"),
    "ggml.add_space_prefix": truth("whether a text begins with a space"),
    "chat_template": text("how a conversation is written"),
}


def read_vocabulary(path: Path) -> dict[str, Any]:
    """The entries on the tokenizer of a GGUF file, without `tokenizer.`.

    Raises:
        ValueError: an entry is missing, is none that may be meant, or does not fit the others or the embedding.
    """
    reader = open_gguf(path)
    known = {name: field for name, field in reader.fields.items() if name.startswith(PREFIX)}
    entries = {name.removeprefix(PREFIX): contents(path, field) for name, field in known.items()}
    rows = {tensor.name: int(tensor.shape[-1]) for tensor in reader.tensors}.get("token_embd.weight")
    with errors_name(path):
        check_entries(entries, _ENTRIES, PREFIX)
        tokens = _required(entries, "ggml.tokens")
        check_entries(entries, {key: whole("one of the tokens", 0, len(tokens) - 1) for key in _SPECIAL}, PREFIX)
        _check_tokens(entries, tokens, rows)
        _check_merges(entries, tokens)
    return entries


def special_ids(path: Path) -> dict[str, Any]:
    """Special token ids of a GGUF file's tokenizer, under the names of `generation_config.json`.

    Raises:
        ValueError: as in `read_vocabulary`; or there is no token that ends a text.
    """
    entries = read_vocabulary(path)
    ids = {"bos_token_id": entries.get("ggml.bos_token_id"), "pad_token_id": entries.get("ggml.padding_token_id")}
    ids = {key: value for key, value in ids.items() if value is not None}
    stops = [entries[key] for key in _STOPS if key in entries]
    if not stops:
        raise ValueError(f"{path}: {PREFIX}{_STOPS[0]} is missing: no token would end a completion")
    return {key: value for key, value in ids.items() if value is not None} | {
        "eos_token_id": list(dict.fromkeys(stops))
    }


def _required(entries: Json, key: str) -> Any:
    if not entries.get(key):
        raise ValueError(f"{PREFIX}{key} is missing")
    return entries[key]


def _check_tokens(entries: Json, tokens: list[str], rows: int | None) -> None:
    """What there is for each token is there for all of them, and each of them is one row of the embedding."""
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise ValueError(f"{PREFIX}ggml.tokens has {shown(twice)} more than once")
    if rows is not None and rows != len(tokens):
        raise ValueError(
            f"{PREFIX}ggml.tokens has {len(tokens)} tokens, token_embd.weight {rows} rows: they must be as many"
        )
    for key in ("ggml.token_type", *(["ggml.scores"] if entries.get("ggml.model") == "llama" else [])):
        if len(_required(entries, key)) != len(tokens):
            raise ValueError(f"{PREFIX}{key} has {len(entries[key])} elements for {len(tokens)} tokens")


def _check_merges(entries: Json, tokens: list[str]) -> None:
    """Byte-level tokens of several characters come of merges, without which text falls into single characters."""
    if entries.get("ggml.model") != "gpt2" or entries.get("ggml.merges"):
        return
    kinds = zip(tokens, entries["ggml.token_type"], strict=True)
    merged = [token for token, kind in kinds if kind == TokenType.NORMAL and len(token) > 1]
    if merged:
        raise ValueError(f"{PREFIX}ggml.merges is missing: tokens such as {shown(merged[0])} would never be made")
