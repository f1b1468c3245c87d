"""Tokenizers from GGUF files, built from the stored vocabulary without PyTorch or sentencepiece.

A GGUF file holds tokens, merges or scores, and the *name* of the way in which text is split before merging
(`tokenizer.ggml.pre`). The splits here are those of the original `tokenizer.json` files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from jaxrl_llm.models.checkpoints.gguf_vocabulary import read_vocabulary
from jaxrl_llm.models.entries import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _by_case(ending: str, digits: str) -> str:
    """Words end where a capital follows a small letter."""
    before, high, low = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = f"{before}{high}*{low}+{ending}|{before}{high}+{low}*{ending}|{digits}"
    return words + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_TEKKEN, _GPT4O = _by_case("", r"\p{N}"), _by_case(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")

_GPT2_LIKE = ("gpt-2",)
_DIGIT_LIKE = ("smollm", "starcoder", "refact")
_LLAMA3_LIKE = ("llama-bpe", "llama3", "llama-v3", "falcon3")
_QWEN2_LIKE = ("qwen2", "deepseek-r1-qwen", "stablelm2")
_TEKKEN_LIKE = ("tekken",)
_GPT4O_LIKE = ("gpt-4o",)
_WHOLE_WORDS = (*_LLAMA3_LIKE, *_TEKKEN_LIKE)  # a word that is a token is taken before any merge is tried


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
        ValueError: parts are missing or cannot be meant, or a kind of tokenizer, or a split of text before merging,
            that is not known.
    """
    # Imported late: transformers takes a second, and models load without it.
    from jaxrl_llm.models.checkpoints.locate import import_transformers

    entries = read_vocabulary(path)
    kind, pre, tokens = entries.get("ggml.model"), entries.get("ggml.pre"), entries["ggml.tokens"]
    if kind == "gpt2":
        backend = _byte_level(path, pre, tokens, entries.get("ggml.merges", ()))
        add_bos = pre in _WHOLE_WORDS
    elif kind == "llama":
        backend = _sentencepiece(tokens, entries["ggml.scores"], entries.get("ggml.add_space_prefix", True))
        add_bos = True
    else:
        raise ValueError(f"{path}: tokenizer.ggml.model={shown(kind)} is not supported; known: gpt2, llama")
    _add_special_tokens(backend, tokens, entries["ggml.token_type"])

    def token(name: str) -> str | None:
        number = entries.get(f"ggml.{name}_token_id")
        return None if number is None else tokens[number]

    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        add_bos_token=entries.get("ggml.add_bos_token", add_bos),
        add_eos_token=entries.get("ggml.add_eos_token", False),
        chat_template=entries.get("chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _byte_level(path: Path, pre: str | None, tokens: Sequence[str], merges: Sequence[str]) -> Tokenizer:
    """Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM, GPT-OSS)."""
    split = {
        **dict.fromkeys(_LLAMA3_LIKE, _LLAMA3),
        **dict.fromkeys(_QWEN2_LIKE, _QWEN2),
        **dict.fromkeys(_TEKKEN_LIKE, _TEKKEN),
        **dict.fromkeys(_GPT4O_LIKE, _GPT4O),
    }
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocab = {token: number for number, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=pairs, ignore_merges=pre in _WHOLE_WORDS))
    except Exception as error:  # the package raises no other type
        raise ValueError(f"{path}: tokens and merges are inconsistent: {error}") from error
    tokenizer.decoder = decoders.ByteLevel()
    if pre in _QWEN2_LIKE:
        tokenizer.normalizer = normalizers.NFC()
    if pre in split:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split[pre]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif pre in (*_GPT2_LIKE, *_DIGIT_LIKE):
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if pre in _DIGIT_LIKE else words
    else:
        known = ", ".join((*_GPT2_LIKE, *_DIGIT_LIKE, *split))
        raise ValueError(
            f"{path}: tokenizer.ggml.pre={shown(pre)} is not known, so that text would be split differently than "
            f"in training; known: {known}. Load the tokenizer from the model's Hugging Face folder instead"
        )
    return tokenizer


def _sentencepiece(tokens: Sequence[str], scores: Sequence[float], prefix: bool) -> Tokenizer:
    """BPE over characters with bytes as the fallback (Llama 2, Mistral, TinyLlama)."""
    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = "<unk>" if "<unk>" in vocab else None
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=_merges(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
    return tokenizer


def _merges(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a scored vocabulary implies: every split of a token in two, best token first."""
    found = [
        (scores[number], left, token)
        for token, number in vocab.items()
        for left in range(1, len(token))
        if token[:left] in vocab and token[left:] in vocab
    ]
    found.sort(key=lambda merge: (-merge[0], vocab[merge[2]], vocab[merge[2][: merge[1]]]))
    return [(token[:left], token[left:]) for _, left, token in found]


def _add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Makes control tokens special, and user-defined ones whole."""
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined])
