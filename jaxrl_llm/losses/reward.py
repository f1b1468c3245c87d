"""Reward models that score whole answers and learn from comparisons of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.aggregate import aggregate
from jaxrl_llm.masking import (
    as_float,
    check_mask,
    check_same_shape,
    fill_masked,
    mask_or_all,
    masked_sum,
    safe_divide,
    segment_last,
)
from jaxrl_llm.records import Mean, Metrics, Moments


def last_token_score(values: ArrayLike, mask: ArrayLike) -> Array:
    """The score of a sequence: what the reward head says at its last valid token.

        s = valuesₙ₋₁

    The place is found from the mask, hence from lengths, and not by looking for padding ids, which may also be
    those of the end of a sequence. Unlike `value_loss`, which reads its head at every token, a reward model's is
    read at this one alone.

    Args:
        values: Output of the scalar head, `[..., T]`.
        mask: Bool `[..., T]`, True on the tokens of the sequence; `length_mask(lengths, T)` makes it from lengths.

    Returns:
        `[...]`, float32; 0 for a row without a valid token.

    Source: Ouyang et al. 2022, "InstructGPT" (2203.02155).
    """
    mask = check_mask(mask, values=values)
    return masked_sum(values, segment_last(mask), -1)


def bt_prob(scores: ArrayLike, other_scores: ArrayLike) -> Array:
    """The probability that one answer is preferred to another, in the model of Bradley and Terry.

        P(y ≻ y′) = σ(s(y) − s(y′))

    Unlike `bradley_terry_loss`, which is the mean of −log of it over labelled pairs, it needs no label. It can be
    compared between models; scores cannot, as they are free up to a constant.

    Args:
        scores: s(y), any shape.
        other_scores: s(y′), the same shape.

    Returns:
        The same shape, in [0, 1].

    Source: Bradley & Terry 1952.
    """
    check_same_shape(scores=scores, other_scores=other_scores)
    return jax.nn.sigmoid(as_float(scores) - as_float(other_scores))


def bradley_terry_loss(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    *,
    margin: ArrayLike | None = None,
    center_coef: float = 0.0,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """The loss of a reward model on pairs of answers.

        mean[ softplus(−(s_chosen − s_rejected − margin)) + center_coef · (s_chosen + s_rejected)² ]

    The first term leaves a constant free that may differ from prompt to prompt; the second one centres the scores
    at 0, and 0.01 is a usual weight of it. Unlike `dpo_loss`, which has the same form with log-ratios of a policy
    as scores, it trains a scalar head.

    Args:
        chosen_scores: Scores of the preferred answers, `[...]`, as `last_token_score` gives them.
        rejected_scores: Scores of the others, `[...]`.
        margin: By how much the scores of a pair shall differ at least, `[...]` or a number; a constant. None: 0.
        center_coef: Weight of the centring.
        mask: Bool `[...]`, False for pairs that do not count.
        normalizer: Number of valid pairs in the whole batch, if these are a part of it.

    Returns:
        The loss, a float32 scalar, and metrics over the valid pairs: `accuracy` (chosen above rejected), `margin`
        (their difference), and over both sides `score/mean` and `score/std`, the last a `Moments` record.

    Raises:
        ValueError: On unequal shapes, a mask that is not bool or a negative weight.

    Source: Ouyang et al. 2022, "InstructGPT" (2203.02155); margin: Touvron et al. 2023, "Llama 2" (2307.09288);
        centring: Eisenstein et al. 2023 (2312.09244).
    """
    check_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    if isinstance(center_coef, int | float) and not center_coef >= 0:
        raise ValueError(f"center_coef is {center_coef}: it must not be negative")
    mask = mask_or_all(mask, chosen_scores=chosen_scores)
    chosen, rejected = fill_masked(chosen_scores, mask), fill_masked(rejected_scores, mask)
    gap = chosen - rejected
    losses = jax.nn.softplus(_margins(margin, mask) - gap)
    losses = losses + center_coef * (chosen + rejected) ** 2
    loss = aggregate(losses, mask, mode="token-mean", normalizer=normalizer)

    scores, both = jax.lax.stop_gradient(jnp.stack([chosen, rejected])), jnp.stack([mask, mask])
    metrics: Metrics = {
        "accuracy": Mean.of(gap > 0, mask),
        "margin": Mean.of(jax.lax.stop_gradient(gap), mask),
        "score/mean": Mean.of(scores, both),
        "score/std": Moments.of(scores, both),
    }
    return loss, metrics


def ranking_loss(
    scores: ArrayLike,
    ranks: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """The loss of a reward model on K ranked answers to each prompt.

        mean over prompts of  Σ softplus(−(sᵢ − sⱼ)) / pairs        over the pairs with rankᵢ < rankⱼ

    All pairs of a prompt are in one batch and share its forward pass; as separate examples they would overfit,
    each answer being seen K − 1 times. Unlike `bradley_terry_loss`, its case of K = 2, it weighs prompts and not
    pairs alike. Ties (equal ranks) are no pairs.

    Args:
        scores: `[..., K]`, the answers of a prompt along the last axis.
        ranks: `[..., K]`, lower is better; any ordered numbers.
        mask: Bool `[..., K]`, False where a prompt has fewer answers.
        normalizer: Number of prompts with at least one pair in the whole batch, if these are a part of it.

    Returns:
        The loss, a float32 scalar, and metrics: `accuracy` and `margin` over all pairs, `score/mean` and `score/std`
        over the valid answers.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Ouyang et al. 2022, "InstructGPT" (2203.02155).
    """
    check_same_shape(scores=scores, ranks=ranks)
    mask = mask_or_all(mask, scores=scores)
    scores, ranks = fill_masked(scores, mask), fill_masked(ranks, mask)
    pairs = mask[..., :, None] & mask[..., None, :] & (ranks[..., :, None] < ranks[..., None, :])
    gap = scores[..., :, None] - scores[..., None, :]
    per_prompt = safe_divide(masked_sum(jax.nn.softplus(-gap), pairs, (-2, -1)), jnp.sum(pairs, (-2, -1)))
    loss = aggregate(per_prompt, jnp.any(pairs, (-2, -1)), mode="token-mean", normalizer=normalizer)

    scores, gap = jax.lax.stop_gradient((scores, gap))
    metrics: Metrics = {
        "accuracy": Mean.of(gap > 0, pairs),
        "margin": Mean.of(gap, pairs),
        "score/mean": Mean.of(scores, mask),
        "score/std": Moments.of(scores, mask),
    }
    return loss, metrics


def normalize_scores(scores: ArrayLike, statistics: Moments, *, clip: float | None = None, eps: float = 1e-8) -> Array:
    """Scores of a reward model in units of their spread on a reference set.

        clip((s − mean) / (std + eps), −clip, clip)

    Unlike `whiten`, which takes the statistics of the batch at hand, it maps equal scores to equal rewards in every
    batch; gather the statistics with `Moments.of(scores)` and `Moments.merge` once the model is trained.

    Args:
        scores: Any shape.
        statistics: `Moments` of the scores on a reference set; a constant.
        clip: Bound on the result. None: no bound.
        eps: Added to the standard deviation.

    Returns:
        The shape of `scores`.

    Raises:
        ValueError: If `clip` is not positive.

    Source: Ziegler et al. 2019 (1909.08593).
    """
    if isinstance(clip, int | float) and not clip > 0:
        raise ValueError(f"clip is {clip}: it must be positive, or None for no bound")
    mean, std = jax.lax.stop_gradient((statistics.mean, statistics.value()))
    scaled = (as_float(scores) - mean) / (std + eps)
    return scaled if clip is None else jnp.clip(scaled, -clip, clip)


def _margins(margin: ArrayLike | None, mask: Array) -> Array:
    """One margin for each pair, a constant; 0 without one."""
    margins = as_float(0.0 if margin is None else margin)
    if margins.ndim > 0:
        check_same_shape(mask=mask, margin=margins)
    return jax.lax.stop_gradient(fill_masked(jnp.broadcast_to(margins, mask.shape), mask))
