"""Conversations as data sets hold them: messages and tools, checked and brought into one form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.data.interfaces import Row

Message = dict[str, Any]


def check_messages(conversation: Any) -> list[Message]:
    """A list of messages, copied, in the form that chat templates read.

    Content is text: parts of type `text` are joined, and content that is missing beside tool calls is empty. Entries
    that are `None` are left out, also those within tool calls, where Arrow and Parquet write every key that any row
    has.

    Raises:
        ValueError: it is none, a message has no role or no text, or a `weight` is neither 0 nor 1.
    """
    if not isinstance(conversation, list | tuple) or not conversation:
        raise ValueError(f"expected text or a list of messages, got {conversation!r:.200}")
    return [_message(message, f"message {number}") for number, message in enumerate(conversation)]


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name}: a message is an object with role and content, got {message!r:.200}")
    message = without_nulls(message)
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise ValueError(f"{name}: tool_calls is a list of calls, got {calls!r:.200}")
    if isinstance(message.get("content"), list):
        parts = [_text_of(part, f"{name}, part {number}") for number, part in enumerate(message["content"])]
        message["content"] = "".join(parts)
    elif calls and "content" not in message:
        message["content"] = ""
    if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
        raise ValueError(f"{name}: a message needs role and content, both text, got {message!r:.200}")
    weight = message.get("weight", 0)
    if isinstance(weight, str) or weight not in (0, 1):
        raise ValueError(f"{name}: weight={weight!r} is neither 0 (the turn is not trained) nor 1 (it is)")
    if weight and message["role"] != "assistant":
        raise ValueError(f"{name}: weight={weight!r}, but only turns of the assistant are trained; leave it out")
    return message


def _text_of(part: Any, name: str) -> str:
    """The text of one part of a message's content."""
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f"{name}: content is text, or a list of parts such as {{'type': 'text', 'text': 'Hi'}}; "
            f"got one of type {kind!r}: {part!r:.200}"
        )
    return part["text"]


def without_nulls(value: Any) -> Any:
    """A copy without the entries of objects that are `None`, at any depth; of lists nothing is left out."""
    if isinstance(value, Mapping):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(inner) for inner in value]
    return value


def tools_of(row: Row, prompt: str | list[Message]) -> list[dict[str, Any]] | None:
    """The tools that a row's column `tools` describes, for the chat template; `None` of text and where none are.

    They are a list of objects in the format of JSON Schema, or that list as JSON text.

    Raises:
        ValueError: they are something else.
    """
    tools = None if isinstance(prompt, str) else row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"the column 'tools' is text, but no JSON: {error}") from error
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"the column 'tools' is a list of objects, one a tool, got {tools!r:.200}")
    return [without_nulls(tool) for tool in tools] or None
