"""Turns of the assistant as the chat template writes them: what is read before one, and what one consists of."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jaxrl_llm.data.messages import Message
from jaxrl_llm.data.tokens import render

TrainOn = Literal["completion_only", "assistant_only"]

_OPENED = re.compile(r"<think>\s*(</think>\s*)?\Z")
"""What some templates begin the assistant's turn with: a thought, or an empty one."""
_MARK = "What the assistant says."


class Turn(NamedTuple):
    """A turn of the assistant, and all before it."""

    before: str
    """The text before what the model writes."""
    said: str
    """What the template writes behind it: the reply, the end of the turn, and what follows that."""


def trained_turns(messages: Sequence[Message], train_on: TrainOn) -> list[int]:
    """Numbers of the messages that are trained: the last one, or all of the assistant; none whose weight is 0.

    Raises:
        ValueError: there are none, or the last message is to be trained and is not the assistant's.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("the conversation has no turn of the assistant, and so nothing to train")
    if train_on == "completion_only":
        if turns[-1] != len(messages) - 1:
            raise ValueError(f"the last message is the {messages[-1]['role']}'s, and not the assistant's to be trained")
        *earlier, last = turns
        if weighted := [number for number in earlier if messages[number].get("weight") == 1]:
            raise ValueError(
                f"message {weighted[0]} has weight 1, but train_on='completion_only' trains the last turn alone: "
                "set train_on='assistant_only', or leave the weight out"
            )
        turns = [last]
    turns = [number for number in turns if messages[number].get("weight", 1)]
    if not turns:
        raise ValueError("each turn of the assistant that could be trained has weight 0, and so nothing is trained")
    return turns


def turn_of(conversation: Sequence[Message], tokenizer: Any, tools: list[dict[str, Any]] | None) -> Turn:
    """The last message of a conversation, which is the assistant's, as one writes it who goes on from its prompt.

    Where the prompt opens a thought (`<think>`), a reply that has one begins inside of it, and any other begins before
    it, as the template writes that. A thought that the template leaves out of the reply is put back.

    Raises:
        ValueError: the template does not write the reply behind its prompt.
    """
    history, reply = conversation[:-1], conversation[-1]
    start = _start(history, reply, tokenizer, tools)
    end = render(conversation, tokenizer, start=False, tools=tools)
    if start == end:
        raise ValueError("the chat template does not write what the assistant says")
    if _begins_unasked(start, end) and end == render(conversation, tokenizer, start=True, tools=tools):
        raise ValueError("the chat template begins another turn unasked: make it read add_generation_prompt")
    opened = _OPENED.search(start)
    closed = start[: opened.start()] if opened else start
    said = continuation(end, closed)
    if "</think>" in reply["content"] and not _has_thought(said, reply["content"]):
        said = reply["content"] + _frame(history, reply, tokenizer, tools)[1]
    if opened is None:
        return Turn(start, said)
    if (closed + said).startswith(start):
        return Turn(start, (closed + said)[len(start) :])
    if opened[1]:  # the thought is over before it began: the reply follows, unless it has one of its own
        return Turn(closed, said) if "</think>" in said else Turn(start, said)
    begun = re.match(r"\s*<think>\s*", said)
    return Turn(start, said[begun.end() if begun else 0 :]) if "</think>" in said else Turn(closed, said)


def _has_thought(said: str, content: str) -> bool:
    """Whether a turn holds the thought of a reply, and behind it the answer."""
    thought, end, answer = content.rpartition("</think>")
    thought = thought.rpartition("<think>")[2].strip()
    _, found, rest = said.partition(thought or end)
    return bool(found) and answer.strip() in rest


def _start(history: Sequence[Message], reply: Message, tokenizer: Any, tools: list[dict[str, Any]] | None) -> str:
    """The prompt of the assistant's turn. Few templates write one where nobody has asked."""
    if any(message["role"] != "system" for message in history):
        return render(history, tokenizer, start=True, tools=tools)
    return _frame(history, reply, tokenizer, tools)[0]


def _frame(
    history: Sequence[Message], reply: Message, tokenizer: Any, tools: list[dict[str, Any]] | None
) -> tuple[str, str]:
    """What the template writes before and after the reply's content.

    Raises:
        ValueError: it does not write that.
    """
    text = render([*history, {**reply, "content": _MARK}], tokenizer, start=False, tools=tools)
    before, mark, after = text.rpartition(_MARK)
    if not mark:
        raise ValueError("the chat template does not write what the assistant says")
    return before, after


def continuation(text: str, beginning: str) -> str:
    """What follows the beginning of a text.

    Raises:
        ValueError: it begins differently.
    """
    if not text.startswith(beginning):
        raise ValueError(
            "the chat template writes the beginning of this conversation differently when it goes on: "
            f"{beginning[-80:]!r} is not where {text[:80]!r}… continues. Use train_on='completion_only', or a template "
            "that leaves earlier turns as they are (--model.chat-template=<file>)"
        )
    return text[len(beginning) :]


def _begins_unasked(start: str, end: str) -> bool:
    """Whether a finished turn ends as an unfinished one does."""
    pairs = zip(reversed(start), reversed(end), strict=False)
    shared = "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return len(shared.strip()) > 3
