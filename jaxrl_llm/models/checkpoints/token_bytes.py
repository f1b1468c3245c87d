"""What each token of a vocabulary adds to a text, as bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any) -> tuple[list[bytes], int]:
    """The bytes of the tokens 0, 1, … of a tokenizer, of which those of a text are a sequence.

    They are read off the decoder of a `tokenizers` backend: byte-level BPE, or pieces with `▁` for spaces and `<0x..>`
    for bytes. Another tokenizer tells them by a method `token_bytes() -> list[bytes]`. That they are those of
    `tokenizer.decode` is checked on a text of all tokens. Special tokens have the bytes of what they are written as.

    Returns:
        Bytes by id (none of an id without a token), and how many spaces decoding takes off the beginning of a text.

    Raises:
        ValueError: the tokenizer does not tell, or decodes to something else.
    """
    if (own := getattr(tokenizer, "token_bytes", None)) is not None:
        found, strip = list(own()), 0
    elif (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        found, strip = _of_backend(backend)
    else:
        raise ValueError(
            f"what bytes the tokens of a {type(tokenizer).__name__} stand for is not known: give it a method "
            "token_bytes() -> list[bytes], or use the fast tokenizer of transformers"
        )
    _check(tokenizer, found, strip)
    return found, strip


def _of_backend(backend: Any) -> tuple[list[bytes], int]:
    decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    read, strip = _reader(decoder)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    found = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        found[number] = read(token)
    return found, strip


def _reader(decoder: Any) -> tuple[Callable[[str], bytes], int]:
    """How a token's name is read, by its tokenizer's decoder, and the spaces that are taken off a text."""
    steps = decoder["decoders"] if decoder is not None and decoder["type"] == "Sequence" else [decoder]
    replaced, strip, to_bytes = [], 0, str.encode
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                to_bytes = _byte_level
            case {"type": "ByteFallback"}:
                to_bytes = _with_byte_tokens
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replaced.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(strip), "stop": 0}:
                pass
            case {"type": "Fuse"}:
                pass
            case _:
                name = "none" if step is None else step["type"]
                raise ValueError(f"what bytes tokens stand for is not known of a tokenizer whose decoder is {name}")

    def read(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        return to_bytes(token)

    return read, strip


def _with_byte_tokens(token: str) -> bytes:
    found = _BYTE.fullmatch(token)
    return token.encode() if found is None else bytes([int(found[1], 16)])


def _byte_level(token: str) -> bytes:
    """Of GPT-2's alphabet a byte a character; an added token in other characters stands for itself."""
    return bytes(map(_LETTERS.__getitem__, token)) if _LETTERS.keys() >= set(token) else token.encode()


def _letters() -> dict[str, int]:
    """GPT-2's alphabet: bytes that are letters or signs stand for themselves, the others are numbered from 256."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_LETTERS = _letters()


def _check(tokenizer: Any, found: list[bytes], strip: int) -> None:
    """Raises if the tokenizer decodes to other bytes; of tokens that end within a character it cannot tell."""
    whole = [(number, text) for number, some in enumerate(found) if (text := _text(some))]
    expected = "".join(text for _, text in whole)
    spaces = min(strip, len(expected) - len(expected.lstrip(" ")))
    if tokenizer.decode([number for number, _ in whole], skip_special_tokens=False) != expected[spaces:]:
        raise ValueError(
            f"a {type(tokenizer).__name__} decodes a text to other bytes than those of its tokens (does it clean up "
            "spaces?): no text can be found in its tokens as they come"
        )


def _text(some: bytes) -> str:
    try:
        return some.decode()
    except UnicodeDecodeError:
        return ""
