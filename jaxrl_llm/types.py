"""Records that cross rooms: what the sampler hands to the learner, and the learner's state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.extras import require
from jaxrl_llm.masking import length_mask

require("chex", "flax")
import chex  # noqa: E402 (behind what says how to install it)
from flax import struct  # noqa: E402 (as well)


class Rollout(struct.PyTreeNode):
    """G sampled completions of each of P prompts; a group is axis 1."""

    prompt: jax.Array
    """`[P, Tp]` int32, right-padded."""
    prompt_lengths: jax.Array
    """`[P]` int32."""
    completion: jax.Array
    """`[P, G, Tc]` int32, right-padded; the very ids that were sampled, a sampled stop token included."""
    completion_lengths: jax.Array
    """`[P, G]` int32, the stop token counted."""
    finished: jax.Array
    """`[P, G]` bool: ended by a stop token or a stop text; the others were cut at Tc."""
    logprobs: jax.Array
    """`[P, G, Tc]` float32: log-prob of each token under the model itself (temperature 1, no truncation)."""
    sampler_logprobs: jax.Array
    """`[P, G, Tc]` float32: log-prob under the distribution that it was drawn from (tempered, truncated)."""
    kept: jax.Array | None = None
    """`[P, G, Tc, k]` int32: the ids that each token was drawn from, which top-k, top-p and min-p had left; −1: fewer
    than k, and at padding. `None`: they were not written down."""
    passes: jax.Array | None = None
    """`[P, G]` int32: passes through the model in which each completion had a part, where it was sampled with
    speculation: without, it takes one for each token."""

    experts: jax.Array | None = None
    """`[P, G, Tc, L, k]` int16: the experts that computed each token, in each layer; −1: not known, as of a
    completion's last token, which is drawn and not computed, and of layers without experts. `None`: they were not
    written down."""
    prompt_experts: jax.Array | None = None
    """`[P, Tp, L, k]` int16: the same of prompts."""

    @property
    def mask(self) -> jax.Array:
        """Which completion positions hold sampled tokens, bool `[P, G, Tc]`; from lengths, never from ids."""
        return length_mask(self.completion_lengths, self.completion.shape[-1])

    def check(self) -> None:
        """Asserts that the arrays fit together, by their shapes and types alone: at the start of an update step.

        Raises:
            AssertionError: they do not; names the shapes or types.
        """
        chex.assert_rank(self.completion, 3)
        prompts, group, width = self.completion.shape
        chex.assert_shape(self.prompt, (prompts, None))
        chex.assert_shape(self.prompt_lengths, (prompts,))
        chex.assert_shape([self.completion_lengths, self.finished], (prompts, group))
        chex.assert_shape([self.logprobs, self.sampler_logprobs], (prompts, group, width))
        if self.kept is not None:
            chex.assert_shape(self.kept, (prompts, group, width, None))
            chex.assert_type(self.kept, int)
        if self.experts is not None:
            assert self.prompt_experts is not None, "there are experts of completions, and none of prompts"
            chex.assert_shape(self.experts, (prompts, group, width, *self.experts.shape[3:]))
            chex.assert_shape(self.prompt_experts, (*self.prompt.shape, *self.experts.shape[3:]))
        chex.assert_type([self.prompt, self.prompt_lengths, self.completion, self.completion_lengths], int)
        chex.assert_type([self.finished, self.logprobs, self.sampler_logprobs], [bool, float, float])

    def of_tokens(self, values: jax.Array) -> jax.Array:
        """Values `[P, G, Tc]` where there are sampled tokens, 0 at padding, whatever stands there."""
        return jnp.where(self.mask, values, 0.0)

    def of_completions(self, values: jax.Array) -> jax.Array:
        """Values of completions `[P, G]` as they are, those of tokens `[P, G, Tc]` summed over the sampled ones."""
        return values if values.ndim == 2 else jnp.sum(self.of_tokens(values), axis=-1)

    def samples(self, start: int | None, stop: int | None = None) -> Rollout:
        """The rollout with only these samples of each prompt: indices along the group, as of a slice."""
        return self.replace(**{name: value[:, start:stop] for name, value in self.of_samples.items()})

    @property
    def of_samples(self) -> dict[str, jax.Array]:
        """The arrays `[P, G, …]` by name."""
        return {n: value for n, value in vars(self).items() if value is not None and not n.startswith("prompt")}


class CriticState(struct.PyTreeNode):
    """A critic that has parameters of its own."""

    params: Any
    opt_state: Any


class TrainState(struct.PyTreeNode):
    """Everything that an update changes; what a checkpoint must hold beside the data's position."""

    step: jax.Array
    """Scalar int32: updates steps (iterations) made."""
    params: Any
    """The policy's parameters."""
    opt_state: Any
    """The optimizer's state."""
    key: jax.Array
    """Root of all randomness, uint32 key data; constant: each step folds its number in."""
    memory: Any = ()
    """What the advantage estimator remembers of earlier batches: a running baseline, an adaptive coefficient."""
    critic: CriticState | None = None
    """The critic, where it has parameters of its own."""
    average: Any = None
    """A running average, float32, of those of the policy's parameters that are trained, where an algorithm reads one:
    the policy as its own teacher."""
