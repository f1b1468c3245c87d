"""Losses with PPO's clip on the ratio of each token: PPO, GRPO, Dr. GRPO and DAPO."""

from __future__ import annotations

import jax
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import clip_metrics, policy_rows, ratio_metrics
from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.kl import KLEstimator, kl_penalty
from jaxrl_llm.losses.ratio import clip_indicators, clipped_surrogate
from jaxrl_llm.masking import check_mask, fill_masked
from jaxrl_llm.records import Mean, Metrics


def ppo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    weights: ArrayLike | None = None,
    entropy: ArrayLike | None = None,
    entropy_coef: ArrayLike = 0.0,
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """Proximal policy optimization: the policy's part of the loss.

        Agg[ max(−A r, −A clip(r, 1 − clip_low, 1 + clip_high)) ] − entropy_coef · Agg[ H ]

    Agg is one mean over all valid tokens, and A comes from generalized advantage estimation with a critic, whose own
    loss is to be added. `clip_low=None, clip_high=None` leaves −A r, the form without a clip. Unlike `grpo_loss`, it
    has no KL term, since PPO penalizes the KL in the reward.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        clip_low: See `clipped_surrogate` for the four bounds.
        clip_high: As `clip_low`.
        dual_clip: As `clip_low`; verl's default is 3.
        ratio_cap: As `clip_low`.
        weights: As `grpo_loss`.
        entropy: Entropy of the policy at each token in nats, `[..., T]`, differentiated. None: no bonus.
        entropy_coef: Weight of the entropy bonus.
        aggregation: As `grpo_loss`.
        normalizer: As `grpo_loss`.
        max_length: As `grpo_loss`.
        segment_ids: As `grpo_loss`.
        group_ids: As `grpo_loss`.
        count_empty: As `grpo_loss`.

    Returns:
        As `grpo_loss`, and the metric `entropy` if there is one.

    Raises:
        ValueError: As `grpo_loss`, and on an entropy bonus without entropies.

    Source: Schulman et al. 2017, "Proximal policy optimization algorithms" (1707.06347).
    """
    reduction = {
        "aggregation": aggregation,
        "normalizer": normalizer,
        "max_length": max_length,
        "segment_ids": segment_ids,
        "group_ids": group_ids,
        "count_empty": count_empty,
    }
    loss, metrics = grpo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio_cap=ratio_cap,
        kl_coef=0,
        weights=weights,
        **reduction,
    )
    _check_present("entropy_coef", entropy_coef, "entropy", entropy)
    if entropy is not None:
        bonus, entropy_metrics = entropy_bonus(entropy, mask, entropy_coef=entropy_coef, **reduction)
        loss, metrics = loss + bonus, metrics | entropy_metrics
    return loss, metrics


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
    weights: ArrayLike | None = None,
    aggregation: AggregationMode = "seq-mean-token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """Group relative policy optimization, with the paper's defaults.

        Agg[ max(−A r, −A clip(r, 1 − clip_low, 1 + clip_high)) + kl_coef · k3(logprobs, ref_logprobs) ]

    Agg is the mean over sequences of the mean over their tokens, and A comes from `group_advantages`. Unlike
    `ppo_loss`, it needs no critic, its KL term is in the loss and each sequence counts the same, however long.

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
        kl_estimator: See `kl_penalty`: "k3" is the paper's, "k3+" has the true KL's gradient.
        kl_clip: Bound on the KL term of a token. None: no bound.
        weights: Constant factors on the policy term, not on the KL, `[..., T]` or `[...]`: a correction such as
            `tis_weights`, or a mask such as `top_entropy_mask`. Tokens of weight 0 still count in denominators.
        aggregation: See `aggregate`, also for the arguments that follow.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        max_length: Constant of the aggregation "seq-mean-token-sum-norm".
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.
        group_ids: Labels `[...]` of the rows, for the group modes.
        count_empty: Whether sequences without a valid token count.

    Returns:
        The loss, a float32 scalar, and metrics over the valid tokens: `clip_ratio/low_mean`,
        `clip_ratio/high_mean`, `clip_ratio/region_mean` (`ClipIndicators`; with the options, `clip_ratio/dual_mean`
        and `clip_ratio/cap_mean`), `ratio/mean`, `ratio/max`, `approx_kl/k1` and `approx_kl/k3` (estimates of the KL
        of the old policy from this one) and, with a reference, `kl` (the estimator's value). All are `Mean` records, a
        sum with its count, but `ratio/max`, a `Max`.

    Raises:
        ValueError: On shapes that do not fit, a mask that is not bool, or a KL term without a reference.

    Source: Shao et al. 2024, "DeepSeekMath" (2402.03300).
    """
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    bounds = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "ratio_cap": ratio_cap}
    losses = rows.weigh(clipped_surrogate(*rows.inputs, **bounds))
    metrics = clip_metrics(clip_indicators(*rows.inputs, **bounds), rows.mask) | ratio_metrics(rows)
    _check_present("kl_coef", kl_coef, "ref_logprobs", ref_logprobs)
    if ref_logprobs is not None:
        ref = fill_masked(ref_logprobs, check_mask(rows.mask, ref_logprobs=ref_logprobs))
        kl = kl_penalty(rows.logprobs, ref, estimator=kl_estimator, old_logprobs=rows.old_logprobs, clip=kl_clip)
        metrics["kl"] = Mean.of(jax.lax.stop_gradient(kl), rows.mask)
        losses = losses if _is_zero(kl_coef) else losses + kl_coef * kl
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


def dr_grpo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    max_length: float,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """GRPO without its biases: no division by a sequence's own length or by its group's deviation; no KL.

        mean over sequences of  Σₜ max(−A r, −A clip(r, 1 − clip_low, 1 + clip_high)) / max_length

    Here A = R − mean, from `group_advantages(scale="none")`. The sum as the paper prints it, without a constant, is
    `grpo_loss(aggregation="seq-mean-token-sum", kl_coef=0)`. Unlike `dapo_loss`, which divides by the number of
    tokens that a batch happens to have, the divisor is the same for all batches.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        max_length: The configured maximum length of a completion, the constant of the authors' code. It must not
            vary between batches, and it scales the learning rate.
        clip_low: As `grpo_loss`.
        clip_high: As `grpo_loss`.
        weights: As `grpo_loss`.
        normalizer: As `grpo_loss`.
        segment_ids: As `grpo_loss`.
        count_empty: As `grpo_loss`.

    Returns:
        As `grpo_loss`.

    Raises:
        ValueError: As `grpo_loss`.

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
        weights=weights,
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
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """The loss of DAPO: GRPO with a higher upper bound, one mean over all tokens of the batch, and no KL.

        Σ max(−A r, −A clip(r, 1 − clip_low, 1 + clip_high)) / number of valid tokens

    The higher bound leaves rare tokens room to grow. DAPO's other parts, dynamic sampling and the overlong penalty,
    act on groups and rewards, before the loss. Unlike `grpo_loss`, it gives a long sequence more weight.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        clip_low: As `grpo_loss`.
        clip_high: As `grpo_loss`.
        weights: As `grpo_loss`.
        normalizer: As `grpo_loss`.
        segment_ids: As `grpo_loss`; the loss is the same with and without.

    Returns:
        As `grpo_loss`.

    Raises:
        ValueError: As `grpo_loss`.

    Source: Yu et al. 2025, "DAPO" (2503.14476).
    """
    return grpo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coef=0,
        weights=weights,
        aggregation="token-mean",
        normalizer=normalizer,
        segment_ids=segment_ids,
    )


def _check_present(coefficient: str, value: ArrayLike, needed: str, array: ArrayLike | None) -> None:
    """Raises ValueError if a term has a weight and lacks the array it is made of."""
    if array is None and not _is_zero(value):
        raise ValueError(f"{coefficient} is {value}, but there are no {needed}: pass them, or {coefficient}=0")


def _is_zero(coefficient: ArrayLike) -> bool:
    """Whether there is no term; a traced coefficient (a schedule) cannot be looked at, and counts as one."""
    return isinstance(coefficient, int | float) and coefficient == 0
