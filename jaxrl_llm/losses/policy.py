"""Clipped policy-gradient losses: the surrogate of PPO, and GRPO, Dr. GRPO and DAPO on top of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.losses.kl import KLEstimator, kl_k3, kl_penalty
from jaxrl_llm.losses.ratio import clip_indicators, clip_range, importance_ratio, per_token_advantages
from jaxrl_llm.masking import Max, Mean, Metrics, check_mask, fill_masked


def clipped_surrogate(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> Array:
    """The per-token loss of PPO.

        max(−A min(r, ratio_cap), −A clip(r, 1 − clip_low, 1 + clip_high))    ≤ −A · dual_clip if A < 0

    A token's gradient is −A r ∇logprobs, or 0 once its ratio has left the clip range in the direction
    that A asks for.

    Args:
        logprobs: Log-probabilities under the policy, `[..., T]`.
        old_logprobs: The same under the policy that sampled; a constant. None: the policy itself.
        advantages: `[..., T]`, or `[...]` with one for each sequence; a constant.
        clip_low: Distance of the lower bound from 1. None: no lower bound.
        clip_high: Distance of the upper bound from 1. None: no upper bound (both None: −A r).
        dual_clip: Bound, above 1, on the loss of tokens with A < 0, in units of −A. None: no bound.
        ratio_cap: Cap, above 1 + clip_high, on the unclipped ratio ("two-sided clipping", TRL's
            `delta`); for A < 0 it does the same as `dual_clip`. None: no cap.

    Returns:
        `[..., T]`; not masked. Where padding may be not finite, apply `fill_masked` to the inputs first.

    Raises:
        ValueError: On shapes that do not fit or bounds that make no sense.

    Sources: Schulman et al. 2017 (1707.06347). Asymmetric bounds: Yu et al. 2025 (2503.14476). Dual
    clip: Ye et al. 2020 (1912.09729). Two-sided: INTELLECT-2, 2025 (2505.07291).
    """
    _check_bounds(clip_low, clip_high, dual_clip, ratio_cap)
    ratio = importance_ratio(logprobs, old_logprobs)
    advantages = jax.lax.stop_gradient(per_token_advantages(advantages, ratio))
    losses = -advantages * (ratio if ratio_cap is None else jnp.minimum(ratio, ratio_cap))
    if clip_low is not None or clip_high is not None:
        losses = jnp.maximum(losses, -advantages * jnp.clip(ratio, *clip_range(clip_low, clip_high)))
    if dual_clip is not None:
        losses = jnp.where(advantages < 0, jnp.minimum(losses, -advantages * dual_clip), losses)
    return losses


def grpo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    ref_logprobs: ArrayLike | None = None,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    kl_coef: ArrayLike = 0.04,
    kl_estimator: KLEstimator = "k3",
    kl_clip: float | None = None,
    aggregation: AggregationMode = "seq-mean-token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """Group relative policy optimization, with the paper's defaults.

        Agg[ max(−A r, −A clip(r, 1 − clip_low, 1 + clip_high)) + kl_coef · k3(logprobs, ref_logprobs) ]

    where Agg is the mean over sequences of the mean over their tokens, and A comes from
    `jaxrl_llm.advantages.group_advantages`.

    Args:
        logprobs: Log-probabilities of the completions' tokens under the policy, `[..., T]`; nothing else
            is differentiated.
        old_logprobs: The same under the policy that sampled, `[..., T]`. None: the policy itself (one
            update per batch of samples), so that every ratio is 1.
        advantages: `[..., T]`, or `[...]` with one for each sequence (not with `segment_ids`).
        mask: Bool `[..., T]`, True on the tokens that are trained; whatever is elsewhere is ignored.
        ref_logprobs: The same under the reference, `[..., T]`. Needed unless `kl_coef` is 0.
        clip_low: See `clipped_surrogate` for the four bounds.
        clip_high: As `clip_low`.
        dual_clip: As `clip_low`.
        ratio_cap: As `clip_low`.
        kl_coef: Weight of the KL term, which is neither clipped nor multiplied by the advantage.
        kl_estimator: See `jaxrl_llm.losses.kl`: "k3" is the paper's, "k3+" has the true KL's gradient.
        kl_clip: Bound on the KL term of a token. None: no bound.
        aggregation: See `jaxrl_llm.losses.aggregate`, also for the arguments that follow.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        max_length: Constant of the aggregation "seq-mean-token-sum-norm".
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.
        group_ids: Labels `[...]` of the rows, for the group modes.
        count_empty: Whether sequences without a valid token count.

    Returns:
        The loss, a float32 scalar, and metrics over the valid tokens: `clip_ratio/low_mean`,
        `clip_ratio/high_mean`, `clip_ratio/region_mean` (`ClipIndicators`), `ratio/mean`, `ratio/max`,
        `approx_kl` (k3 between the old policy and this one) and, with a reference, `kl` (the estimator's
        value). All are `Mean` records, a sum with its count, but `ratio/max`, a `Max`.

    Raises:
        ValueError: On shapes that do not fit, a mask that is not bool, or a KL term without a reference.

    Source: Shao et al. 2024, "DeepSeekMath" (2402.03300).
    """
    mask = check_mask(mask, logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    use_kl = _uses_kl(kl_coef, ref_logprobs)
    _check_packed_advantages(advantages, mask, segment_ids)
    logprobs = fill_masked(logprobs, mask)
    old = None if old_logprobs is None else fill_masked(old_logprobs, mask)
    advantages = fill_masked(per_token_advantages(advantages, logprobs), mask)
    bounds = {"clip_low": clip_low, "clip_high": clip_high}

    losses = clipped_surrogate(logprobs, old, advantages, **bounds, dual_clip=dual_clip, ratio_cap=ratio_cap)
    metrics = _ratio_metrics(logprobs, old, advantages, mask, **bounds)
    if ref_logprobs is not None:
        ref = fill_masked(ref_logprobs, mask)
        kl = kl_penalty(logprobs, ref, estimator=kl_estimator, old_logprobs=old, clip=kl_clip)
        metrics["kl"] = Mean.of(jax.lax.stop_gradient(kl), mask)
        losses = losses + kl_coef * kl if use_kl else losses
    loss = aggregate(
        losses,
        mask,
        mode=aggregation,
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )
    return loss, metrics


def dr_grpo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    max_length: float,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """GRPO without its biases: no division by a sequence's own length or by its group's deviation; no KL.

        mean over sequences of  Σₜ max(−A r, −A clip(r, 1 − clip_low, 1 + clip_high)) / max_length

    with A = R − mean, from `group_advantages(scale="none")`. `max_length`, the configured maximum length
    of a completion, is the constant of the authors' code: it must not vary between batches, and it
    scales the learning rate. The sum as the paper prints it is
    `grpo_loss(aggregation="seq-mean-token-sum", kl_coef=0)`. All other arguments, the results and the
    errors are those of `grpo_loss`.

    Source: Liu et al. 2025, "Understanding R1-Zero-like training" (2503.20783).
    """
    return grpo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coef=0,
        aggregation="seq-mean-token-sum-norm",
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        count_empty=count_empty,
    )


def dapo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.28,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """The loss of DAPO: GRPO with a higher upper bound, one mean over all tokens of the batch, and no KL.

        Σ max(−A r, −A clip(r, 1 − clip_low, 1 + clip_high)) / number of valid tokens

    Arguments, results and errors are those of `grpo_loss`. DAPO's other parts, dynamic sampling and the
    overlong penalty, act on groups and rewards, before the loss.

    Source: Yu et al. 2025 (2503.14476).
    """
    return grpo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coef=0,
        aggregation="token-mean",
        normalizer=normalizer,
    )


def _ratio_metrics(
    logprobs: Array,
    old_logprobs: Array | None,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float | None,
    clip_high: float | None,
) -> Metrics:
    logprobs = jax.lax.stop_gradient(logprobs)
    old_logprobs = logprobs if old_logprobs is None else old_logprobs
    ratio = importance_ratio(logprobs, old_logprobs)
    clipped = clip_indicators(logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high)
    return {
        "clip_ratio/low_mean": Mean.of(clipped.low, mask),
        "clip_ratio/high_mean": Mean.of(clipped.high, mask),
        "clip_ratio/region_mean": Mean.of(clipped.region, mask),
        "ratio/mean": Mean.of(ratio, mask),
        "ratio/max": Max.of(ratio, mask),
        "approx_kl": Mean.of(kl_k3(old_logprobs, logprobs), mask),
    }


def _uses_kl(kl_coef: ArrayLike, ref_logprobs: ArrayLike | None) -> bool:
    """Whether the loss has a KL term; a traced coefficient (a schedule) cannot be looked at, and counts as one."""
    uses = not (isinstance(kl_coef, int | float) and kl_coef == 0)
    if uses and ref_logprobs is None:
        raise ValueError(f"kl_coef is {kl_coef}, but there are no ref_logprobs: pass them, or kl_coef=0")
    return uses


def _check_packed_advantages(advantages: ArrayLike, mask: Array, segment_ids: ArrayLike | None) -> None:
    if segment_ids is not None and np.shape(advantages) != mask.shape:
        raise ValueError(
            f"advantages has shape {np.shape(advantages)}, but mask has shape {mask.shape}: with segment_ids "
            "a row holds several sequences, so pass one advantage for each token"
        )


def _check_bounds(
    clip_low: float | None, clip_high: float | None, dual_clip: float | None, ratio_cap: float | None
) -> None:
    """Checks the bounds that are plain numbers; traced ones (a schedule) cannot be looked at."""
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if isinstance(bound, int | float) and bound < 0:
            raise ValueError(f"{name} is {bound}: it is a distance from 1 and must not be negative")
    if isinstance(dual_clip, int | float) and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}: it must be above 1, or it cuts the gradient at ratio 1")
    if ratio_cap is not None and clip_high is None:
        raise ValueError(f"ratio_cap is {ratio_cap}, but clip_high is None: a cap is for ratios beyond the range")
    highest = 1 + clip_high if isinstance(clip_high, int | float) else 0
    if isinstance(ratio_cap, int | float) and ratio_cap <= highest:
        raise ValueError(f"ratio_cap is {ratio_cap}: it must be above 1 + clip_high = {highest}")
