"""REINFORCE without a critic: reward-to-go minus a baseline, and REINFORCE++, which whitens it over the batch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.group import group_advantages
from jaxrl_llm.advantages.shaping import RewardKLEstimator, shape_rewards
from jaxrl_llm.advantages.statistics import group_labels, whiten_by_length
from jaxrl_llm.masking import (
    as_float,
    check_choice,
    check_mask,
    mask_or_all,
    masked_mean,
    per_token,
    safe_divide,
    suffix_sum,
    whiten,
)

NormalizeOver = Literal["tokens", "sequences"]


def reinforce_advantages(
    token_rewards: ArrayLike,
    mask: ArrayLike,
    *,
    gamma: float = 1.0,
    baseline: ArrayLike = 0.0,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """The discounted sum of the rewards to come, minus a baseline.

        Aₜ = Σₖ₌ₜ gamma⁽ᵏ⁻ᵗ⁾ rₖ − baseline

    The baseline must not depend on the sequence's own actions: 0, a constant, a running mean of earlier batches
    (`EmaBaseline`), a group's other samples. The loss of REINFORCE sums over tokens: dividing it by the length
    changes the estimator. For a whole sequence, A is just score − baseline. Unlike `gae`, no critic.

    Args:
        token_rewards: `[..., T]`, from `shape_rewards`.
        mask: Bool `[..., T]`. A masked token amid a completion is skipped.
        gamma: Discount per token.
        baseline: A scalar, `[...]` with one for each sequence, or `[..., T]` (needed with `segment_ids`, if no scalar);
            a constant.
        segment_ids: Integers `[..., T]` where rows hold several packed sequences, each a run of equal ids.

    Returns:
        `[..., T]`, 0 at masked positions.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """
    mask = check_mask(mask, token_rewards=token_rewards, segment_ids=segment_ids)
    returns = suffix_sum(token_rewards, mask, discount=gamma, segment_ids=segment_ids)
    baseline = jax.lax.stop_gradient(as_float(baseline))
    if baseline.ndim:
        baseline = per_token(mask, packed=segment_ids is not None, baseline=baseline)
    return jnp.where(mask, returns - baseline, 0.0)


class EmaBaseline(NamedTuple):
    """A running mean of the rewards of earlier batches, for `reinforce_advantages`; state that a checkpoint holds.

        total ← decay · total + (1 − decay) · mean reward;  weight ← decay · weight + (1 − decay)
        baseline = total / weight

    Read it before the update, so that a batch is not its own baseline. The division takes the zero that it
    started from out again, as in Adam. Unlike a critic, it is one number for all prompts.

    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """

    total: Array
    weight: Array

    @classmethod
    def init(cls) -> EmaBaseline:
        """The state before the first batch, whose baseline is 0."""
        return cls(jnp.float32(0), jnp.float32(0))

    def value(self) -> Array:
        """The baseline, a float32 scalar."""
        return safe_divide(self.total, self.weight)

    def update(self, rewards: ArrayLike, *, decay: float, mask: ArrayLike | None = None) -> EmaBaseline:
        """Takes a batch in.

        Args:
            rewards: Rewards of the batch's sequences, any shape.
            decay: Weight of the past, in [0, 1).
            mask: Bool, of the shape of `rewards`: False for samples that could not be scored.

        Returns:
            The new state; the old one if no reward is valid.
        """
        if isinstance(decay, int | float) and not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: it must be in [0, 1)")
        mask = mask_or_all(mask, rewards=rewards)
        new = EmaBaseline(
            decay * self.total + (1 - decay) * masked_mean(rewards, mask), decay * self.weight + (1 - decay)
        )
        return jax.tree.map(lambda old, new: jnp.where(jnp.any(mask), new, old), self, new)


def reinforce_plus_plus_advantages(
    scores: ArrayLike | None,
    mask: ArrayLike,
    *,
    token_rewards: ArrayLike | None = None,
    old_logprobs: ArrayLike | None = None,
    ref_logprobs: ArrayLike | None = None,
    kl_coef: ArrayLike = 0.01,
    kl_estimator: RewardKLEstimator = "k1",
    gamma: float = 1.0,
    ddof: int = 1,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """REINFORCE++: returns with the KL penalty inside, whitened over all tokens of the batch.

        Aₜ = whiten( score − kl_coef · Σₖ₌ₜ (old_logprobsₖ − ref_logprobsₖ) )        (gamma = 1)

    The batch is the whole rollout, on all devices, once: not a micro-batch. Unlike `group_advantages`, no group is
    needed: the mean of the whole batch is the baseline.

    Args:
        scores: `[...]`, as `shape_rewards`; None with rewards of tokens alone.
        mask: Bool `[..., T]`.
        token_rewards: `[..., T]`, as `shape_rewards`: a token is credited with those from itself on.
        old_logprobs: As `shape_rewards`.
        ref_logprobs: As `shape_rewards`; both are needed unless `kl_coef` is 0.
        kl_coef: Weight of the KL penalty.
        kl_estimator: As `shape_rewards`.
        gamma: Discount per token.
        ddof: 1 for the unbiased variance (verl), 0 for the population's (OpenRLHF).
        segment_ids: As `shape_rewards`.

    Returns:
        `[..., T]`, 0 at masked positions.

    Raises:
        ValueError: As `shape_rewards`.

    Source: Hu et al. 2025, "REINFORCE++" (2501.03262).
    """
    rewards = shape_rewards(
        scores,
        mask,
        token_rewards=token_rewards,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        segment_ids=segment_ids,
    )
    return whiten(suffix_sum(rewards, mask, discount=gamma, segment_ids=segment_ids), mask, ddof=ddof)


def reinforce_plus_plus_baseline_advantages(
    rewards: ArrayLike,
    *,
    lengths: ArrayLike | None = None,
    normalize_over: NormalizeOver = "tokens",
    ddof: int = 1,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """REINFORCE++-baseline: rewards minus their group's mean, whitened over the batch.

        A = whiten( R − mean of its group )

    The KL, if any, is a term of the loss (k2 in the authors' scripts). Over tokens, a sequence counts as often as
    it has tokens, in mean and variance; so even a group of equal rewards may get an advantage that is not 0.
    Unlike `group_advantages(scale="batch")`, the deviation is that of the *centred* rewards.

    Args:
        rewards: `[..., G]`, a group along the last axis; or any shape with `group_ids`.
        lengths: Number of tokens of each sequence, of the shape of `rewards`; needed for "tokens".
        normalize_over: What the whitening averages over: "tokens" (OpenRLHF, verl) or "sequences" (ms-swift).
        ddof: 1 for the unbiased variance (verl), 0 for the population's (OpenRLHF).
        mask: Bool, of the shape of `rewards`: False for samples that could not be scored.
        group_ids: Labels of the shape of `rewards`; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        The shape of `rewards`: one advantage for each sequence, 0 where masked.

    Raises:
        ValueError: On shapes that do not fit, an unknown option, or "tokens" without `lengths`.

    Source: Hu et al. 2025, "REINFORCE++" (2501.03262).
    """
    group_ids = group_labels(group_ids, group_size, rewards=rewards)
    check_choice("normalize_over", normalize_over, NormalizeOver)
    mask = mask_or_all(mask, rewards=rewards)
    centred = group_advantages(rewards, scale="none", mask=mask, group_ids=group_ids)
    if normalize_over == "sequences":
        return whiten(centred, mask, ddof=ddof)
    if lengths is None:
        raise ValueError("normalize_over 'tokens' weighs each sequence by its length: pass lengths, or 'sequences'")
    return whiten_by_length(centred, lengths, mask, ddof=ddof)
