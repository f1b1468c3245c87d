"""The entropy bonus, and the controller that switches it on where exploration dies out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.masking import as_float, check_mask
from jaxrl_llm.records import Mean, Metrics


def entropy_bonus(
    entropy: ArrayLike,
    mask: ArrayLike,
    *,
    entropy_coef: ArrayLike,
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """The term that keeps a policy random, to be added to its loss.

        −entropy_coef · Agg[ H ]

    H is the entropy of the whole distribution that a token was drawn from, at the sampling temperature
    (`jaxrl_llm.logprobs` gives it beside the log-probability), and is differentiated. The sampled token's −logprobs
    would estimate its value, but not its gradient: ∇logprobs is 0 on average. Unlike `kl_loss`, it draws the policy
    towards the uniform distribution and not towards a reference.

    Args:
        entropy: `[..., T]`, in nats.
        mask: Bool `[..., T]`, True on the tokens of the completions; whatever is elsewhere is ignored.
        entropy_coef: Weight; 0.01 in the PPO paper's games, mostly 0 for language models. May be traced.
        aggregation: As the policy loss it is added to; see `aggregate`, also for the arguments that follow.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        max_length: Constant of the aggregation "seq-mean-token-sum-norm".
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.
        group_ids: Labels `[...]` of the rows, for the group modes.
        count_empty: Whether sequences without a valid token count.

    Returns:
        The term, a float32 scalar (negative for a positive weight), and the metric `entropy`, the mean per token.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: Williams & Peng 1991; Mnih et al. 2016 (1602.01783).
    """
    mask = check_mask(mask, entropy=entropy)
    mean = aggregate(
        entropy,
        mask,
        mode=aggregation,
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )
    return -mean * entropy_coef, {"entropy": Mean.of(jax.lax.stop_gradient(as_float(entropy)), mask)}


class EntropyControl(NamedTuple):
    """State of the adaptive weight of the entropy bonus; part of what a checkpoint must hold."""

    coef: Array
    """Weight of the bonus while it is on."""
    entropy: Array
    """Mean entropy per token at the last update, which decides whether the bonus is on; ∞ before the first."""

    @classmethod
    def init(cls, entropy_coef: float = 0.0) -> EntropyControl:
        """The state before the first step."""
        return cls(jnp.float32(entropy_coef), jnp.float32(jnp.inf))

    def active_coef(self, *, target: float = 0.2) -> Array:
        """The weight to use in the next step: `coef` while the entropy is at or below the target, else 0."""
        return jnp.where(self.entropy <= target, self.coef, 0.0)


def update_entropy_control(
    state: EntropyControl,
    entropy: ArrayLike,
    *,
    target: float = 0.2,
    delta: float = 0.005,
    minimum: float = 0.0,
    maximum: float = 1.0,
) -> EntropyControl:
    """One step of the adaptive entropy weight.

        coef ← min(coef + delta, maximum)    if entropy ≤ target
        coef ← max(coef − delta, minimum)    otherwise

    Unlike `entropy_bonus` with a fixed weight, which pushes always, it makes it push only on a policy that has become
    too sure of itself (`EntropyControl.active_coef`), the harder the longer that lasts. The default target of 0.2
    nats is that of TRL and near total collapse: set it near the entropy that training starts from.

    Args:
        state: `EntropyControl`.
        entropy: Mean per token over the whole batch of the step just made, in nats.
        target: Entropy to hold.
        delta: Change of the weight per step.
        minimum: Lower bound of the weight.
        maximum: Upper bound of the weight.

    Returns:
        The next state.

    Raises:
        ValueError: If the bounds are in the wrong order.

    Source: He et al. 2025, "Skywork Open Reasoner 1" (2505.22312), as in TRL.
    """
    if isinstance(minimum, int | float) and isinstance(maximum, int | float) and minimum > maximum:
        raise ValueError(f"minimum is {minimum} and maximum {maximum}: the bounds of the weight are in the wrong order")
    entropy = jax.lax.stop_gradient(as_float(entropy)).astype(state.entropy.dtype)
    raised = jnp.minimum(state.coef + delta, maximum)
    lowered = jnp.maximum(state.coef - delta, minimum)
    return EntropyControl(jnp.where(entropy <= target, raised, lowered), entropy)
