"""Texts that end a completion, found in its tokens as these are drawn: an automaton over bytes, with tokens as steps.

How much of a stop text the bytes so far end with is the state of an automaton (Aho and Corasick 1975, "Efficient string
matching"). A token moves it as its bytes do one after another, which is computed before: in the loop, a token costs two
look-ups in small tables.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.checkpoints.token_bytes import token_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class StopTexts:
    """An automaton whose last state says that a stop text is complete, whatever follows it in its last token."""

    kinds: np.ndarray
    """`[V]` the kind of each token: those of a kind move each state to the same one."""
    following: np.ndarray
    """`[states, kinds]` the state after a token. A text begins in the first; the last is followed by itself."""

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Any, vocab_size: int) -> StopTexts:
        """The automaton of some texts for the tokens of a tokenizer.

        Tokens that are left out of a completion's text (`completion_text`: beginning, end, padding) move nothing, and
        neither do those that the tokenizer does not know.

        Args:
            texts: stop texts, none of them empty.
            tokenizer: of the model; see `token_bytes`.
            vocab_size: V of the model.

        Raises:
            ValueError: a text has no bytes of its own, or the bytes of tokens are not known.
        """
        found, spaces = token_bytes(tokenizer)
        outside = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        tokens = [b"" if number in outside else some for number, some in enumerate(found[:vocab_size])]
        bytewise = _with_spaces_before(_automaton([_encoded(text) for text in texts]), spaces)
        after = _by_token(bytewise, tokens + [b""] * (vocab_size - len(tokens)))
        moves, kinds = np.unique(after, axis=0, return_inverse=True)
        return cls(kinds.ravel().astype(_small(len(moves))), moves.T.copy())

    def start(self, *shape: int) -> jax.Array:
        """The states of empty texts."""
        return jnp.zeros(shape, jnp.int32)

    def after(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """The states `[...]` after tokens `[...]`."""
        return jnp.asarray(self.following)[state, jnp.asarray(self.kinds)[token]].astype(jnp.int32)

    def complete(self, state: jax.Array) -> jax.Array:
        """Whether a stop text is complete, bool `[...]`."""
        return state == len(self.following) - 1


def check_stop_texts(texts: Sequence[str], tokenizer: Any) -> None:
    """Raises ValueError, before there is a model, for texts that cannot be found in a tokenizer's tokens."""
    if texts:
        StopTexts.of(texts, tokenizer, vocab_size=1)


def stops(
    token: jax.Array, matched: jax.Array | None, stop_tokens: tuple[int, ...], stop_texts: StopTexts | None
) -> tuple[jax.Array, jax.Array | None]:
    """Whether tokens `[...]` end their completions.

    Args:
        token: those drawn.
        matched: `[...]` how much of a stop text the tokens before end with; `None` where there are no such texts.
        stop_tokens: ids that end a completion.
        stop_texts: texts that do.

    Returns:
        bool `[...]`, and `matched` with these tokens.
    """
    ends = jnp.any(token[..., None] == jnp.array(stop_tokens, jnp.int32), axis=-1)
    if stop_texts is None or matched is None:
        return ends, matched
    matched = stop_texts.after(matched, token)
    return ends | stop_texts.complete(matched), matched


def _encoded(text: str) -> bytes:
    try:
        found = text.encode()
    except UnicodeEncodeError:
        found = b""
    if not found or "\ufffd" in text:
        raise ValueError(f"the stop text {text!r} is empty or holds what stands for no character: leave it out")
    return found


def _small(count: int) -> type[np.unsignedinteger]:
    return np.uint8 if count <= 2**8 else np.uint16 if count <= 2**16 else np.uint32


def _automaton(texts: Sequence[bytes]) -> np.ndarray:
    """`[states, 256]` the state after a byte: the longest beginning of a text with which the bytes so far end.

    The first state is the empty beginning; the last one, that a text is complete.
    """
    children, ends = [{}], set()
    for text in texts:
        node = 0
        for byte in text:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
            node = children[node][byte]
        ends.add(node)
    rows, shorter = np.zeros((len(children), 256), np.int64), np.zeros(len(children), np.int64)
    number, queue, kept = np.zeros(len(children), np.int64), collections.deque([0]), []
    while queue:  # shorter beginnings first
        node = queue.popleft()
        if shorter[node] in ends:
            ends.add(node)
        if node in ends:
            continue
        number[node] = len(kept)
        kept.append(node)
        rows[node] = rows[shorter[node]]
        for byte, child in children[node].items():
            shorter[child], rows[node, byte] = rows[node, byte], child
            queue.append(child)
    number[list(ends)] = len(kept)
    return np.concatenate([number[rows[kept]], np.full((1, 256), len(kept))])


def _with_spaces_before(bytewise: np.ndarray, spaces: int) -> np.ndarray:
    """The same with first states that pass over so many spaces at the beginning of a text."""
    first = np.repeat(bytewise[:1], spaces, axis=0) + spaces
    first[:, ord(" ")] = np.arange(1, spaces + 1)
    return np.concatenate([first, bytewise + spaces])


def _by_token(bytewise: np.ndarray, tokens: Sequence[bytes]) -> np.ndarray:
    """`[V, states]` the state after all bytes of a token: a byte of all of them that have so many at a time."""
    lengths = np.array([len(token) for token in tokens])
    order = np.argsort(-lengths, kind="stable")
    text = np.frombuffer(b"".join(tokens), np.uint8)
    starts, lengths = (np.cumsum(lengths) - lengths)[order], lengths[order]
    small = bytewise.astype(_small(len(bytewise)))
    after = np.tile(np.arange(len(bytewise), dtype=small.dtype), (len(tokens), 1))
    for place in range(lengths[0]):
        longer = np.searchsorted(-lengths, -place)
        after[:longer] = small[after[:longer], text[starts[:longer] + place, None]]
    result = np.empty_like(after)
    result[order] = after
    return result
