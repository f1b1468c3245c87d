"""What a text says outside its thoughts: `<think>…</think>`, and `<answer>…</answer>` after them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_THOUGHT = r"think(?:ing)?|thought|reasoning"
_THOUGHT_TAG = re.compile(rf"<(?P<end>/?)(?:{_THOUGHT})>|(?-i:\[(?P<last>/?)THINK\])", re.IGNORECASE)
_OPENED_THOUGHT = re.compile(rf"(?:<(?:{_THOUGHT})>|(?-i:\[THINK\]))\s*\Z", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)


def thought_is_open(prompt: object) -> bool:
    """Whether a prompt's text, or its last message, ends in the tag that opens a thought."""
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[-1], dict):
        prompt = prompt[-1].get("content")
    return isinstance(prompt, str) and _OPENED_THOUGHT.search(prompt) is not None


def spoken(text: str, *, thought_open: bool = False) -> str:
    """Returns what a text says outside its thoughts, and within its last `<answer>` where it has one.

    A thought that does not end takes the rest of the text with it; so does an end without a beginning (the
    prompt opened it) with what stands before it.
    """
    said: list[str] = []
    start, depth = 0, int(thought_open)
    for tag in _THOUGHT_TAG.finditer(text):
        if tag["end"] or tag["last"]:
            if depth == 0:
                said.clear()
            depth, start = 0, tag.end()
        elif depth == 0:
            said.append(text[start : tag.start()])
            depth = 1
    if depth == 0:
        said.append(text[start:])
    visible = "".join(said)
    tags = list(_ANSWER_TAG.finditer(visible))
    opening = next((index for index in reversed(range(len(tags))) if not tags[index][1]), None)
    if opening is None:
        return visible
    end = tags[opening + 1].start() if opening + 1 < len(tags) else len(visible)
    return visible[tags[opening].end() : end]


def spoken_of(prompts: Sequence[object], texts: Sequence[str]) -> list[str]:
    """Returns `spoken` of each text; a prompt that ends in `<think>` opens a thought. `prompts` may be empty."""
    opened = [thought_is_open(prompt) for prompt in prompts] or [False] * len(texts)
    return [spoken(text, thought_open=open_) for text, open_ in zip(texts, opened, strict=True)]
