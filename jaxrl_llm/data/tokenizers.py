"""A character-level tokenizer that needs no files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"


@dataclass(frozen=True)
class CharTokenizer:
    """One token per character, for experiments small enough to run without a checkpoint.

    Id 0 is padding, id 1 ends a text, and the characters of `alphabet` follow in their order. It writes no
    special token of its own and has no chat template. It needs neither transformers nor PyTorch.

    Args:
        alphabet: Every character that may occur, each once.

    Raises:
        ValueError: The alphabet is empty or repeats a character.
    """

    alphabet: str

    pad_token_id = 0
    eos_token_id = 1
    bos_token_id = None
    chat_template = None

    def __post_init__(self) -> None:
        if not self.alphabet:
            raise ValueError("alphabet is empty; give every character that may occur, such as '0123456789+='")
        repeated = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
        if repeated:
            raise ValueError(f"alphabet {self.alphabet!r} repeats {repeated}; give each character once")

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included (V of the model)."""
        return len(self)

    @cached_property
    def _tokens(self) -> list[str]:
        return [PAD_TOKEN, EOS_TOKEN, *self.alphabet]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: index for index, character in enumerate(self.alphabet, start=2)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns one id per character.

        Args:
            text: What to encode; `<eos>` in it is five characters, not a special token.
            add_special_tokens: Accepted for the common interface; this tokenizer adds none.

        Raises:
            ValueError: A character is not in the alphabet.
        """
        del add_special_tokens
        for position, character in enumerate(text):
            if character not in self._ids:
                raise ValueError(
                    f"character {character!r} at position {position} of {text!r} is not in the alphabet "
                    f"{self.alphabet!r}; add it to the alphabet or leave it out of the text"
                )
        return [self._ids[character] for character in text]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the exact text: `decode(encode(text)) == text`.

        Args:
            ids: Integers or an integer array.
            skip_special_tokens: Leave out padding and end of text instead of writing `<pad>` and `<eos>`.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        tokens = [int(token) for token in ids]
        for token in tokens:
            if not 0 <= token < len(self):
                raise ValueError(f"token id {token} is outside the vocabulary of {len(self)} tokens")
        return "".join(self._tokens[token] for token in tokens if token > 1 or not skip_special_tokens)

    def token_bytes(self) -> list[bytes]:
        """What each token adds to a text."""
        return [token.encode() for token in self._tokens]

    def apply_chat_template(self, messages: Any, *, add_generation_prompt: bool = False, tokenize: bool = True) -> str:
        """Raises a ValueError: there is no chat template."""
        del messages, add_generation_prompt, tokenize
        raise ValueError("a CharTokenizer has no chat template; use text prompts")

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` loads.

        Args:
            folder: Created where missing.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        # The unknown token is named but not in the vocabulary, so that an unknown character raises there too.
        backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(self._tokens)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([AddedToken(t, special=True) for t in (PAD_TOKEN, EOS_TOKEN)])
        configuration = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD_TOKEN,
            "eos_token": EOS_TOKEN,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CharTokenizer:
        """Reads what `save_pretrained` wrote.

        Raises:
            ValueError: The folder holds another kind of tokenizer.
        """
        path = Path(folder) / "tokenizer.json"
        vocabulary: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))["model"].get("vocab", {})
        tokens = sorted(vocabulary, key=vocabulary.__getitem__) if isinstance(vocabulary, dict) else []
        if tokens[:2] != [PAD_TOKEN, EOS_TOKEN] or any(len(token) != 1 for token in tokens[2:]):
            raise ValueError(f"{path} is not a character tokenizer; load it with transformers.AutoTokenizer")
        return cls("".join(tokens[2:]))
