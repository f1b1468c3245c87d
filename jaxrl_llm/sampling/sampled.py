"""What a decoding loop is asked for, and what it writes down of completions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Wanted(NamedTuple):
    """G completions of each of P prompts."""

    prompt: jax.Array
    """`[P, Tp]` int32, right-padded."""
    lengths: jax.Array
    """`[P]` int32, 1 to Tp."""
    uniform: jax.Array
    """`[P, G, Tc, 2]` the randomness of each token; see `uniforms`."""
    greedy: jax.Array | None
    """`[P, G]` bool: completions of which each token is the most likely one; `None`: none."""
    limits: jax.Array | None
    """`[P, G]` int32: the most tokens of each, 1 to Tc; `None`: Tc."""
    history: tuple[jax.Array, jax.Array] | None = None
    """Earlier completions of the same prompts, `[P, G, Tc]`, which are proposed, and their lengths `[P, G]`, 0 where
    there is none; `None`: there are none at all."""


class Sampled(NamedTuple):
    """Completions; what lies beyond their lengths means nothing."""

    completion: jax.Array
    """`[..., Tc]` tokens."""
    lengths: jax.Array
    """`[...]`."""
    finished: jax.Array
    """`[...]` a stop token was drawn, or a stop text is complete."""
    logprobs: jax.Array
    """`[..., Tc]` of the model: temperature 1, no truncation."""
    sampler_logprobs: jax.Array
    """`[..., Tc]` of the distribution that tokens were drawn from."""
    kept: jax.Array | None = None
    """`[..., Tc, k]`: the ids that each token was drawn from, as of `Draw`; `None`: they are not written down."""
    passes: jax.Array | None = None
    """`[...]` passes through the model in which each had a part; counted with speculation only."""
    experts: jax.Array | None = None
    """`[..., Tc, L, k]`: the experts that computed each token; `None`: they are not written down."""

    @classmethod
    def nothing(cls, *shape: int, kept: int = 0, experts: tuple[int, int] | None = None) -> Sampled:
        """Before the first token.

        Args:
            *shape: `[..., Tc]`.
            kept: ids that are written down of each token.
            experts: L and k of the experts that are written down of each; `None`: none are.
        """
        numbers = jnp.zeros(shape, jnp.float32)
        return cls(
            completion=jnp.zeros(shape, jnp.int32),
            lengths=jnp.zeros(shape[:-1], jnp.int32),
            finished=jnp.zeros(shape[:-1], bool),
            logprobs=numbers,
            sampler_logprobs=numbers,
            kept=jnp.zeros((*shape, kept), jnp.int32) if kept else None,
            experts=None if experts is None else unknown_experts(*shape, *experts),
        )


def unknown_experts(*shape: int) -> jax.Array:
    """`[..., L, k]` before any token was computed."""
    return jnp.full(shape, -1, jnp.int16)


def by_token(told: jax.Array) -> jax.Array:
    """Experts as layers tell them, `[L, ..., k]`, as they are written down, `[..., L, k]`."""
    return jnp.moveaxis(told, 0, -2)
