"""Losses that clip the importance ratio of whole sequences: GSPO, GSPO-token, LUSPO and GRPO-S."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import PolicyRows, clip_metrics, policy_rows, ratio_metrics
from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.losses.ratio import LOG_RATIO_LIMIT, clip_indicators, clipped_surrogate
from jaxrl_llm.masking import check_mask, fill_masked, safe_divide, segment_first, segment_total
from jaxrl_llm.records import Metrics

SEQUENCE_LOG_RATIO_LIMIT = 10.0


def sequence_log_ratio(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    mask: ArrayLike,
    *,
    length_normalize: bool = True,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """The logarithm of a sequence's importance ratio, given to each of its tokens.

        log s = Σₜ (logprobs − old_logprobs) / n        n valid tokens; without 1/n if not length_normalize

    With 1/n, s is the geometric mean of the token ratios; without, it is the ratio of the probabilities of the whole
    sequence, whose spread grows with its length. Clamped to −20 and 10, so that exp stays useful. Unlike
    `importance_ratio`, all tokens of a sequence share one value, and each has 1/n of its gradient.

    Args:
        logprobs: Log-probabilities of the completions' tokens under the policy, `[..., T]`.
        old_logprobs: The same under the policy that sampled; a constant. None: the policy itself.
        mask: Bool `[..., T]`, True on the tokens that are trained.
        length_normalize: Whether to divide by the number of valid tokens.
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.

    Returns:
        `[..., T]`, the same for all tokens of a sequence; 0 for one without valid tokens.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: Zheng et al. 2025, "Group sequence policy optimization" (2507.18071).
    """
    return _clamp(_mean_log_ratio(logprobs, old_logprobs, mask, length_normalize, segment_ids))


def gspo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip_low: float | None = 3e-4,
    clip_high: float | None = 4e-4,
    length_normalize: bool = True,
    weights: ArrayLike | None = None,
    aggregation: AggregationMode = "seq-mean-token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """Group sequence policy optimization: PPO's clip on the ratio of the sequence, the unit that has the reward.

        mean over sequences of  max(−A s, −A clip(s, 1 − clip_low, 1 + clip_high))        s = exp(Σₜ log r / n)

    s is the geometric mean of a sequence's token ratios, so near to 1 that a clip range as wide as PPO's never cuts.
    `length_normalize=False` takes the ratio of the whole sequence's probabilities, exp(Σₜ log r), for a clip of about
    0.2 (with leave-one-out advantages: TRL's RLOO). Unlike `grpo_loss`, sequences are clipped as a whole or not.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: One for each sequence, `[...]`; or `[..., T]`, the same for all tokens of a sequence (needed with
            `segment_ids`). For advantages that differ between tokens, see `gspo_token_loss`.
        mask: As `grpo_loss`.
        clip_low: Distance of the lower bound of s from 1. None: no bound.
        clip_high: Distance of the upper bound of s from 1. None: no bound.
        length_normalize: Whether s has the exponent 1/n.
        weights: As `grpo_loss`; weights of tokens are averaged over the sequence.
        aggregation: As `grpo_loss`. "token-mean" weighs a sequence by its length: it is what TRL computes with
            `importance_sampling_level="sequence"` and its default `loss_type`.
        normalizer: As `grpo_loss`: by default, the number of sequences in the whole batch.
        max_length: As `grpo_loss`.
        segment_ids: As `grpo_loss`.
        group_ids: As `grpo_loss`.
        count_empty: As `grpo_loss`.

    Returns:
        The loss, a float32 scalar, and metrics: `clip_ratio/low_mean`, `clip_ratio/high_mean`,
        `clip_ratio/region_mean`, `ratio/mean` and `ratio/max` over sequences, `approx_kl/k1` and `approx_kl/k3` over
        tokens.

    Raises:
        ValueError: As `grpo_loss`.

    Source: Zheng et al. 2025, "Group sequence policy optimization" (2507.18071).
    """
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    log_ratio = sequence_log_ratio(
        rows.logprobs, rows.old_logprobs, rows.mask, length_normalize=length_normalize, segment_ids=segment_ids
    )
    losses, metrics = _clip_sequences(log_ratio, rows, clip_low, clip_high, segment_ids)
    loss = aggregate(
        losses,
        rows.mask,
        mode=aggregation,
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )
    return loss, metrics


def gspo_token_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip_low: float | None = 3e-4,
    clip_high: float | None = 4e-4,
    weights: ArrayLike | None = None,
    aggregation: AggregationMode = "seq-mean-token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """GSPO for advantages that differ between the tokens of a sequence.

        mean over sequences of the mean over tokens of  max(−Aₜ sₜ, −Aₜ clip(sₜ, 1 − clip_low, 1 + clip_high))
        sₜ = sg(s) π/sg(π)

    sₜ has the value of the sequence's ratio s and the gradient of the token, s ∇logprobsₜ. Unlike `gspo_loss`, which
    it equals in value and gradient where A is constant, each token's gradient has its own advantage.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        clip_low: As `gspo_loss`.
        clip_high: As `gspo_loss`.
        weights: As `grpo_loss`.
        aggregation: As `gspo_loss`.
        normalizer: As `gspo_loss`.
        max_length: As `grpo_loss`.
        segment_ids: As `grpo_loss`.
        group_ids: As `grpo_loss`.
        count_empty: As `grpo_loss`.

    Returns:
        The loss, a float32 scalar, and metrics: `clip_ratio/low_mean`, `clip_ratio/high_mean`,
        `clip_ratio/region_mean`, `approx_kl/k1` and `approx_kl/k3` over tokens, `ratio/mean` and `ratio/max` over
        sequences.

    Raises:
        ValueError: As `grpo_loss`.

    Source: Zheng et al. 2025, "Group sequence policy optimization" (2507.18071).
    """
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    of_sequence = _mean_log_ratio(rows.logprobs, rows.old_logprobs, rows.mask, True, segment_ids)
    # The bracket is exactly 0, with the gradient of the token.
    log_ratio = jax.lax.stop_gradient(of_sequence) + (rows.logprobs - jax.lax.stop_gradient(rows.logprobs))
    losses, metrics = _clip_sequences(_clamp(log_ratio), rows, clip_low, clip_high, segment_ids, by_token=True)
    loss = aggregate(
        losses,
        rows.mask,
        mode=aggregation,
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )
    return loss, metrics


def luspo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip_low: float | None = 2e-3,
    clip_high: float | None = 2.5e-3,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """Length-unbiased sequence policy optimization: the loss of GSPO, a sequence times its length.

        mean over sequences of  n max(−A s, −A clip(s, 1 − clip_low, 1 + clip_high))        s = exp(Σₜ log r / n)

    Unlike `gspo_loss`, where each token's gradient has the factor 1/n and long completions fade, all tokens of all
    sequences have the same weight.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `gspo_loss`.
        mask: As `grpo_loss`.
        clip_low: As `gspo_loss`.
        clip_high: As `gspo_loss`.
        weights: As `grpo_loss`.
        normalizer: As `gspo_loss`.
        segment_ids: As `grpo_loss`.
        count_empty: As `grpo_loss`.

    Returns:
        As `gspo_loss`.

    Raises:
        ValueError: As `grpo_loss`.

    Source: Liu et al. 2026, "Length-unbiased sequence policy optimization" (2602.05261).
    """
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    log_ratio = sequence_log_ratio(rows.logprobs, rows.old_logprobs, rows.mask, segment_ids=segment_ids)
    losses, metrics = _clip_sequences(log_ratio, rows, clip_low, clip_high, segment_ids)
    options = {"normalizer": normalizer, "segment_ids": segment_ids, "count_empty": count_empty}
    return aggregate(losses, rows.mask, mode="seq-mean-token-sum", **options), metrics


def grpo_s_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.28,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """The sequence-level loss of GRPO-S, for rewards shaped by a sequence's mean entropy.

        mean over sequences of  max(−A s, −A clip(s, 1 − clip_low, 1 + clip_high))        s = exp(Σₜ log r / n)

    What makes GRPO-S is its reward, `grpo_s_rewards`. Unlike `gspo_loss`, it has the clip range of DAPO, which a
    geometric mean hardly ever leaves.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `gspo_loss`.
        mask: As `grpo_loss`.
        clip_low: As `gspo_loss`.
        clip_high: As `gspo_loss`.
        weights: As `gspo_loss`.
        normalizer: As `gspo_loss`.
        segment_ids: As `grpo_loss`.
        count_empty: As `grpo_loss`.

    Returns:
        As `gspo_loss`.

    Raises:
        ValueError: As `grpo_loss`.

    Source: Tan et al. 2025, "GTPO and GRPO-S" (2508.04349).
    """
    return gspo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        weights=weights,
        normalizer=normalizer,
        segment_ids=segment_ids,
        count_empty=count_empty,
    )


def _mean_log_ratio(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    mask: ArrayLike,
    length_normalize: bool,
    segment_ids: ArrayLike | None,
) -> Array:
    mask = check_mask(mask, logprobs=logprobs, old_logprobs=old_logprobs, segment_ids=segment_ids)
    filled = fill_masked(logprobs, mask)
    old = filled if old_logprobs is None else fill_masked(old_logprobs, mask)
    total = segment_total(filled - jax.lax.stop_gradient(old), mask, segment_ids)
    return safe_divide(total, segment_total(mask, mask, segment_ids)) if length_normalize else total


def _clamp(log_ratio: Array) -> Array:
    return jnp.clip(log_ratio, -LOG_RATIO_LIMIT, SEQUENCE_LOG_RATIO_LIMIT)


def _clip_sequences(
    log_ratio: Array,
    rows: PolicyRows,
    clip_low: float | None,
    clip_high: float | None,
    segment_ids: ArrayLike | None,
    by_token: bool = False,
) -> tuple[Array, Metrics]:
    """The clipped surrogate of `log_ratio` `[..., T]`, weighted, and its metrics: of sequences, or clipped by token."""
    bounds = {"clip_low": clip_low, "clip_high": clip_high}
    ratio = log_ratio, jnp.zeros_like(log_ratio), rows.advantages
    first = segment_first(rows.mask, segment_ids)
    clipped = clip_metrics(clip_indicators(*ratio, **bounds), rows.mask if by_token else first)
    return rows.weigh(clipped_surrogate(*ratio, **bounds)), clipped | ratio_metrics(rows, log_ratio, first)
