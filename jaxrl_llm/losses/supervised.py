"""Supervised losses: the negative log-likelihood of given tokens."""

from __future__ import annotations

from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.masking import Mean, Metrics, as_float, check_mask


def sft_loss(
    logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Negative log-likelihood of the tokens that `mask` marks.

        Agg[ −logprobs ]        by default one mean over all tokens of the batch

    Args:
        logprobs: Log-probabilities of the target tokens under the policy, `[..., T]`.
        mask: Bool `[..., T]`, True on the tokens that are trained: those of the completion, the end-of-sequence
            token included, for training on completions only.
        aggregation: See `jaxrl_llm.losses.aggregate`, also for the arguments that follow.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.

    Returns:
        The loss, a float32 scalar, and the metric `nll`, the mean per token.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.
    """
    mask = check_mask(mask, logprobs=logprobs)
    losses = -as_float(logprobs)
    loss = aggregate(losses, mask, mode=aggregation, normalizer=normalizer, segment_ids=segment_ids)
    return loss, {"nll": Mean.of(losses, mask)}
