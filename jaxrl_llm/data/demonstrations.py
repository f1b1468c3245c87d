"""Demonstrations: prompts with the completions to be learned, and conversations with the assistant's turns marked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

import numpy as np

from jaxrl_llm.algorithms.supervised import Demonstrations
from jaxrl_llm.data.conversations import Encoded, encode_conversation, encode_text, encode_whole_text
from jaxrl_llm.data.encoded_rows import EncodedDataset, EncodedRows, Ragged
from jaxrl_llm.data.formats import PromptFormat, column_of
from jaxrl_llm.data.interfaces import Row
from jaxrl_llm.data.messages import Message, check_messages, tools_of
from jaxrl_llm.data.packing import PackedDataset
from jaxrl_llm.data.rows import RowFormat
from jaxrl_llm.data.turns import TrainOn
from jaxrl_llm.models.checkpoints.tokenizers import stop_token_ids


@dataclass(frozen=True)
class DemonstrationFormat(RowFormat[Encoded, "DemonstrationDataset | PackedDataset"]):
    """How a row becomes a demonstration; a `RowFormat`.

    Either a prompt and a completion, each text or messages, or a whole conversation in one column, or a whole text.

    Raises:
        ValueError: an impossible choice.
    """

    prompt: PromptFormat = PromptFormat()
    """How a row becomes a prompt; of conversations, only its system message is used."""

    completion_column: str = "completion"
    """Column with the completion: text, or messages (an assistant's answer), or one message."""

    messages_column: str | None = None
    """Column with whole conversations, in place of prompts and completions. `None`: `messages`, where the first row has
    it and no completion."""

    text_column: str | None = None
    """Column with whole texts, every token of which is trained but the first (the beginning of sequence, if the
    tokenizer has one). `None`: `text`, where the first row has it and none of the others."""

    train_on: TrainOn = "completion_only"
    """What is trained of a conversation: the last turn alone, which must be the assistant's, or every turn of the
    assistant. All before it, and between its turns, is read and not trained."""

    packed_length: int | None = None
    """Tokens of rows into which several demonstrations are packed, prompts included, to waste less on padding;
    `None`: one demonstration a row."""

    def __post_init__(self) -> None:
        if self.packed_length is not None and self.packed_length < 2:
            raise ValueError(f"packed_length={self.packed_length} must be at least 2, or None")
        if self.train_on not in get_args(TrainOn):
            raise ValueError(f"train_on is one of {get_args(TrainOn)}, got {self.train_on!r}")
        if self.messages_column is not None and self.text_column is not None:
            raise ValueError(
                f"messages_column={self.messages_column!r} and text_column={self.text_column!r}: rows are one of both"
            )

    def settled(self, row: Row) -> Self:
        """See `RowFormat`."""
        prompt, completion = self.prompt.consumed_column, self.completion_column
        named = self.messages_column is not None or self.text_column is not None
        if named or (prompt, completion) != ("prompt", "completion") or completion in row:
            return self
        if "messages" in row:
            return dataclasses.replace(self, messages_column="messages")
        if prompt in row:
            return self
        if "text" in row:
            return dataclasses.replace(self, text_column="text")
        raise ValueError(
            f"row 0: neither {prompt!r} nor {completion!r} is a column (columns: {', '.join(row)}): name them by "
            "prompt.prompt_column (or prompt.template) and completion_column, whole conversations by messages_column, "
            "whole texts by text_column"
        )

    def encoder(self, tokenizer: Any) -> Callable[[Row], list[Encoded]]:
        """See `RowFormat`."""
        stop_tokens = stop_token_ids(tokenizer)

        def encode(row: Row) -> list[Encoded]:
            if self.text_column is not None:
                return [encode_whole_text(self._text(row, self.text_column), tokenizer, stop_tokens=stop_tokens)]
            shown = self.demonstration(row)
            if isinstance(shown, tuple):
                return [encode_text(*shown, tokenizer, stop_tokens=stop_tokens)]
            tools = tools_of(row, shown)
            return [encode_conversation(shown, tokenizer, train_on=self.train_on, stop_tokens=stop_tokens, tools=tools)]

        return encode

    def collect(self, encoded: EncodedRows[Encoded]) -> DemonstrationDataset | PackedDataset:
        """See `RowFormat`."""
        dataset = DemonstrationDataset(encoded)
        return dataset if self.packed_length is None else dataset.packed(self.packed_length)

    def demonstration(self, row: Row) -> tuple[str, str] | list[Message]:
        """A text prompt and its completion, or a conversation.

        Raises:
            ValueError: a column is missing or is not what it should be.
        """
        if self.messages_column is not None:
            messages = check_messages(column_of(row, self.messages_column, setting="messages_column"))
            return self.prompt.with_system(messages)
        prompt = self.prompt.prompt(row)
        completion = column_of(row, self.completion_column, setting="completion_column")
        if isinstance(prompt, str) and isinstance(completion, str):
            if self.train_on == "assistant_only":
                raise ValueError("train_on='assistant_only' needs conversations, but the prompt is text")
            return prompt, completion
        if isinstance(prompt, str):
            raise ValueError("the prompt is text and the completion is not: make both text, or both messages")
        if isinstance(completion, str):
            return [*prompt, {"role": "assistant", "content": completion}]
        answer = check_messages([completion] if isinstance(completion, Mapping) else completion)
        if self.train_on == "completion_only" and len(answer) > 1:
            raise ValueError(f"the completion has {len(answer)} messages; train_on='assistant_only' takes several")
        return [*prompt, *answer]

    def _text(self, row: Row, column: str) -> str:
        text = column_of(row, column, setting="text_column")
        if not isinstance(text, str):
            raise ValueError(
                f"the column {column!r} is a {type(text).__name__}, not text: {text!r:.200}; messages_column names "
                "conversations"
            )
        if self.train_on == "assistant_only" or self.prompt.system is not None:
            raise ValueError("train_on='assistant_only' and a system message need conversations, but rows are texts")
        return text


class DemonstrationDataset(EncodedDataset[Encoded]):
    """Demonstrations, G = 1; a `RowDataset` of `Demonstrations`. Attributes as of `EncodedDataset`."""

    def __init__(self, encoded: EncodedRows[Encoded]) -> None:
        parts = [Ragged([row[field] for row in encoded.kept]) for field in range(3)]
        super().__init__(encoded, "demonstrations", parts)

    def packed(self, length: int) -> PackedDataset:
        """The same demonstrations, several in a row of `length` tokens; see `PackedDataset`."""
        return PackedDataset(self.encoded, length, rows=self.rows, fingerprint=self.fingerprint, dropped=self.dropped)

    def batch(self, items: Sequence[int] | np.ndarray, /) -> Demonstrations:
        """The demonstrations numbered `items` (0 to `len(self) - 1`); repeats are allowed."""
        numbers = np.asarray(items, np.int64)
        completions, masks = (part.padded(numbers, self._width)[:, None] for part in self._parts)
        return Demonstrations(**self._served_prompts(numbers), completion=completions, mask=masks)
