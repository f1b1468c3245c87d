"""BCO: a classifier of good and bad completions, whose baseline is a running mean of the rewards."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import softplus
from jax.typing import ArrayLike

from jaxrl_llm.losses._pairs import mean_over
from jaxrl_llm.losses._rows import check_positive
from jaxrl_llm.losses._samples import check_labels, make_samples, sample_metrics
from jaxrl_llm.masking import check_choice, fill_masked, mask_or_all, masked_mean
from jaxrl_llm.records import Mean, Metrics

ShiftAverage = Literal["samples", "sides"]


def bco_loss(
    logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    labels: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    reward_shift: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Binary classifier optimization: logistic regression of the label on the implicit reward.

        mean over samples of  −log σ(beta D − δ)  if desirable,  −log σ(−(beta D − δ))  if not        δ = reward_shift

    Unlike `kto_loss`, the loss is logistic, and the baseline a running mean of the rewards, without mismatched pairs.

    Args:
        logprobs: As `kto_loss`.
        ref_logprobs: As `kto_loss`.
        labels: As `kto_loss`.
        beta: Inverse temperature.
        reward_shift: δ, a constant, the value of a `RewardShift`. With 0 it is the variant "one_sided_dpo" of KTO.
        weights: Constant factors on the samples' losses, `[...]`: 1 for desirable ones and, for underlying distribution
            matching, p / (1 − p) for undesirable ones, p the probability that their prompt is a desirable one's.
        mask: As `kto_loss`.
        normalizer: Number of valid samples of the whole batch, if these are a part of it. None: the number here.

    Returns:
        As `kto_loss`, with the metric `delta` in place of `kl`.

    Raises:
        ValueError: On unequal shapes, or labels or a mask that are not bool.

    Source: Jung et al. 2024, "Binary classifier optimization for LLM alignment" (2404.04656).
    """
    check_positive(beta=beta)
    samples = make_samples(logprobs, ref_logprobs, labels, mask)
    shift = jax.lax.stop_gradient(jnp.asarray(reward_shift))
    logits = beta * samples.log_ratios - shift
    losses = softplus(jnp.where(samples.labels, -logits, logits))
    metrics = sample_metrics(samples, beta)
    metrics["delta"] = Mean.of(jnp.broadcast_to(shift, samples.mask.shape), samples.mask)
    return mean_over(losses, samples.mask, weights=weights, normalizer=normalizer), metrics


class RewardShift(NamedTuple):
    """The running mean of the rewards of all samples so far, the δ of BCO: state that goes in and comes out.

        δ = mean over samples        or, over sides,  ½ (mean over the desirable + mean over the undesirable)

    Start from `RewardShift.empty()`, `update` it with each batch, the present one included, and give `value()` to
    `bco_loss`. It belongs in the checkpoint.
    """

    desirable: Mean
    undesirable: Mean

    @classmethod
    def empty(cls) -> RewardShift:
        """The state before the first batch, with value 0."""
        return cls(Mean(jnp.zeros(()), jnp.zeros(())), Mean(jnp.zeros(()), jnp.zeros(())))

    def update(self, rewards: ArrayLike, labels: ArrayLike, *, mask: ArrayLike | None = None) -> RewardShift:
        """Adds the `implicit_reward`s of a whole batch, `[...]`, as constants."""
        mask, labels = mask_or_all(mask, rewards=rewards), check_labels(labels, rewards=rewards)
        rewards = jax.lax.stop_gradient(fill_masked(rewards, mask))
        return RewardShift(
            self.desirable.merge(Mean.of(rewards, mask & labels)),
            self.undesirable.merge(Mean.of(rewards, mask & ~labels)),
        )

    def value(self, average: ShiftAverage = "samples") -> Array:
        """δ: the mean over "samples" (TRL), or over "sides", which differs if they are unequal in number.

        As long as one side has no samples, it is the mean over the other.
        """
        check_choice("average", average, ShiftAverage)
        if average == "samples":
            return self.desirable.merge(self.undesirable).value()
        seen = jnp.stack([self.desirable.count, self.undesirable.count]) > 0
        return masked_mean(jnp.stack([self.desirable.value(), self.undesirable.value()]), seen)
