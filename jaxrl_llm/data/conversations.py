"""From demonstrations to tokens: a prompt with its completion, or a conversation with the assistant's turns marked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrl_llm.data.formats import Message, encode_prompt

TrainOn = Literal["completion_only", "assistant_only"]


class Encoded(NamedTuple):
    """A demonstration as token ids."""

    prompt: np.ndarray
    """int32: what is read first."""
    completion: np.ndarray
    """int32: the rest, up to the last token that is trained."""
    mask: np.ndarray
    """bool, of the completion: what is trained."""

    @property
    def longest(self) -> int:
        """Tokens of the completion."""
        return len(self.completion)


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
        tokenizer: what `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes.
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
