"""From text to token ids: a text is tokenised whole, and cut where its parts begin."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxrl_llm.data.messages import Message

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_OPENED = re.compile(r"<think>\s*\Z")
_TAIL = 16
"""Tokens in which that is found, even where each is a character."""
_BEFORE = ("\n", ".", "a")
"""Characters with one of which no tokenizer merges whatever follows."""


def render(
    messages: Sequence[Message], tokenizer: Any, *, start: bool, tools: list[dict[str, Any]] | None = None
) -> str:
    """A conversation as the chat template writes it.

    Args:
        messages: as `check_messages` returns them.
        tokenizer: what `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes.
        start: whether the assistant's turn is begun at the end.
        tools: what the template may describe to the model; see `tools_of`.

    Raises:
        ValueError: there is no chat template, or it refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompt is conversational, but the tokenizer has no chat template; use text prompts, or give one "
            "(--model.chat-template=<file>)"
        )
    described = {} if tools is None else {"tools": tools}
    try:
        return tokenizer.apply_chat_template(
            [{name: value for name, value in message.items() if name != "weight"} for message in messages],
            add_generation_prompt=start,
            tokenize=False,
            **described,
        )
    except Exception as error:  # whatever a template does or raises
        roles, said = ", ".join(message["role"] for message in messages) or "no message", str(error)
        raise ValueError(
            f"the chat template refuses this conversation ({roles}): {said or type(error).__name__}. Give it what "
            "it asks for (a system message: PromptFormat.system), or pass another template "
            "(--model.chat-template=<file>)"
        ) from error


def encode_prompt(
    prompt: str | list[Message], tokenizer: Any, *, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Returns the token ids of a prompt, special tokens once.

    Text gets the special tokens the tokenizer puts in front of a text, no second BOS if it starts with one,
    and no EOS at its end. Messages get what the chat template writes, up to the start of the assistant's
    turn, and nothing else.

    Args:
        prompt: Text or messages.
        tokenizer: What `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes.
        tools: Of a conversation; see `tools_of`.

    Raises:
        ValueError: Messages for a tokenizer without a chat template, or a prompt of no tokens.
    """
    if isinstance(prompt, str):
        return some_tokens(encode_text_start(prompt, tokenizer))
    return some_tokens(encode(render(prompt, tokenizer, start=True, tools=tools), tokenizer))


def opened_thought(prompt: Iterable[int], tokenizer: Any) -> str:
    """The `<think>` with which a prompt ends, and the space behind it; empty where it ends with something else."""
    found = _OPENED.search(tokenizer.decode([int(token) for token in prompt][-_TAIL:]))
    return found[0] if found else ""


def some_tokens(ids: list[int]) -> list[int]:
    """A prompt's ids.

    Raises:
        ValueError: there are none.
    """
    if not ids:
        raise ValueError("the prompt has no tokens")
    return ids


def encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text, without special tokens that it does not have.

    Raises:
        ValueError: it holds half of a character.
    """
    return list(tokenizer.encode(checked(text), add_special_tokens=False))


def encode_text_start(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text with the special tokens that begin one, each once, and without those that end one."""
    ids = list(tokenizer.encode(checked(text), add_special_tokens=True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    if ids and ids[-1] == eos and tokenizer.encode(text, add_special_tokens=False)[-1:] != [eos]:
        del ids[-1]
    return ids


def checked(text: str) -> str:
    """The text.

    Raises:
        ValueError: it holds half of a character, which no tokenizer reads.
    """
    if found := _LONE_SURROGATE.search(text):
        place = found.start()
        raise ValueError(
            f"the text holds half of a character (the lone surrogate {found[0]!r}) at place {place}: "
            f"{text[max(0, place - 20) : place + 20]!r}; read the file as UTF-8, or replace it"
        )
    return text


def encode_parts(parts: Sequence[str], tokenizer: Any, *, special: bool = False) -> list[list[int]]:
    """Token ids of the consecutive parts of a text: those of the whole text, cut where parts begin.

    Tokenised by themselves, parts could begin with a space that the text has not (SentencePiece). No token crosses the
    beginning of a part, though, as none does where a model goes on from a prompt: where the whole text has one that
    does, what is before it is tokenised as if it ended there, and what is behind as what goes on from there.

    Args:
        parts: texts; the first may be empty only with `special`.
        tokenizer: what `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes.
        special: whether the text gets the special tokens that begin a text.
    """
    read = functools.partial(encode_text_start if special else encode, tokenizer=tokenizer)
    first, whole = read(parts[0]), read("".join(parts))
    # What a part's tokens are seldom depends on more than the part before it. To look at no more takes linear time.
    following = [_after(before, part, read, tokenizer) for before, part in itertools.pairwise(parts)]
    if [*first, *(token for ids in following for token in ids)] == whole:
        return [first, *following]
    begun = ("".join(parts[:number]) for number in range(1, len(parts)))
    return [first, *(_after(before, part, read, tokenizer) for before, part in zip(begun, parts[1:], strict=True))]


def _after(before: str, text: str, read: Callable[[str], list[int]], tokenizer: Any) -> list[int]:
    """Token ids of `text` where it follows `before`."""
    ids = _continuation(before, text, read)
    if ids is not None:
        return ids
    for character in _BEFORE:
        try:
            ids = _continuation(character, text, functools.partial(encode, tokenizer=tokenizer))
        except Exception:  # a tokenizer that does not know this character; the package has no type for it
            continue
        if ids is not None:
            return ids
    raise ValueError(f"no token of this tokenizer begins where {text[:80]!r} does; give the text another beginning")


def _continuation(before: str, text: str, read: Callable[[str], list[int]]) -> list[int] | None:
    """The tokens of both behind those of the first; `None` where a token of both crosses its end."""
    first, whole = read(before), read(before + text)
    return whole[len(first) :] if whole[: len(first)] == first else None


def stop_texts(tokenizer: Any, stop_tokens: Iterable[int]) -> dict[str, int]:
    """The ids in `stop_tokens` by the texts that the tokenizer reads as them."""
    texts = {}
    for token in stop_tokens:
        text = tokenizer.decode([token])
        try:
            ids = list(tokenizer.encode(text, add_special_tokens=False))
        except Exception:  # a tokenizer that has no text for it; the package has no type of its own for that
            continue
        if ids == [token]:
            texts[text] = token
    return texts


def without_end(text: str, ends: dict[str, int]) -> tuple[str, int | None]:
    """A text without the stop tokens that it is written to end with, and the first of these.

    Args:
        text: of a completion.
        ends: from `stop_texts`.
    """
    first = None
    while True:
        shown = text.rstrip()
        end = next((end for end in ends if shown.endswith(end)), None)
        if end is None:
            return text, first
        text, first = shown.removesuffix(end), ends[end]
