"""Tokens that a completion may well go on with: proposals of speculation without a model.

What followed the same tokens before is proposed, as where a model writes what a reference says (Yang et al. 2023,
arXiv:2304.04487): in the text itself, its prompt and what was drawn so far, or in what the same prompt got in the last
epoch. Proposals may be wrong, and are then not taken; they change no token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

CONTEXT = 3
"""Tokens before a place that are compared, at most."""

_NONE = -1  # no token


class _Found(NamedTuple):
    """A place in each of S sources."""

    matched: jax.Array
    """`[S]`: how many of the newest tokens end there, up to `CONTEXT`; −1: there is no place."""
    following: jax.Array
    """`[S, k]`: the tokens behind it; where the source ends, they come round again."""


def propose(
    text: jax.Array,
    length: jax.Array,
    history: jax.Array | None,
    history_length: jax.Array | None,
    prompt_length: jax.Array,
    count: int,
) -> jax.Array:
    """Proposes the next tokens of S texts.

    Of the places of a source, the one is taken at which most of the newest tokens (three, two, one) end. Of these, it
    is the latest in the text itself, and in an earlier completion the one nearest to where the text is now; there, that
    one is taken also if no token matches, since one token alone may be another this time. Of the completions in which
    as many match, the one is followed that most of the others go on like, for the longest: what is most likely is drawn
    more often than what was drawn once. The text itself is followed if more of its tokens match, two at least, and if
    there is no history.

    Args:
        text: `[S, Tp + Tc]`, prompts with what was drawn so far right behind.
        length: `[S]`, tokens of these, at least 1.
        history: `[S, V, Tc]`, earlier completions of each prompt, or `None`.
        history_length: `[S, V]`, tokens of these, 0 where there is none.
        prompt_length: `[S]`.
        count: k.

    Returns:
        `[S, k]`, tokens of the sources.
    """
    places = jnp.arange(text.shape[1])
    newest = _before(text, length)
    own = _find(text, length, newest, places < length[:, None] - 1, length, count)
    if history is None or history_length is None:
        return own.following
    again = _most_followed(_before(text, prompt_length), newest, length - prompt_length, history, history_length, count)
    is_own = (again.matched < 0) | (own.matched > jnp.maximum(again.matched, 1))
    return jnp.where(is_own[:, None], own.following, again.following)


def _most_followed(
    prompt: jax.Array, newest: jax.Array, drawn: jax.Array, history: jax.Array, length: jax.Array, count: int
) -> _Found:
    """The best place of earlier completions `[S, V, Tc]`, behind the last tokens of their prompts `[S, CONTEXT]`."""
    slots, voters, _ = history.shape

    def of_each(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, voters, axis=0)

    source = jnp.concatenate([of_each(prompt), history.reshape(slots * voters, -1)], axis=1)
    places, end = jnp.arange(source.shape[1]), CONTEXT + length.reshape(-1)
    possible = (places >= CONTEXT - 1) & (places < end[:, None] - 1)
    found = _find(source, end, of_each(newest), possible, of_each(CONTEXT - 1 + drawn), count)
    matched, following = found.matched.reshape(slots, voters), found.following.reshape(slots, voters, count)
    most = jnp.max(matched, axis=1, keepdims=True)
    alike = jnp.cumprod(following[:, :, None] == following[:, None], axis=-1)  # [S, V, V, k]
    votes = jnp.sum(jnp.where((matched == most)[:, None, :, None], alike, 0), axis=(2, 3))
    chosen = jnp.argmax(jnp.where(matched == most, votes, -1), axis=1)[:, None]
    return _Found(most[:, 0], jnp.take_along_axis(following, chosen[..., None], axis=1)[:, 0])


def _before(text: jax.Array, length: jax.Array) -> jax.Array:
    """The last tokens of the first so many, `[S, CONTEXT]`."""
    places = length[:, None] + jnp.arange(-CONTEXT, 0)
    return jnp.where(places < 0, _NONE, jnp.take_along_axis(text, jnp.maximum(places, 0), axis=1))


def _find(
    source: jax.Array, length: jax.Array, newest: jax.Array, possible: jax.Array, near: jax.Array, count: int
) -> _Found:
    """The best of the `possible` places `[S, D]` of sources `[S, D]`; of equals the one nearest to `near` `[S]`."""
    width = source.shape[1]
    padded = jnp.pad(source, ((0, 0), (CONTEXT - 1, 0)), constant_values=_NONE - 1)
    matched, run = jnp.zeros(source.shape, jnp.int32), jnp.ones(source.shape, bool)
    for back in range(CONTEXT):
        run &= padded[:, CONTEXT - 1 - back :][:, :width] == newest[:, -1 - back, None]
        matched += run
    matched = jnp.where(possible, matched, -1)
    distance = jnp.minimum(jnp.abs(jnp.arange(width) - near[:, None]), width)
    best = jnp.argmax(matched * (width + 1) - distance, axis=1)[:, None]
    period = jnp.maximum(length[:, None] - 1 - best, 1)
    following = jnp.minimum(best + 1 + jnp.arange(count) % period, width - 1)
    return _Found(jnp.take_along_axis(matched, best, axis=1)[:, 0], jnp.take_along_axis(source, following, axis=1))
