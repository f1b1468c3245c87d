"""Supervised losses: the negative log-likelihood of given tokens, plain, smoothed or weighted by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.masking import check_mask, fill_masked
from jaxrl_llm.records import Mean, Metrics


def sft_loss(
    logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    mean_logprobs: ArrayLike | None = None,
    z_loss_coef: float = 0.0,
    log_normalizers: ArrayLike | None = None,
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """Negative log-likelihood of the tokens that `mask` marks.

        Agg[ −(1 − label_smoothing) logprobs − label_smoothing mean_logprobs + z_loss_coef log_normalizers² ]

    By default that is one mean of −logprobs over all tokens of the batch. Label smoothing mixes the target with the
    uniform distribution over the vocabulary; the z-loss keeps the softmax normalizer near 1, so that logits do
    not drift in low precision. Unlike `dft_loss`, every token weighs the same, so that unlikely tokens have the
    largest gradients.

    Args:
        logprobs: Log-probabilities of the target tokens under the policy, `[..., T]`.
        mask: Bool `[..., T]`, True on the tokens that are trained: those of the completion, the end-of-sequence
            token included, for training on completions only.
        label_smoothing: Weight of the uniform distribution, in [0, 1).
        mean_logprobs: Σᵥ log p(v) / V over the vocabulary at each position, `[..., T]`. Needed for label smoothing.
        z_loss_coef: Weight of the z-loss; 1e-4 in PaLM.
        log_normalizers: log Σᵥ exp(zᵥ) of the logits z at each position, `[..., T]`. Needed for the z-loss.
        aggregation: See `jaxrl_llm.losses.aggregate`, also for the arguments that follow.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        max_length: Constant of the aggregation "seq-mean-token-sum-norm".
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.
        group_ids: Labels `[...]` of the rows, for the group modes.
        count_empty: Whether sequences without a valid token count.

    Returns:
        The loss, a float32 scalar, and the metric `nll`, the mean of −logprobs per token; with the extras also
        `smoothed_nll` (of −mean_logprobs) and `z_loss` (of log_normalizers², without the weight).

    Raises:
        ValueError: On shapes that do not fit, a mask that is not bool, or an extra without its array.

    Source: label smoothing: Szegedy et al. 2015 (1512.00567); z-loss: Chowdhery et al. 2022, "PaLM" (2204.02311).
    """
    mask = check_mask(mask, logprobs=logprobs, mean_logprobs=mean_logprobs, log_normalizers=log_normalizers)
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be in [0, 1)")
    if mean_logprobs is None and _is_used(label_smoothing):
        raise ValueError(f"label_smoothing is {label_smoothing}, but there are no mean_logprobs: pass them")
    if log_normalizers is None and _is_used(z_loss_coef):
        raise ValueError(f"z_loss_coef is {z_loss_coef}, but there are no log_normalizers: pass them")
    losses = nll = -fill_masked(logprobs, mask)
    metrics: Metrics = {"nll": Mean.of(jax.lax.stop_gradient(nll), mask)}
    if mean_logprobs is not None and _is_used(label_smoothing):
        smoothed = -fill_masked(mean_logprobs, mask)
        losses = (1 - label_smoothing) * nll + label_smoothing * smoothed
        metrics["smoothed_nll"] = Mean.of(jax.lax.stop_gradient(smoothed), mask)
    if log_normalizers is not None and _is_used(z_loss_coef):
        z_loss = fill_masked(log_normalizers, mask) ** 2
        losses = losses + z_loss_coef * z_loss
        metrics["z_loss"] = Mean.of(jax.lax.stop_gradient(z_loss), mask)
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


def dft_loss(
    logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """Dynamic fine-tuning: the negative log-likelihood of a token, weighted with its own probability.

        Agg[ −sg(exp(logprobs)) logprobs ]

    As a policy gradient, the gradient of `sft_loss` rewards a token with 1/p, which is largest where the policy
    knows least; the weight removes that. Unlike `sft_loss` it therefore hardly moves tokens that the policy deems
    impossible, for good (noise) and bad (new knowledge).

    Args:
        logprobs: As `sft_loss`.
        mask: As `sft_loss`.
        aggregation: See `jaxrl_llm.losses.aggregate`, also for the arguments that follow.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        max_length: Constant of the aggregation "seq-mean-token-sum-norm".
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.
        group_ids: Labels `[...]` of the rows, for the group modes.
        count_empty: Whether sequences without a valid token count.

    Returns:
        The loss, a float32 scalar, and metrics over the valid tokens: `nll`, the mean of −logprobs, and
        `token_prob/mean`, the mean weight.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: Wu et al. 2025, "On the generalization of SFT" (2508.05629).
    """
    mask = check_mask(mask, logprobs=logprobs)
    logprobs = fill_masked(logprobs, mask)
    probability = jax.lax.stop_gradient(jnp.exp(logprobs))
    losses = -probability * jnp.where(probability > 0, logprobs, 0.0)  # 0 · −∞ is 0
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
    nll = jax.lax.stop_gradient(-logprobs)
    return loss, {"nll": Mean.of(nll, mask), "token_prob/mean": Mean.of(probability, mask)}


def _is_used(weight: ArrayLike) -> bool:
    """Whether an extra term is wanted; a traced weight cannot be looked at, and counts as one that is not 0."""
    return not (isinstance(weight, int | float) and weight == 0)
