"""Policy gradients −w A ∇logprobs whose weight w is a constant made of the ratio: CISPO, DPPO and VESPO."""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import (
    check_bounds,
    check_not_negative,
    check_positive,
    clip_metrics,
    policy_rows,
    ratio_metrics,
)
from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.losses.ratio import LOG_RATIO_LIMIT, ClipIndicators, clamp_log_ratio, importance_ratio
from jaxrl_llm.masking import as_float, check_same_shape, per_token, segment_first, segment_total
from jaxrl_llm.records import Mean, Metrics

BinaryDivergence = Literal["tv", "kl"]
LOG_SEQUENCE_WEIGHT_FLOOR = math.log(1e-8)


def cispo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    w_min: float = 0.0,
    w_max: float = 5.0,
    weights: ArrayLike | None = None,
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """Clipped importance-sampling policy optimization: the weight of a token is clipped, not its gradient.

        Agg[ −sg(clip(r, w_min, w_max)) A logprobs ]

    Agg is one mean over all valid tokens. The bounds are absolute, as in TRL and ScaleRL; where a source has 1 + ε,
    pass that. Unlike `dapo_loss`, where a token beyond the clip range has no say, every token keeps a gradient,
    whatever the sign of A.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        w_min: Lower bound of the weight; 0 is none.
        w_max: Upper bound of the weight.
        weights: As `grpo_loss`; further factors beside the one of the ratio.
        aggregation: As `grpo_loss`.
        normalizer: As `grpo_loss`.
        max_length: As `grpo_loss`.
        segment_ids: As `grpo_loss`.
        group_ids: As `grpo_loss`.
        count_empty: As `grpo_loss`.

    Returns:
        The loss, a float32 scalar, and metrics: `clip_ratio/low_mean`, `clip_ratio/high_mean` and
        `clip_ratio/region_mean` (the tokens whose weight is bounded, whatever the sign of A), `ratio/mean`,
        `ratio/max`, `approx_kl/k1` and `approx_kl/k3`.

    Raises:
        ValueError: As `grpo_loss`, and on bounds in the wrong order.

    Source: MiniMax 2025, "MiniMax-M1" (2506.13585); the bound: Khatri et al. 2025, "ScaleRL" (2510.13786).
    """
    check_positive(w_max=w_max)
    check_bounds(w_min, w_max)
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    ratio = jax.lax.stop_gradient(importance_ratio(rows.logprobs, rows.old_logprobs))
    losses = rows.weigh(-jnp.clip(ratio, w_min, w_max) * rows.advantages * rows.logprobs)
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
    return loss, clip_metrics(ClipIndicators(ratio < w_min, ratio > w_max), rows.mask) | ratio_metrics(rows)


def divergence_mask(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    delta_low: float,
    delta_high: float,
    divergence: BinaryDivergence = "tv",
) -> Array:
    """Marks the tokens that DPPO keeps: those still near the old policy, or on their way back to it.

        p − p_old ≤ delta_high if A > 0,  p − p_old ≥ −delta_low else                               "tv"
        KL ≤ delta_high or p ≤ p_old if A > 0,  KL ≤ delta_low or p ≥ p_old else                    "kl"
        KL = p_old log(p_old / p) + (1 − p_old) log((1 − p_old) / (1 − p))

    Here p is the probability of the sampled token, against all others: the least divergence that the whole
    distributions can have. Unlike `clip_indicators`, which looks at the ratio, it allows a rare token a large ratio
    and a frequent one only a small change.

    Args:
        logprobs: Log-probabilities of the sampled tokens under the policy, `[..., T]`.
        old_logprobs: The same under the policy that sampled.
        advantages: As `clipped_surrogate`; only their sign matters here.
        delta_low: Divergence up to which a token with A ≤ 0 is kept.
        delta_high: Divergence up to which a token with A > 0 is kept.
        divergence: Total variation or Kullback–Leibler.

    Returns:
        Bool `[..., T]`; a constant.

    Raises:
        ValueError: On shapes that do not fit, an unknown divergence, or a bound that is not positive.

    Source: Qi et al. 2026, "Rethinking the trust region in LLM reinforcement learning" (2602.04879).
    """
    check_positive(delta_low=delta_low, delta_high=delta_high)
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    new, old = (jax.lax.stop_gradient(as_float(x)) for x in (logprobs, old_logprobs))
    rising = per_token(new, advantages=advantages) > 0
    change = jnp.exp(new) - jnp.exp(old)
    match divergence:
        case "tv":
            return jnp.where(rising, change <= delta_high, change >= -delta_low)
        case "kl":
            kl = jnp.exp(old) * (old - new) - jnp.expm1(old) * (_log1mexp(old) - _log1mexp(new))
            return jnp.where(rising, (kl <= delta_high) | (change <= 0), (kl <= delta_low) | (change >= 0))
    raise ValueError(f"unknown divergence {divergence!r}: choose one of {', '.join(get_args(BinaryDivergence))}")


def dppo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    delta_low: float,
    delta_high: float,
    divergence: BinaryDivergence = "tv",
    w_max: float = 20.0,
    log_ratio_coef: float = 0.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Divergence PPO: a trust region on the change of a token's probability in place of its ratio.

        Σ [ −sg(min(r, w_max)) A logprobs · keep + log_ratio_coef (log r)² ] / number of valid tokens

    with keep = 1 for the tokens of `divergence_mask`, else 0. The second term, as in prime-rl, draws every token back
    to the policy that sampled, those that are cut off, too; like the mask it does nothing at r = 1. Unlike
    `dapo_loss`, whose clip hits rare tokens most, a token is cut off by how much probability it has gained or lost.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        delta_low: See `divergence_mask` for the three settings of the trust region.
        delta_high: As `delta_low`.
        divergence: As `delta_low`.
        w_max: Upper bound of the ratio's weight.
        log_ratio_coef: Weight of the squared log-ratio, which `weights` do not multiply; prime-rl's is 1e-3, beside
            bounds of 0.2.
        weights: As `grpo_loss`.
        normalizer: As `grpo_loss`.
        segment_ids: As `grpo_loss`; the loss is the same with and without.

    Returns:
        The loss, a float32 scalar, and the metrics of `grpo_loss` but `kl`, where clipped are the tokens that are cut
        off, and `ratio/capped_mean`, the share of tokens that are kept with a weight of w_max.

    Raises:
        ValueError: As `grpo_loss` and `divergence_mask`, and on a coefficient that is negative.

    Source: Qi et al. 2026, "Rethinking the trust region in LLM reinforcement learning" (2602.04879), as in verl; the
    squared log-ratio: prime-rl, "Algorithms".
    """
    check_positive(w_max=w_max)
    check_not_negative(log_ratio_coef=log_ratio_coef)
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    keep = divergence_mask(*rows.inputs, delta_low=delta_low, delta_high=delta_high, divergence=divergence)
    ratio = jax.lax.stop_gradient(importance_ratio(rows.logprobs, rows.old_logprobs))
    losses = rows.weigh(jnp.where(keep, -jnp.minimum(ratio, w_max) * rows.advantages * rows.logprobs, 0.0))
    losses += log_ratio_coef * clamp_log_ratio(rows.log_ratio) ** 2
    cut = ClipIndicators(low=~keep & (rows.advantages < 0), high=~keep & (rows.advantages > 0))
    metrics = clip_metrics(cut, rows.mask) | {"ratio/capped_mean": Mean.of(keep & (ratio > w_max), rows.mask)}
    return aggregate(losses, rows.mask, mode="token-mean", normalizer=normalizer), metrics | ratio_metrics(rows)


def vespo_weights(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    k_pos: float = 2.0,
    lam_pos: float = 3.0,
    k_neg: float = 3.0,
    lam_neg: float = 2.0,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """The weight of a sequence in VESPO, given to each of its tokens: 1 on-policy, fading on either side.

        φ = wᵏ exp(λ (1 − w))        w = Π r over the sequence; k, λ = k_pos, lam_pos if A ≥ 0, else k_neg, lam_neg

    Log-ratios of tokens are clamped to ±20, log w to [log 10⁻⁸, 20]. Unlike `sequence_log_ratio` by default, w is the
    ratio of the whole sequence, without the exponent 1/n; φ keeps it in bounds.

    Args:
        logprobs: As `sequence_log_ratio`.
        old_logprobs: As `sequence_log_ratio`.
        advantages: As `gspo_loss`; only their sign matters here.
        mask: As `sequence_log_ratio`.
        k_pos: Exponent for A ≥ 0: how fast φ falls below w = 1.
        lam_pos: Decay for A ≥ 0: how fast φ falls above w = 1.
        k_neg: Exponent for A < 0.
        lam_neg: Decay for A < 0.
        segment_ids: As `sequence_log_ratio`.

    Returns:
        `[..., T]`, a constant.

    Raises:
        ValueError: On shapes that do not fit, a mask that is not bool, or a setting that is not positive.

    Source: Shen et al. 2026, "VESPO" (2602.10693).
    """
    check_positive(k_pos=k_pos, lam_pos=lam_pos, k_neg=k_neg, lam_neg=lam_neg)
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, segment_ids=segment_ids)
    tokens = jax.lax.stop_gradient(clamp_log_ratio(rows.log_ratio))
    log_w = jnp.clip(segment_total(tokens, rows.mask, segment_ids), LOG_SEQUENCE_WEIGHT_FLOOR, LOG_RATIO_LIMIT)
    rising = rows.advantages >= 0
    k, lam = jnp.where(rising, k_pos, k_neg), jnp.where(rising, lam_pos, lam_neg)
    return jnp.exp(k * log_w - lam * jnp.expm1(log_w))


def vespo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    k_pos: float = 2.0,
    lam_pos: float = 3.0,
    k_neg: float = 3.0,
    lam_neg: float = 2.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Variational sequence-level soft policy optimization: a smooth weight made of the whole sequence's ratio.

        Σ −sg(φ(w)) A logprobs / number of valid tokens        φ = wᵏ exp(λ (1 − w)),  w = Π r over the sequence

    Tokens of an older policy, or of a sampler that differs from the learner, may be far off: pass the log-probs of
    whatever sampled them as `old_logprobs`, and no other correction. (TRL multiplies w by importance weights ρ of the
    sampler: that is `old_logprobs − log ρ`.) Unlike `gspo_loss`, nothing is cut off, and the weight falls to 0
    for sequences that have become much more likely, too.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `gspo_loss`.
        mask: As `grpo_loss`.
        k_pos: See `vespo_weights` for the four settings of the weight.
        lam_pos: As `k_pos`.
        k_neg: As `k_pos`.
        lam_neg: As `k_pos`.
        weights: As `grpo_loss`; further factors beside φ.
        normalizer: As `grpo_loss`.
        segment_ids: As `grpo_loss`.

    Returns:
        The loss, a float32 scalar, and metrics: `vespo/phi_seq_mean` over sequences, and `ratio/mean`, `ratio/max`,
        `approx_kl/k1` and `approx_kl/k3` over tokens.

    Raises:
        ValueError: As `grpo_loss` and `vespo_weights`.

    Source: Shen et al. 2026, "VESPO" (2602.10693).
    """
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    settings = {"k_pos": k_pos, "lam_pos": lam_pos, "k_neg": k_neg, "lam_neg": lam_neg}
    phi = vespo_weights(*rows.inputs, rows.mask, **settings, segment_ids=segment_ids)
    losses = rows.weigh(-phi * rows.advantages * rows.logprobs)
    metrics = {"vespo/phi_seq_mean": Mean.of(phi, segment_first(rows.mask, segment_ids))}
    return aggregate(losses, rows.mask, mode="token-mean", normalizer=normalizer), metrics | ratio_metrics(rows)


def _log1mexp(x: Array) -> Array:
    """log(1 − exp(x)) of x < 0, the larger of the two forms' accuracies; x ≥ −10⁻⁷ counts as −10⁻⁷."""
    x = jnp.minimum(x, -1e-7)
    return jnp.where(x > -math.log(2), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))
