"""RLOO with a KL penalty in the reward, before or after the leave-one-out baseline."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.group import group_advantages
from jaxrl_llm.advantages.shaping import RewardKLEstimator, rlhf_reward, shape_rewards
from jaxrl_llm.advantages.statistics import group_labels
from jaxrl_llm.masking import as_float, check_mask, fill_masked, mask_or_all, masked_sum, per_token, suffix_sum


def rloo_advantages(
    scores: ArrayLike,
    old_logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    token_rewards: ArrayLike | None = None,
    kl_coef: ArrayLike = 0.05,
    kl_estimator: RewardKLEstimator = "k1",
    score_clip: float | None = None,
    sample_mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """REINFORCE leave-one-out: each sample's reward, its KL inside, against the mean of the others of its prompt.

        Rᵢ = scoreᵢ + Σₜ token_rewardsᵢₜ − kl_coef · Σₜ (old_logprobsᵢₜ − ref_logprobsᵢₜ)
        Aᵢ = Rᵢ − Σⱼ≠ᵢ Rⱼ / (G − 1)

    Without a KL it is `group_advantages(scores, scale="none", baseline="leave_one_out")`. With the whole batch as one
    group, `group_advantages(A.reshape(1, -1))` standardizes the result (TRL's `normalize_advantages`). Unlike
    `rloo_token_advantages`, the baseline contains the KL of the other samples.

    Args:
        scores: `[..., G]`, a group along the last axis; or any shape with `group_ids`. Zeros with rewards of tokens
            alone.
        old_logprobs: `[..., G, T]`, as `rlhf_reward`.
        ref_logprobs: `[..., G, T]`.
        mask: Bool `[..., G, T]`.
        token_rewards: `[..., G, T]`, added to the score; what is at masked positions is ignored.
        kl_coef: Weight of the KL.
        kl_estimator: As `rlhf_reward`.
        score_clip: As `rlhf_reward`.
        sample_mask: Bool, of the shape of `scores`: False for samples that could not be scored.
        group_ids: Labels of the shape of `scores`; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        The shape of `scores`: one advantage for each sample. A group of one has 0 (in verl, its raw reward).

    Raises:
        ValueError: On shapes that do not fit or an unknown estimator.

    Source: Ahmadian et al. 2024, "Back to basics" (2402.14740).
    """
    group_ids = group_labels(group_ids, group_size, scores=scores)
    sample_mask = mask_or_all(sample_mask, scores=scores)
    rewards = rlhf_reward(
        _with_tokens(fill_masked(scores, sample_mask), token_rewards, mask),
        old_logprobs,
        ref_logprobs,
        mask,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        score_clip=score_clip,
    )
    return group_advantages(rewards, scale="none", baseline="leave_one_out", mask=sample_mask, group_ids=group_ids)


def rloo_token_advantages(
    scores: ArrayLike,
    old_logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    token_rewards: ArrayLike | None = None,
    kl_coef: ArrayLike = 0.01,
    kl_estimator: RewardKLEstimator = "k1",
    advantage_clip: float | None = None,
    sample_mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """RLOO with the KL after the baseline, as OpenRLHF computes it: leave-one-out scores, then rewards to go.

        Aᵢₜ = scoreᵢ + Σₖ₌ₜ token_rewardsᵢₖ − Σⱼ≠ᵢ Rⱼ / (G − 1) − kl_coef · Σₖ₌ₜ (old_logprobsᵢₖ − ref_logprobsᵢₖ)
        Rⱼ = scoreⱼ + Σₜ token_rewardsⱼₜ

    Unlike `rloo_advantages`, the baseline knows no KL, and a token bears only the KL, and rewards, from itself on.

    Args:
        scores: As `rloo_advantages`.
        old_logprobs: As `rloo_advantages`.
        ref_logprobs: As `rloo_advantages`.
        mask: As `rloo_advantages`.
        token_rewards: As `rloo_advantages`.
        kl_coef: Weight of the KL.
        kl_estimator: As `rloo_advantages`.
        advantage_clip: Bound ±advantage_clip on the score minus its baseline, before the KL (OpenRLHF: 10).
        sample_mask: As `rloo_advantages`; the KL of such a sample's tokens is left out, too.
        group_ids: As `rloo_advantages`.
        group_size: As `rloo_advantages`.

    Returns:
        `[..., G, T]`, 0 at masked positions.

    Raises:
        ValueError: On shapes that do not fit or an unknown estimator.

    Source: Ahmadian et al. 2024, "Back to basics" (2402.14740); OpenRLHF.
    """
    group_ids = group_labels(group_ids, group_size, scores=scores)
    sample_mask = mask_or_all(sample_mask, scores=scores)
    total = _with_tokens(scores, token_rewards, mask)
    centred = group_advantages(total, scale="none", baseline="leave_one_out", mask=sample_mask, group_ids=group_ids)
    if advantage_clip is not None:
        centred = jnp.clip(centred, -advantage_clip, advantage_clip)
    mask = check_mask(mask)
    mask &= per_token(mask, sample_mask=sample_mask)
    rewards = shape_rewards(
        centred,
        mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    if token_rewards is None:
        return suffix_sum(rewards, mask)
    # What a token got before belongs to the total, not to what is to come: it is taken off again.
    earned = fill_masked(token_rewards, mask)
    before = jnp.sum(earned, axis=-1, keepdims=True) - suffix_sum(earned, mask)
    return jnp.where(mask, suffix_sum(rewards, mask) - before, 0.0)


def _with_tokens(scores: ArrayLike, token_rewards: ArrayLike | None, mask: ArrayLike) -> Array:
    """Scores and, if there are any, the sums of the rewards of tokens."""
    return as_float(scores) if token_rewards is None else as_float(scores) + masked_sum(token_rewards, mask, axis=-1)
