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
    is the latest in the text itself, and in the history the one nearest to where the text is now; there, that one is
    taken also if no token matches, since one token alone may be another this time. The text itself is followed if more
    of its tokens match, two at least, and if there is no history.

    Args:
        text: `[S, Tp + Tc]`, prompts with what was drawn so far right behind.
        length: `[S]`, tokens of these, at least 1.
        history: `[S, Tc]`, an earlier completion of each prompt, or `None`.
        history_length: `[S]`, tokens of these, 0 where there is none.
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
    # Behind the prompt's last tokens, which are what its first ones have before them.
    source = jnp.concatenate([_before(text, prompt_length), history], axis=1)
    places, end = jnp.arange(source.shape[1]), CONTEXT + history_length
    possible = (places >= CONTEXT - 1) & (places < end[:, None] - 1)
    now = CONTEXT - 1 + length - prompt_length
    again = _find(source, end, newest, possible, now, count)
    is_own = (again.matched < 0) | (own.matched > jnp.maximum(again.matched, 1))
    return jnp.where(is_own[:, None], own.following, again.following)


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
