"""From demonstrations to tokens: a prompt with its completion, or a conversation with the assistant's turns marked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.data.messages import Message
from jaxrl_llm.data.tokens import encode, encode_parts, encode_text_start, some_tokens, stop_texts, without_end
from jaxrl_llm.data.turns import TrainOn, continuation, trained_turns, turn_of


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


def encode_text(prompt: str, completion: str, tokenizer: Any, *, stop_tokens: Sequence[int] = ()) -> Encoded:
    """A text prompt and its completion, ended by the end of sequence.

    Both are tokenised as one text (see `encode_parts`), and the prompt as in sampling. A completion that ends with a
    stop token is ended by that one alone.

    Args:
        prompt: text.
        completion: text.
        tokenizer: what `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes.
        stop_tokens: ids that end a completion, from `stop_token_ids`.

    Raises:
        ValueError: the prompt has no tokens, or the tokenizer has no end of sequence.
    """
    completion, end = without_end(completion, stop_texts(tokenizer, stop_tokens))
    start, ids = encode_parts([prompt, completion], tokenizer, special=True)
    ids = [*ids, end_of_sequence(tokenizer) if end is None else end]
    return _encoded(some_tokens(start), ids, [True] * len(ids))


def encode_whole_text(text: str, tokenizer: Any, *, stop_tokens: Sequence[int] = ()) -> Encoded:
    """A text and its end of sequence, all of it trained but the first token, which nothing comes before.

    A text that ends with a stop token is ended by that one alone; arguments as of `encode_text`.

    Raises:
        ValueError: the text has no tokens, or the tokenizer has no end of sequence.
    """
    text, end = without_end(text, stop_texts(tokenizer, stop_tokens))
    first, *rest = some_tokens(encode_text_start(text, tokenizer))
    ids = [*rest, end_of_sequence(tokenizer) if end is None else end]
    return _encoded([first], ids, [True] * len(ids))


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    train_on: TrainOn,
    stop_tokens: Sequence[int],
    tools: list[dict[str, Any]] | None = None,
) -> Encoded:
    """A conversation as the chat template writes it, with the assistant's turns marked.

    A turn is what the template writes after the start of the assistant's turn. It is trained up to the token with
    which the template ends it (`<|im_end|>`); what follows that, such as a line break, is not what a model writes.
    Where the template ends turns with no such token, whitespace at a turn's end is not trained, and the last turn is
    ended by the end of sequence. What follows the last trained token is left out. All is tokenised as one text (see
    `encode_parts`). A message with `weight` 0 is not trained.

    Args:
        messages: the conversation, as `check_messages` returns it.
        tokenizer: what `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes.
        train_on: the last turn, or every turn of the assistant.
        stop_tokens: ids that end a turn, from `stop_token_ids`.
        tools: what the template may describe to the model; see `tools_of`.

    Raises:
        ValueError: there is no turn to train or no chat template, or the template writes the beginning of a
            conversation differently when it goes on.
    """
    messages = _without_ends(messages, tokenizer, stop_tokens)
    turns = [turn_of(messages[: number + 1], tokenizer, tools) for number in trained_turns(messages, train_on)]
    gaps = [continuation(later.before, turn.before + turn.said) for turn, later in itertools.pairwise(turns)]
    parts = [turns[0].before, *(turn.said + gap for turn, gap in zip(turns, [*gaps, ""], strict=True))]
    prompt, *pieces = encode_parts(parts, tokenizer)
    ids: list[int] = []
    mask: list[bool] = []
    for before, turn, piece in zip(parts, turns, pieces, strict=False):
        own, rest = _own_tokens(before, turn.said, piece, tokenizer, stop_tokens)
        if turn is turns[-1]:
            own, rest = _ended(own, tokenizer, stop_tokens), []
        ids += own + rest
        mask += [True] * len(own) + [False] * len(rest)
    return _encoded(some_tokens(prompt), ids, mask)


def encode_answers(
    prompt: str | list[Message],
    answers: Sequence[Any],
    tokenizer: Any,
    *,
    stop_tokens: Sequence[int],
    tools: list[dict[str, Any]] | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Token ids of a prompt and of several completions of it, each with its end.

    Args:
        prompt: text or messages.
        answers: text for a text prompt, else the assistant's message in a list.
        tokenizer: what `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes.
        stop_tokens: ids that end a turn, from `stop_token_ids`.
        tools: of a conversation; see `tools_of`.

    Raises:
        ValueError: as `encode_conversation`.
    """
    if isinstance(prompt, str):
        encoded = [encode_text(prompt, answer, tokenizer, stop_tokens=stop_tokens) for answer in answers]
        return encoded[0].prompt, [each.completion for each in encoded]
    conversations = [_without_ends([*prompt, *answer], tokenizer, stop_tokens) for answer in answers]
    turns = [turn_of(conversation, tokenizer, tools) for conversation in conversations]
    before = min((turn.before for turn in turns), key=len)  # a thought may be opened for one answer and not for another
    ids: list[int] = []
    completions = []
    for turn in turns:
        said = continuation(turn.before, before) + turn.said
        ids, piece = encode_parts([before, said], tokenizer)
        own, _ = _own_tokens(before, said, piece, tokenizer, stop_tokens)
        completions.append(np.array(_ended(own, tokenizer, stop_tokens), np.int32))
    return np.array(some_tokens(ids), np.int32), completions


def end_of_sequence(tokenizer: Any) -> int:
    """The token that ends a text.

    Raises:
        ValueError: there is none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end of sequence, and so a completion could not be ended")
    return tokenizer.eos_token_id


def _without_ends(messages: Sequence[Message], tokenizer: Any, stop_tokens: Sequence[int]) -> list[Message]:
    """Messages whose text does not itself end the assistant's turn, since the template does."""
    ends = stop_texts(tokenizer, stop_tokens)
    return [
        {**message, "content": without_end(message["content"], ends)[0]} if message["role"] == "assistant" else message
        for message in messages
    ]


def _own_tokens(
    before: str, said: str, piece: list[int], tokenizer: Any, stop_tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What of a turn's tokens the model writes, and what the template adds.

    Args:
        before: the text before the turn.
        said: the turn.
        piece: tokens of the turn and what follows it.
        tokenizer: reads them.
        stop_tokens: ids that end a turn.
    """
    ends = [place + 1 for place, token in enumerate(piece) if token in stop_tokens]
    if stops := sum(token in stop_tokens for token in encode(said, tokenizer)):
        count = ends[stops - 1]
    else:
        content = encode_parts([before, said.rstrip()], tokenizer)[1]
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(content, piece, strict=False))
        count = len(list(shared))
        # A token that holds the end of what was said and the space behind it is the turn's.
        count += count < len(content)
    return piece[:count], piece[count:]


def _ended(ids: list[int], tokenizer: Any, stop_tokens: Sequence[int]) -> list[int]:
    """The tokens of a last turn, ended by the end of sequence unless something else ends them."""
    return ids if ids and ids[-1] in stop_tokens else [*ids, end_of_sequence(tokenizer)]


def _encoded(prompt: list[int], completion: list[int], mask: list[bool]) -> Encoded:
    return Encoded(np.array(prompt, np.int32), np.array(completion, np.int32), np.array(mask, bool))
