"""The bytes of tokens, by the decoders of real tokenizers."""

from __future__ import annotations

from typing import Any

import pytest

from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.models.checkpoints.token_bytes import token_bytes
from tests.data.small_tokenizers import KINDS, small_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_text_are_those_of_its_tokens(kind):
    tokenizer = small_tokenizer(kind)
    found, spaces = token_bytes(tokenizer)
    assert spaces == (kind not in ("never", "bytes"))
    for text in ("the capital of France", "漢字 é\n\n", " yes", "x<|end|>y \t", "a\u00a0b"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(found[number] for number in ids).removeprefix(b" " * spaces).decode() == tokenizer.decode(ids)
    assert found[tokenizer.convert_tokens_to_ids("<|end|>")] == b"<|end|>"


def test_a_character_tokenizer_tells_them():
    assert token_bytes(CharTokenizer("a漢")) == ([b"<pad>", b"<eos>", b"a", "漢".encode()], 0)


def test_an_added_token_of_other_letters_stands_for_itself():
    """Spaces are none of GPT-2's letters, and `é` is one, of another byte."""
    tokenizer = small_tokenizer("bytes")
    tokenizer = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    )
    tokenizer.add_tokens(["    ", "<é>"])
    found, _ = token_bytes(tokenizer)
    assert found[-2:] == [b"    ", b"<\xe9>"]


def test_tokenizers_that_do_not_tell_or_decode_otherwise_raise():
    from tokenizers import decoders

    class Tidy(CharTokenizer):
        def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
            return super().decode(ids, skip_special_tokens=skip_special_tokens).replace(" .", ".")

    with pytest.raises(ValueError, match="a Tidy decodes a text to other bytes"):
        token_bytes(Tidy("a ."))
    with pytest.raises(ValueError, match="a object stand for is not known: give it a method"):
        token_bytes(object())
    for decoder, name in ((decoders.WordPiece(), "WordPiece"), (decoders.Metaspace(), "Metaspace")):
        tokenizer = small_tokenizer("never")
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.decoder = decoder
        with pytest.raises(ValueError, match=f"whose decoder is {name}"):
            token_bytes(type(tokenizer)(tokenizer_object=backend))
