"""ReMax: the score of the greedy completion of the same prompt as the baseline."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.shaping import RewardKLEstimator, shape_rewards
from jaxrl_llm.masking import as_float, check_mask, per_token, suffix_sum


def remax_advantages(
    scores: ArrayLike,
    greedy_scores: ArrayLike,
    mask: ArrayLike,
    *,
    token_rewards: ArrayLike | None = None,
    old_logprobs: ArrayLike | None = None,
    ref_logprobs: ArrayLike | None = None,
    kl_coef: ArrayLike = 0.0,
    kl_estimator: RewardKLEstimator = "k1",
    segment_ids: ArrayLike | None = None,
) -> Array:
    """ReMax: the score minus that of the policy's greedy completion of the same prompt.

        Aₜ = score + Σₖ₌ₜ token_rewardsₖ − greedy_score − kl_coef · Σₖ₌ₜ (old_logprobsₖ − ref_logprobsₖ)

    It is unbiased, since the baseline does not depend on the sample; the greedy completion's own KL is no part of
    it. Unlike `rloo_advantages`, one sample a prompt is enough, at the price of one greedy completion, decoded
    with the same limits and scored by the same rewards.

    Args:
        scores: `[...]`, or `[..., T]` with packed rows, as `shape_rewards`; zeros with rewards of tokens alone.
        greedy_scores: Of the shape of `scores`, or with 1 along the group: `[P, 1]` for scores `[P, G]`. With rewards
            of tokens, all that the greedy completion got.
        mask: Bool `[..., T]`.
        token_rewards: `[..., T]`, as `shape_rewards`: a token is credited with those from itself on.
        old_logprobs: As `shape_rewards`.
        ref_logprobs: As `shape_rewards`; both are needed unless `kl_coef` is 0.
        kl_coef: Weight of the KL penalty.
        kl_estimator: As `shape_rewards`.
        segment_ids: As `shape_rewards`.

    Returns:
        `[..., T]`, 0 at masked positions; with `kl_coef` 0 and scores alone, all tokens of a sequence have the same.

    Raises:
        ValueError: As `shape_rewards`, or if the shape of the greedy scores does not fit.

    Source: Li et al. 2023, "ReMax" (2310.10505).
    """
    rewards = shape_rewards(
        _minus_greedy(scores, greedy_scores),
        mask,
        token_rewards=token_rewards,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        segment_ids=segment_ids,
    )
    return suffix_sum(rewards, mask, segment_ids=segment_ids)


def remax_code_returns(
    scores: ArrayLike,
    greedy_scores: ArrayLike,
    old_logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    kl_coef: ArrayLike = 0.05,
    gamma: float = 0.99,
    score_clip: float | None = 5.0,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """ReMax as its authors' code weighs the tokens: the difference discounted, the KL of the token alone.

        Aₜ = −kl_coef · (old_logprobsₜ − ref_logprobsₜ) + gamma⁽ⁿ⁻ᵗ⁾ · clip(score − greedy_score, ±score_clip)

    with t counted from 0, so that even the last of the n tokens is discounted once. Unlike `remax_advantages`, it
    is not the return of the shaped rewards: a token does not bear the KL of those that follow.

    Args:
        scores: As `remax_advantages`.
        greedy_scores: As `remax_advantages`.
        old_logprobs: As `remax_advantages`.
        ref_logprobs: As `remax_advantages`.
        mask: As `remax_advantages`.
        kl_coef: Weight of the KL penalty.
        gamma: Discount per token.
        score_clip: Bound on the difference of the scores. None: no bound.
        segment_ids: As `remax_advantages`.

    Returns:
        `[..., T]`, 0 at masked positions.

    Raises:
        ValueError: As `remax_advantages`.

    Source: Li et al. 2023, "ReMax" (2310.10505), the authors' code.
    """
    mask = check_mask(mask, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, segment_ids=segment_ids)
    difference = per_token(mask, packed=segment_ids is not None, scores=_minus_greedy(scores, greedy_scores))
    if score_clip is not None:
        difference = jnp.clip(difference, -score_clip, score_clip)
    left = suffix_sum(jnp.ones_like(difference), mask, segment_ids=segment_ids)
    kl = shape_rewards(  # no score: what is left is the penalty
        jnp.zeros_like(difference),
        mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        segment_ids=segment_ids,
    )
    return jnp.where(mask, kl + gamma**left * difference, 0.0)


def _minus_greedy(scores: ArrayLike, greedy_scores: ArrayLike) -> Array:
    shape, greedy = np.shape(scores), np.shape(greedy_scores)
    # As many axes: [P] would silently fit [P, G] where P = G.
    if len(greedy) != len(shape) or any(size not in (1, wanted) for size, wanted in zip(greedy, shape, strict=True)):
        raise ValueError(
            f"greedy_scores has shape {greedy}, but scores has shape {shape}: pass that shape, or 1 along the group"
        )
    return as_float(scores) - as_float(greedy_scores)
