"""The KL divergence from a reference as a loss of its own, to be added to any policy loss."""

from __future__ import annotations

import jax
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.losses.kl import KLEstimator, kl_penalty
from jaxrl_llm.masking import check_mask, fill_masked
from jaxrl_llm.records import Mean, Metrics


def kl_loss(
    logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    kl_coef: ArrayLike,
    aggregation: AggregationMode,
    kl_estimator: KLEstimator = "k3",
    kl_clip: float | None = None,
    old_logprobs: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """The KL penalty that keeps a policy near a reference, as a loss to be added to any policy loss.

        kl_coef · Agg[ KL(logprobs, ref_logprobs) ]

    Only `grpo_loss` has the term built in, since its paper does; add this one to the others, with their aggregation
    and normalizer. Unlike `kl_penalty`, which is unreduced and may go into the reward, it is a scalar with a gradient.

    Args:
        logprobs: Log-probabilities of the sampled tokens under the policy, `[..., T]`.
        ref_logprobs: The same under the reference; a constant.
        mask: Bool `[..., T]`, True on the tokens that are trained.
        kl_coef: Weight of the term.
        aggregation: As the policy loss it is added to; see `aggregate`, also for the arguments not described here.
        kl_estimator: See `kl_penalty`: "k3" is GRPO's, "k2" and "k3+" have the gradient of the true KL.
        kl_clip: Bound on the KL of a token. None: no bound.
        old_logprobs: Log-probabilities under the policy that sampled, for "k3-ratio". None: the policy itself.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        max_length: Constant of the aggregation "seq-mean-token-sum-norm".
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.
        group_ids: Labels `[...]` of the rows, for the group modes.
        count_empty: Whether sequences without a valid token count.

    Returns:
        The loss, a float32 scalar, and the metric `kl`, the estimator's mean over the valid tokens.

    Raises:
        ValueError: On shapes that do not fit, a mask that is not bool, or an unknown option.

    Source: Shao et al. 2024, "DeepSeekMath" (2402.03300); J. Schulman, "Approximating KL divergence" (2020).
    """
    mask = check_mask(mask, logprobs=logprobs, ref_logprobs=ref_logprobs, old_logprobs=old_logprobs)
    old = None if old_logprobs is None else fill_masked(old_logprobs, mask)
    filled = fill_masked(logprobs, mask), fill_masked(ref_logprobs, mask)
    kl = kl_penalty(*filled, estimator=kl_estimator, old_logprobs=old, clip=kl_clip)
    loss = aggregate(
        kl,
        mask,
        mode=aggregation,
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )
    return loss * kl_coef, {"kl": Mean.of(jax.lax.stop_gradient(kl), mask)}
