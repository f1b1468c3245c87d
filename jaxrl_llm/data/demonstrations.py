"""Demonstrations: prompts with the completions to be learned, and conversations with the assistant's turns marked."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxrl_llm.algorithms.supervised import Demonstrations
from jaxrl_llm.data.formats import Message, PromptFormat, check_messages, column_of, encode_prompt
from jaxrl_llm.data.rows import Overlong, Ragged, read_rows, rows_that_fit
from jaxrl_llm.data.sources import Row, RowSource
from jaxrl_llm.models.tokenizers import stop_token_ids

TrainOn = Literal["completion_only", "assistant_only"]


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

    def __post_init__(self) -> None:
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
    ) -> DemonstrationDataset:
        """See `RowFormat`."""
        return DemonstrationDataset(
            source,
            tokenizer,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            demonstration_format=self,
            overlong=overlong,
            max_rows=max_rows,
        )

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


class Encoded(NamedTuple):
    """A demonstration as token ids."""

    prompt: np.ndarray
    """int32: what is read first."""
    completion: np.ndarray
    """int32: the rest, up to the last token that is trained."""
    mask: np.ndarray
    """bool, of the completion: what is trained."""


def encode_text(prompt: str, completion: str, tokenizer: Any) -> Encoded:
    """A text prompt and its completion, ended by the end of sequence.

    Each is tokenised by itself, as in sampling, where the prompt's tokens are given.

    Raises:
        ValueError: the prompt has no tokens, or the tokenizer has no end of sequence.
    """
    ids = [*tokenizer.encode(completion, add_special_tokens=False), _end_of_sequence(tokenizer)]
    return _encoded(encode_prompt(prompt, tokenizer), ids, [True] * len(ids))


def encode_conversation(
    messages: Sequence[Message], tokenizer: Any, *, train_on: TrainOn, stop_tokens: Sequence[int]
) -> Encoded:
    """A conversation as the chat template writes it, with the assistant's turns marked.

    A turn is what the template writes after the start of the assistant's turn. It is trained up to the token with
    which the template ends it (`<|im_end|>`); what follows that, such as a line break, is not what a model writes.
    Where the template ends turns with no such token, whitespace at a turn's end is not trained, and the last turn is
    ended by the end of sequence. What follows the last trained token is left out.

    Args:
        messages: the conversation.
        tokenizer: what `jaxrl_llm.models.tokenizers.Tokenizer` describes.
        train_on: the last turn, or every turn of the assistant.
        stop_tokens: ids that end a turn, from `stop_token_ids`.

    Raises:
        ValueError: there is no turn to train or no chat template, or the template writes the beginning of a
            conversation differently when it goes on.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("the conversation has no turn of the assistant, and so nothing to train")
    if train_on == "completion_only":
        if turns[-1] != len(messages) - 1:
            raise ValueError(f"the last message is the {messages[-1]['role']}'s, and not the assistant's to be trained")
        turns = turns[-1:]
    prompt = encode_prompt(list(messages[: turns[0]]), tokenizer)
    ids: list[int] = []
    mask: list[bool] = []

    def add(text: str | list[int], trained: bool) -> None:
        tokens = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    written = _text(messages[: turns[0]], tokenizer, start=True)
    for turn in turns:
        start, end = _text(messages[:turn], tokenizer, start=True), _text(messages[: turn + 1], tokenizer, start=False)
        if _begins_unasked(start, end) and end == _text(messages[: turn + 1], tokenizer, start=True):
            raise ValueError("the chat template begins another turn unasked: make it read add_generation_prompt")
        add(_continuation(start, written), False)
        said = _continuation(end, start)
        tokens = list(tokenizer.encode(said, add_special_tokens=False))
        ends = [place + 1 for place, token in enumerate(tokens) if token in stop_tokens]
        if ends:
            add(tokens[: ends[-1]], True)
            add(tokens[ends[-1] :], False)
        else:
            content = said.rstrip()
            add(content, True)
            if turn == turns[-1]:
                add([_end_of_sequence(tokenizer)], True)
            add(said[len(content) :], False)
        written = end
    length = len(mask) - mask[::-1].index(True)
    return _encoded(prompt, ids[:length], mask[:length])


def _text(messages: Sequence[Message], tokenizer: Any, *, start: bool) -> str:
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=start, tokenize=False)


def _continuation(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise ValueError(
            "the chat template writes the beginning of this conversation differently when it goes on: "
            f"{beginning[-80:]!r} is not where {text[:80]!r}… continues. Use train_on='completion_only', or a template "
            "that leaves earlier turns as they are"
        )
    return text[len(beginning) :]


def _begins_unasked(start: str, end: str) -> bool:
    """Whether a finished turn ends as an unfinished one does."""
    pairs = zip(reversed(start), reversed(end), strict=False)
    shared = "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return len(shared.strip()) > 3


def _end_of_sequence(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end of sequence, and so a completion could not be ended")
    return tokenizer.eos_token_id


def _encoded(prompt: list[int], completion: list[int], mask: list[bool]) -> Encoded:
    return Encoded(np.array(prompt, np.int32), np.array(completion, np.int32), np.array(mask, bool))


class DemonstrationDataset:
    """A source's demonstrations, formatted, checked and tokenised once; a `RowDataset` of `Demonstrations`, G = 1.

    Every row is read at construction, so that what cannot be used is found before training starts.

    Args:
        source: The rows, as `open_source` gives them.
        tokenizer: What `jaxrl_llm.models.tokenizers.Tokenizer` describes; not kept.
        max_prompt_length: Tp, tokens per prompt.
        max_completion_length: Tc, tokens per completion, the end of sequence included.
        demonstration_format: How a row becomes a demonstration; columns `prompt` and `completion` by default.
        overlong: What to do with longer ones: `"raise"`, or `"drop"` and count them.
        max_rows: Use the first rows only.

    Attributes:
        dropped: Number of rows that were too long.
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
