"""Preference pairs: prompts with a chosen and a rejected completion."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.algorithms.preference.objective import PreferenceBatch
from jaxrl_llm.data.demonstrations import encode_conversation, encode_text
from jaxrl_llm.data.formats import Message, Prompt, PromptFormat, check_messages, column_of
from jaxrl_llm.data.interfaces import Row, RowSource
from jaxrl_llm.data.rows import Overlong, Ragged, read_rows, rows_that_fit
from jaxrl_llm.models.checkpoints.tokenizers import stop_token_ids

TURN = re.compile(r"\n\n(Human|Assistant):")
"""What begins a turn of a dialogue in the format of HH-RLHF."""


class Pair(NamedTuple):
    """A prompt with two completions; completions are text, or the assistant's message."""

    prompt: Prompt
    chosen: Any
    rejected: Any


class EncodedPair(NamedTuple):
    """The same as token ids, int32."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


@dataclass(frozen=True)
class PreferenceFormat:
    """How a row becomes a preference pair; a `RowFormat`.

    Either a prompt and two completions, each text or messages, or two whole dialogues, which have a beginning in
    common and differ in the assistant's last turn.
    """

    prompt: PromptFormat = PromptFormat()
    """How a row becomes a prompt; of whole dialogues, its system message and `conversational` are used."""

    chosen_column: str = "chosen"
    """Column with the better completion, or dialogue."""

    rejected_column: str = "rejected"
    """Column with the worse one."""

    whole_dialogues: bool = False
    """The columns hold whole dialogues: lists of messages, or text as in HH-RLHF, where a turn begins with a blank
    line and "Human:" or "Assistant:". Rows whose two beginnings differ, or with an empty reply, are dropped and
    counted. Text stays text, which ends with "Assistant:", unless `prompt.conversational` makes it messages."""

    def dataset(
        self,
        source: RowSource,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        overlong: Overlong = "raise",
        max_rows: int | None = None,
    ) -> PreferenceDataset:
        """See `RowFormat`."""
        return PreferenceDataset(
            source,
            tokenizer,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            preference_format=self,
            overlong=overlong,
            max_rows=max_rows,
        )

    def pair(self, row: Row) -> Pair | None:
        """The pair of a row; `None` if its dialogues have no beginning in common, or a reply is empty.

        Raises:
            ValueError: a column is missing or is not what it should be.
        """
        chosen, rejected = column_of(row, self.chosen_column), column_of(row, self.rejected_column)
        if not self.whole_dialogues:
            return Pair(self.prompt.prompt(row), chosen, rejected)
        (beginning, chosen), (other, rejected) = (self._dialogue(dialogue) for dialogue in (chosen, rejected))
        if beginning != other or not _content(chosen).strip() or not _content(rejected).strip():
            return None
        return Pair(beginning, chosen, rejected)

    def _dialogue(self, dialogue: Any) -> tuple[Prompt, Any]:
        """All but the last turn, and the last turn."""
        if isinstance(dialogue, str) and self.prompt.conversational:
            dialogue = dialogue_messages(dialogue)
        if isinstance(dialogue, str):
            if self.prompt.system is not None:
                raise ValueError("a system message needs conversational dialogues: set conversational=True")
            places = [turn for turn in TURN.finditer(dialogue) if turn[1] == "Assistant"]
            if not places:
                raise ValueError(f"the dialogue has no turn of the assistant: {dialogue!r:.200}")
            return dialogue[: places[-1].end()], dialogue[places[-1].end() :]
        *beginning, last = check_messages(dialogue)
        if last["role"] != "assistant" or not beginning:
            raise ValueError(f"a dialogue is a prompt and the assistant's last message, got {dialogue!r:.200}")
        return self.prompt.with_system(beginning), last


class PreferenceDataset:
    """A source's preference pairs, checked and tokenised once; a `RowDataset` of `PreferenceBatch`.

    Args:
        source: The rows, as `open_source` gives them.
        tokenizer: What `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes; not kept.
        max_prompt_length: Tp, tokens per prompt.
        max_completion_length: Tc, tokens per completion, the end of sequence included.
        preference_format: How a row becomes a pair; columns `prompt`, `chosen` and `rejected` by default.
        overlong: What to do with longer ones: `"raise"`, or `"drop"` the pair and count it.
        max_rows: Use the first rows only.

    Attributes:
        overlong: Number of pairs that were too long.
        unusable: Number of rows whose dialogues are no pair.
        dropped: Both together.
        fingerprint: Number of rows and of pairs and a hash of every token.

    Raises:
        ValueError: No rows, a row that gives no pair, or one that is too long; names its number.
    """

    def __init__(
        self,
        source: RowSource,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        preference_format: PreferenceFormat | None = None,
        overlong: Overlong = "raise",
        max_rows: int | None = None,
    ) -> None:
        form, stop_tokens = preference_format or PreferenceFormat(), stop_token_ids(tokenizer)

        def encode(row: Row) -> EncodedPair | None:
            pair = form.pair(row)
            if pair is None:
                return None
            prompt, chosen = encode_completion(pair.prompt, pair.chosen, tokenizer, stop_tokens)
            return EncodedPair(prompt, chosen, encode_completion(pair.prompt, pair.rejected, tokenizer, stop_tokens)[1])

        every = read_rows(source, encode, max_rows=max_rows)
        pairs = [pair for pair in every if pair is not None]
        if not pairs:
            raise ValueError(f"none of {len(every)} rows is a pair of dialogues with one beginning and two replies")
        fitting = rows_that_fit(
            [len(pair.prompt) for pair in pairs],
            [max(len(pair.chosen), len(pair.rejected)) for pair in pairs],
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            overlong=overlong,
        )
        self.overlong, self.unusable = len(pairs) - len(fitting), len(every) - len(pairs)
        self.dropped = self.overlong + self.unusable
        self._widths = max_prompt_length, max_completion_length
        self._pad = tokenizer.pad_token_id or 0  # never read: lengths and masks say what is a token
        kept = [pairs[number] for number in fitting]
        self._prompts = Ragged([pair.prompt for pair in kept])
        self._sides = Ragged([pair.chosen for pair in kept]), Ragged([pair.rejected for pair in kept])
        content = content_hash(self._prompts, *self._sides)
        self.fingerprint = {"rows": len(every), "pairs": len(kept), "content": content}

    def __len__(self) -> int:
        return len(self._prompts.lengths)

    def batch(self, items: Sequence[int] | np.ndarray, /) -> PreferenceBatch:
        """The pairs numbered `items` (0 to `len(self) - 1`); repeats are allowed."""
        numbers = np.asarray(items, np.int64)
        prompt_width, width = self._widths
        lengths = np.stack([side.lengths[numbers] for side in self._sides], axis=1)
        return PreferenceBatch(
            prompt=self._prompts.padded(numbers, prompt_width, fill=self._pad),
            prompt_lengths=self._prompts.lengths[numbers],
            completion=np.stack([side.padded(numbers, width, fill=self._pad) for side in self._sides], axis=1),
            mask=np.arange(width) < lengths[..., None],
        )


def dialogue_messages(text: str) -> list[Message]:
    """The messages of a dialogue in the format of HH-RLHF.

    Raises:
        ValueError: it does not begin with a turn.
    """
    beginning, *turns = TURN.split(text)
    if beginning.strip() or not turns:
        raise ValueError(f'a dialogue begins with a blank line and "Human:", got {text!r:.200}')
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def _content(reply: Any) -> str:
    return reply if isinstance(reply, str) else reply["content"]


def encode_completion(
    prompt: Prompt, completion: Any, tokenizer: Any, stop_tokens: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a prompt and of a completion, its end included.

    Raises:
        ValueError: they do not go together, or the tokenizer cannot write them.
    """
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise ValueError("the prompt is text and the completion is not: make both text, or both messages")
        encoded = encode_text(prompt, completion, tokenizer)
    else:
        if isinstance(completion, str):
            completion = {"role": "assistant", "content": completion}
        answer = check_messages(completion if isinstance(completion, list | tuple) else [completion])
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise ValueError(f"a completion is one message of the assistant, got {answer!r:.200}")
        encoded = encode_conversation(
            [*prompt, *answer], tokenizer, train_on="completion_only", stop_tokens=stop_tokens
        )
    if not encoded.mask.all():
        raise ValueError("the chat template writes something within the assistant's turn that is not the assistant's")
    return encoded.prompt, encoded.completion


def content_hash(*parts: Ragged) -> str:
    """A short hash of all lengths and values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.lengths.tobytes())
        digest.update(part.values.tobytes())
    return digest.hexdigest()[:16]
