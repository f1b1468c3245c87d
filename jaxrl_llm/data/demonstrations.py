"""Demonstrations: prompts with the completions to be learned, and conversations with the assistant's turns marked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from jaxrl_llm.algorithms.supervised import Demonstrations
from jaxrl_llm.data.conversations import Encoded, TrainOn, encode_conversation, encode_text
from jaxrl_llm.data.formats import Message, PromptFormat, check_messages, column_of
from jaxrl_llm.data.interfaces import Row, RowSource
from jaxrl_llm.data.packing import PackedDataset
from jaxrl_llm.data.rows import Overlong, Ragged, read_rows, rows_that_fit
from jaxrl_llm.models.checkpoints.tokenizers import stop_token_ids


@dataclass(frozen=True)
class DemonstrationFormat:
    """How a row becomes a demonstration; a `RowFormat`.

    Either a prompt and a completion, each text or messages, or a whole conversation in one column.

    Raises:
        ValueError: an impossible choice.
    """

    prompt: PromptFormat = PromptFormat()
    """How a row becomes a prompt; of conversations, only its system message is used."""

    completion_column: str = "completion"
    """Column with the completion: text, or messages (an assistant's answer)."""

    messages_column: str | None = None
    """Column with whole conversations, in place of prompts and completions."""

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

    def dataset(
        self,
        source: RowSource,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        overlong: Overlong = "raise",
        max_rows: int | None = None,
    ) -> DemonstrationDataset | PackedDataset:
        """See `RowFormat`."""
        dataset = DemonstrationDataset(
            source,
            tokenizer,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            demonstration_format=self,
            overlong=overlong,
            max_rows=max_rows,
        )
        return dataset if self.packed_length is None else dataset.packed(self.packed_length)

    def demonstration(self, row: Row) -> tuple[str, str] | list[Message]:
        """A text prompt and its completion, or a conversation.

        Raises:
            ValueError: a column is missing or is not what it should be.
        """
        if self.messages_column is not None:
            return self.prompt.with_system(check_messages(column_of(row, self.messages_column)))
        prompt, completion = self.prompt.prompt(row), column_of(row, self.completion_column)
        if isinstance(prompt, str) and isinstance(completion, str):
            if self.train_on == "assistant_only":
                raise ValueError("train_on='assistant_only' needs conversations, but the prompt is text")
            return prompt, completion
        if isinstance(prompt, str):
            raise ValueError("the prompt is text and the completion is not: make both text, or both messages")
        if isinstance(completion, str):
            return [*prompt, {"role": "assistant", "content": completion}]
        answer = check_messages(completion)
        if self.train_on == "completion_only" and len(answer) > 1:
            raise ValueError(f"the completion has {len(answer)} messages; train_on='assistant_only' takes several")
        return [*prompt, *answer]


class DemonstrationDataset:
    """A source's demonstrations, formatted, checked and tokenised once; a `RowDataset` of `Demonstrations`, G = 1.

    Every row is read at construction, so that what cannot be used is found before training starts.

    Args:
        source: The rows, as `open_source` gives them.
        tokenizer: What `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes; not kept.
        max_prompt_length: Tp, tokens per prompt.
        max_completion_length: Tc, tokens per completion, the end of sequence included.
        demonstration_format: How a row becomes a demonstration; columns `prompt` and `completion` by default.
        overlong: What to do with longer ones: `"raise"`, or `"drop"` and count them.
        max_rows: Use the first rows only.

    Attributes:
        dropped: Number of rows that were too long.
        encoded: The demonstrations kept, as token ids.
        rows: Numbers in the source of the rows kept.
        fingerprint: Number of rows and of demonstrations and a hash of every token and mask.

    Raises:
        ValueError: No rows, a row that gives no demonstration, or one that is too long; names its number.
    """

    def __init__(
        self,
        source: RowSource,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        demonstration_format: DemonstrationFormat | None = None,
        overlong: Overlong = "raise",
        max_rows: int | None = None,
    ) -> None:
        form, stop_tokens = demonstration_format or DemonstrationFormat(), stop_token_ids(tokenizer)

        def encode(row: Row) -> Encoded:
            shown = form.demonstration(row)
            if isinstance(shown, tuple):
                return encode_text(*shown, tokenizer)
            return encode_conversation(shown, tokenizer, train_on=form.train_on, stop_tokens=stop_tokens)

        every = read_rows(source, encode, max_rows=max_rows)
        self.rows = rows_that_fit(
            [len(row.prompt) for row in every],
            [len(row.completion) for row in every],
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            overlong=overlong,
        )
        self.dropped = len(every) - len(self.rows)
        self._widths = max_prompt_length, max_completion_length
        self._pad = tokenizer.pad_token_id or 0  # never read: lengths and masks say what is a token
        kept = [every[row] for row in self.rows]
        self.encoded = kept
        self._prompts = Ragged([row.prompt for row in kept])
        self._completions = Ragged([row.completion for row in kept])
        self._masks = Ragged([row.mask for row in kept])
        digest = hashlib.sha256()
        for part in (self._prompts, self._completions, self._masks):
            digest.update(part.lengths.tobytes())
            digest.update(part.values.tobytes())
        self.fingerprint = {"rows": len(every), "demonstrations": len(kept), "content": digest.hexdigest()[:16]}

    def __len__(self) -> int:
        return len(self.rows)

    def packed(self, length: int) -> PackedDataset:
        """The same demonstrations, several in a row of `length` tokens; see `PackedDataset`."""
        return PackedDataset(self.encoded, length, rows=self.rows, fingerprint=self.fingerprint, dropped=self.dropped)

    def batch(self, items: Sequence[int] | np.ndarray, /) -> Demonstrations:
        """The demonstrations numbered `items` (0 to `len(self) - 1`); repeats are allowed."""
        numbers = np.asarray(items, np.int64)
        prompt_width, width = self._widths
        return Demonstrations(
            prompt=self._prompts.padded(numbers, prompt_width, fill=self._pad),
            prompt_lengths=self._prompts.lengths[numbers],
            completion=self._completions.padded(numbers, width, fill=self._pad)[:, None],
            mask=self._masks.padded(numbers, width, fill=False)[:, None],
        )
