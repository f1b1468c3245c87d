"""What the environment answered as a target beside what the policy did: ECHO."""

from __future__ import annotations

from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import check_not_negative
from jaxrl_llm.losses.aggregate import AggregationMode
from jaxrl_llm.losses.supervised import sft_loss
from jaxrl_llm.records import Metrics


def echo_loss(
    logprobs: ArrayLike,
    observations: ArrayLike,
    *,
    coef: ArrayLike = 0.1,
    aggregation: AggregationMode = "seq-mean-token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """The cross-entropy of what tools and terminals answered, to be added to any policy loss of what was said.

        coef · Agg[ −logprobs ]        over the tokens of observations

    The policy learns what follows from its own actions, from failures, too, of log-probs that its forward pass makes
    anyway. Observations are no part of the policy loss, nor of its denominator. Unlike `sft_loss`, which it weighs, its
    targets are not what the policy is to say.

    Args:
        logprobs: Log-probabilities of the tokens of whole conversations under the policy, `[..., T]`.
        observations: Bool `[..., T]`, True on the tokens of answers that the environment gave to the policy's actions:
            not the prompt, nor what the chat template writes around an answer.
        coef: Weight of the term.
        aggregation: By default each conversation counts alike, however long its answers are; see
            `jaxrl_llm.losses.aggregate`, also for the arguments that follow.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        max_length: Constant of the aggregation "seq-mean-token-sum-norm".
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.
        group_ids: Labels `[...]` of the rows, for the group modes.
        count_empty: Whether sequences without a valid token count.

    Returns:
        The loss, a float32 scalar, and the metric `echo/nll`, the mean of −logprobs per token of an answer.

    Raises:
        ValueError: On shapes that do not fit, a mask that is not bool, or a coefficient that is negative.

    Source: Shrivastava et al. 2026, "ECHO: terminal agents learn world models for free" (2605.24517); the weight: as in
    prime-rl.
    """
    check_not_negative(coef=coef if isinstance(coef, int | float) else None)
    loss, metrics = sft_loss(
        logprobs,
        observations,
        aggregation=aggregation,
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )
    return loss * coef, {"echo/nll": metrics["nll"]}
