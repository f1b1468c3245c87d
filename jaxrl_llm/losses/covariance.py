"""Losses that hold back the few tokens whose covariance of log-prob and advantage drives the entropy down."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import check_not_negative, clip_metrics, policy_rows, ratio_metrics
from jaxrl_llm.losses.aggregate import aggregate
from jaxrl_llm.losses.ratio import clip_indicators, clipped_surrogate
from jaxrl_llm.masking import count_true, masked_mean
from jaxrl_llm.records import Mean, Metrics


def token_covariance(logprobs: ArrayLike, advantages: ArrayLike, mask: ArrayLike) -> Array:
    """Each token's part in the covariance of log-prob and advantage, the quantity that entropy falls with.

        (logprobs − mean logprobs) (A − mean A)        means over all valid tokens

    The means are those of the tokens given: of a micro-batch they are others than of the batch. Unlike the entropy
    itself, it says *which* tokens make a policy sure of itself: likely ones that did well, and unlikely ones that
    did badly.

    Args:
        logprobs: Log-probabilities of the sampled tokens under the policy, `[..., T]`.
        advantages: `[..., T]`, or `[...]` with one for each sequence.
        mask: Bool `[..., T]`, True on the tokens that are trained.

    Returns:
        `[..., T]`, a constant, 0 at masked positions.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: Cui et al. 2025, "The entropy mechanism of reinforcement learning for reasoning" (2505.22617).
    """
    rows = policy_rows(logprobs, None, advantages, mask)
    logprobs = rows.old_logprobs  # a constant
    covariance = (logprobs - masked_mean(logprobs, rows.mask)) * (
        rows.advantages - masked_mean(rows.advantages, rows.mask)
    )
    return jnp.where(rows.mask, covariance, 0.0)


def clip_cov_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    key: Array,
    *,
    fraction: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float | None = 1.0,
    clip_high: float | None = 1.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Clip-Cov: leaves a few random tokens of high covariance out, so that entropy lasts.

        Σ max(−A r, −A clip(r, 1 − clip_low, 1 + clip_high)) · keep / number of valid tokens

    keep = 0 for max(1, ⌊fraction · number of valid tokens⌋) tokens, drawn evenly from those with
    cov_low < covariance < cov_high that the clip has not cut already; 1 for the rest. The default bounds of the ratio
    are the authors', who all but switch that clip off. Unlike `kl_cov_loss`, the chosen tokens have no gradient.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        key: PRNG key of the draw; another one for each update and micro-batch.
        fraction: Share of the valid tokens that is left out.
        cov_low: Lower end of the band of `token_covariance`, exclusive.
        cov_high: Upper end, exclusive.
        clip_low: As `grpo_loss`.
        clip_high: As `grpo_loss`.
        weights: As `grpo_loss`.
        normalizer: As `grpo_loss`.
        segment_ids: As `grpo_loss`; the loss is the same with and without.

    Returns:
        The loss, a float32 scalar, and the metrics of `grpo_loss` but `kl`, and `clip_ratio/covariance_mean`, the
        share of tokens left out.

    Raises:
        ValueError: As `grpo_loss`, and on a fraction that is negative.

    Source: Cui et al. 2025, "The entropy mechanism of reinforcement learning for reasoning" (2505.22617).
    """
    check_not_negative(fraction=fraction)
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    bounds = {"clip_low": clip_low, "clip_high": clip_high}
    clipped = clip_indicators(*rows.inputs, **bounds)
    covariance = token_covariance(rows.logprobs, rows.advantages, rows.mask)
    band = rows.mask & ~clipped.region & (covariance > cov_low) & (covariance < cov_high)
    dropped = _largest(jax.random.uniform(key, band.shape), band, _number_of_tokens(rows.mask, fraction))
    losses = rows.weigh(jnp.where(dropped, 0.0, clipped_surrogate(*rows.inputs, **bounds)))
    metrics = {"clip_ratio/covariance_mean": Mean.of(dropped, rows.mask)}
    metrics |= clip_metrics(clipped, rows.mask) | ratio_metrics(rows)
    return aggregate(losses, rows.mask, mode="token-mean", normalizer=normalizer), metrics


def kl_cov_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    fraction: float = 2e-4,
    kl_coef: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """KL-Cov: holds the tokens of the highest covariance near the old policy, so that entropy lasts.

        Σ (−A r + kl_coef |log r| · chosen) / number of valid tokens

    chosen = 1 for the max(1, ⌊fraction · number of valid tokens⌋) tokens of the highest `token_covariance` (of equal
    ones, the first), else 0. There is no clip. Unlike `clip_cov_loss`, the chosen tokens keep their gradient and get
    another one beside it, and the choice is not random.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        fraction: Share of the valid tokens that is held back; the paper has 2e-4 for large models, 2e-3 for small.
        kl_coef: Weight of the penalty; 1 in the authors' scripts, 0.1 in verl.
        weights: As `grpo_loss`; not on the penalty.
        normalizer: As `grpo_loss`.
        segment_ids: As `grpo_loss`; the loss is the same with and without.

    Returns:
        The loss, a float32 scalar, and the metrics of `grpo_loss` that are about the ratio.

    Raises:
        ValueError: As `grpo_loss`, and on a fraction that is negative.

    Source: Cui et al. 2025, "The entropy mechanism of reinforcement learning for reasoning" (2505.22617).
    """
    check_not_negative(fraction=fraction)
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    covariance = token_covariance(rows.logprobs, rows.advantages, rows.mask)
    chosen = _largest(covariance, rows.mask, _number_of_tokens(rows.mask, fraction))
    policy = clipped_surrogate(*rows.inputs, clip_low=None, clip_high=None)
    losses = rows.weigh(policy) + jnp.where(chosen, kl_coef * jnp.abs(rows.log_ratio), 0.0)
    return aggregate(losses, rows.mask, mode="token-mean", normalizer=normalizer), ratio_metrics(rows)


def _number_of_tokens(mask: Array, fraction: float) -> Array:
    return jnp.maximum(jnp.floor(fraction * count_true(mask)), 1)


def _largest(scores: Array, eligible: Array, count: Array) -> Array:
    """Marks the `count` (traced) eligible places with the largest scores, of equal ones the first."""
    order = jnp.argsort(-jnp.where(eligible, scores, -jnp.inf).ravel(), stable=True)
    places = jnp.arange(order.size, dtype=jnp.int32)
    rank = jnp.zeros_like(places).at[order].set(places, unique_indices=True)
    return eligible & (rank.reshape(eligible.shape) < count)
