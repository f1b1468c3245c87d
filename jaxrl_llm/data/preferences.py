"""Preference pairs: prompts with a chosen and a rejected completion."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from jaxrl_llm.algorithms.preference.objective import PreferenceBatch
from jaxrl_llm.data.conversations import encode_answers
from jaxrl_llm.data.encoded_rows import EncodedDataset, EncodedRows, Ragged
from jaxrl_llm.data.formats import Prompt, PromptFormat, column_of
from jaxrl_llm.data.interfaces import Row
from jaxrl_llm.data.messages import Message, check_messages, tools_of
from jaxrl_llm.data.rows import RowFormat
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

    @property
    def longest(self) -> int:
        """Tokens of the longer completion."""
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class PreferenceFormat(RowFormat[EncodedPair, "PreferenceDataset"]):
    """How a row becomes a preference pair; a `RowFormat`.

    Either a prompt and two completions, each text or messages, or two whole dialogues, which have a beginning in
    common and differ in the assistant's last turn. Where the first row has no column for the prompt, dialogues are
    taken for whole ones, and of other texts the prompt is what both begin with.
    """

    _USABLE = "is a pair of dialogues with one beginning and two replies"

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

    implicit_prompt: bool | None = None
    """The columns hold texts that begin with the prompt, which is all that both have in common, whole words of it.
    `None`: where the first row has no prompt, and the texts are no dialogues."""

    def settled(self, row: Row) -> Self:
        """See `RowFormat`."""
        prompt, chosen = self.prompt.consumed_column, row.get(self.chosen_column)
        if self.whole_dialogues or self.implicit_prompt is not None or prompt is None or prompt in row:
            return self
        if isinstance(chosen, str) and not TURN.search(chosen):
            return dataclasses.replace(self, implicit_prompt=True)
        return dataclasses.replace(self, whole_dialogues=True) if isinstance(chosen, str | list | tuple) else self

    def encoder(self, tokenizer: Any) -> Callable[[Row], list[EncodedPair]]:
        """See `RowFormat`."""
        stop_tokens = stop_token_ids(tokenizer)

        def encode(row: Row) -> list[EncodedPair]:
            pair = self.pair(row)
            if pair is None:
                return []
            prompt, sides = encode_completions(row, pair.prompt, pair[1:], tokenizer, stop_tokens)
            return [EncodedPair(prompt, *sides)]

        return encode

    def collect(self, encoded: EncodedRows[EncodedPair]) -> PreferenceDataset:
        """See `RowFormat`."""
        return PreferenceDataset(encoded)

    def pair(self, row: Row) -> Pair | None:
        """The pair of a row; `None` if its dialogues have no beginning in common, or a reply is empty.

        It reads the row as the settings say; `settled` decides what they leave open.

        Raises:
            ValueError: a column is missing or is not what it should be.
        """
        chosen = column_of(row, self.chosen_column, setting="chosen_column")
        rejected = column_of(row, self.rejected_column, setting="rejected_column")
        if self.implicit_prompt:
            prompt, *sides = common_beginning(chosen, rejected)
            return Pair(self.prompt.prompt({self.prompt.prompt_column: prompt}), *sides) if all(sides) else None
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


class PreferenceDataset(EncodedDataset[EncodedPair]):
    """Preference pairs, G = 2; a `RowDataset` of `PreferenceBatch`. Attributes as of `EncodedDataset`."""

    def __init__(self, encoded: EncodedRows[EncodedPair]) -> None:
        parts = [Ragged([pair[field] for pair in encoded.kept]) for field in range(3)]
        super().__init__(encoded, "pairs", parts)
        equal = [row for row, pair in zip(self.rows, self.encoded, strict=True) if np.array_equal(*pair[1:])]
        if len(equal) == len(self) > 1:
            raise ValueError(
                f"chosen and rejected are equal in all {len(equal)} pairs, and nothing can be learned: do chosen_column"
                " and rejected_column name what they should?"
            )
        if equal:
            self.remarks = (f"chosen and rejected are equal in {len(equal)} of them, first in row {equal[0]}",)

    def batch(self, items: Sequence[int] | np.ndarray, /) -> PreferenceBatch:
        """The pairs numbered `items` (0 to `len(self) - 1`); repeats are allowed."""
        numbers = np.asarray(items, np.int64)
        lengths = np.stack([side.lengths[numbers] for side in self._parts], axis=1)
        return PreferenceBatch(
            **self._served_prompts(numbers),
            completion=np.stack([side.padded(numbers, self._width) for side in self._parts], axis=1),
            mask=np.arange(self._width) < lengths[..., None],
        )


def common_beginning(chosen: str, rejected: str) -> tuple[str, str, str]:
    """What two texts have in common at their beginning, and how each goes on.

    The prompt ends where a word does, and before the space behind it: completions then begin as a tokenizer has words
    begin.

    Raises:
        ValueError: they begin differently, or are no texts.
    """
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError(f"one of both is no text: {chosen!r:.80} and {rejected!r:.80}")
    pairs = zip(chosen, rejected, strict=False)
    length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    while chosen[:length][-1:].isalnum() and (chosen[length : length + 1] + rejected[length : length + 1]).isalnum():
        length -= 1
    length = len(chosen[:length].rstrip(" "))
    if not length:
        raise ValueError(
            f"no column has the prompt, and the texts begin differently: {chosen!r:.80} and {rejected!r:.80}; "
            "prompt.prompt_column (or prompt.template) names it, and whole_dialogues=True reads dialogues"
        )
    return chosen[:length], chosen[length:], rejected[length:]


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


def encode_completions(
    row: Row, prompt: Prompt, completions: Sequence[Any], tokenizer: Any, stop_tokens: Sequence[int]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Token ids of a row's prompt and of its completions, text or messages, their ends included.

    Raises:
        ValueError: they do not go together, or the tokenizer cannot write them.
    """
    if isinstance(prompt, str):
        if not all(isinstance(completion, str) for completion in completions):
            raise ValueError("the prompt is text and the completion is not: make both text, or both messages")
        return encode_answers(prompt, completions, tokenizer, stop_tokens=stop_tokens)
    answers = [_answer(completion) for completion in completions]
    return encode_answers(prompt, answers, tokenizer, stop_tokens=stop_tokens, tools=tools_of(row, prompt))


def _answer(completion: Any) -> list[Message]:
    """A completion as the assistant's message, in a list."""
    if isinstance(completion, str):
        completion = {"role": "assistant", "content": completion}
    answer = check_messages(completion if isinstance(completion, list | tuple) else [completion])
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise ValueError(f"a completion is one message of the assistant, got {answer!r:.200}")
    return answer
