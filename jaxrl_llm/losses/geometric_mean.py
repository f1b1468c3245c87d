"""GMPO: tokens are clipped one by one, then the geometric mean of their ratios is the sequence's ratio."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import check_not_negative, clip_metrics, policy_rows, ratio_metrics
from jaxrl_llm.losses.aggregate import aggregate
from jaxrl_llm.losses.ratio import ClipIndicators, clamp_log_ratio
from jaxrl_llm.masking import safe_divide, segment_first, segment_total
from jaxrl_llm.records import Metrics


def gmpo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip_low: float | None = 0.4,
    clip_high: float | None = 0.4,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """Geometric-mean policy optimization: the geometric mean of token ratios that were clipped one by one.

        mean over sequences of  −A s        s = exp(Σₜ cₜ / n)
        cₜ = min(log rₜ, clip_high) if A > 0, max(log rₜ, −clip_low) if A < 0, 0 if A = 0

    The bounds are on the *logarithm* of a ratio: the default is the range from e⁻⁰·⁴ to e⁰·⁴. An outlier moves a
    geometric mean little, so that the range can be wide. Advantages may differ between tokens: then each is clipped
    by its own sign, and the sequence has their mean. Unlike `gspo_loss`, which clips the mean and so drops whole
    sequences, a clipped token drops out alone, and there is no second clip.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        clip_low: Distance of the lower bound of log r from 0. None: no bound.
        clip_high: Distance of the upper bound of log r from 0. None: no bound.
        weights: As `gspo_loss`.
        normalizer: As `gspo_loss`.
        segment_ids: As `grpo_loss`.
        count_empty: As `grpo_loss`.

    Returns:
        The loss, a float32 scalar, and metrics: `clip_ratio/low_mean`, `clip_ratio/high_mean`,
        `clip_ratio/region_mean`, `approx_kl/k1` and `approx_kl/k3` over tokens, `ratio/mean` and `ratio/max` of s over
        sequences.

    Raises:
        ValueError: As `grpo_loss`, and on a negative bound.

    Source: Zhao et al. 2025, "Geometric-mean policy optimization" (2507.20673).
    """
    check_not_negative(clip_low=clip_low, clip_high=clip_high)
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    low = -jnp.inf if clip_low is None else -clip_low
    high = jnp.inf if clip_high is None else clip_high
    tokens = clamp_log_ratio(rows.log_ratio)
    rising = rows.advantages > 0
    falling = rows.advantages < 0
    clipped = jnp.where(rising, jnp.minimum(tokens, high), jnp.where(falling, jnp.maximum(tokens, low), 0.0))
    indicators = ClipIndicators(low=(tokens < low) & falling, high=(tokens > high) & rising)

    count = segment_total(rows.mask, rows.mask, segment_ids)
    log_ratio = safe_divide(segment_total(clipped, rows.mask, segment_ids), count)
    advantage = safe_divide(segment_total(rows.advantages, rows.mask, segment_ids), count)
    loss = aggregate(
        rows.weigh(-advantage * jnp.exp(log_ratio)),
        rows.mask,
        mode="seq-mean-token-mean",
        normalizer=normalizer,
        segment_ids=segment_ids,
        count_empty=count_empty,
    )
    metrics = clip_metrics(indicators, rows.mask)
    first = segment_first(rows.mask, segment_ids)
    return loss, metrics | ratio_metrics(rows, jax.lax.stop_gradient(log_ratio), first)
