"""Which tokens and sequences a sampler's and a learner's log-probs agree on well enough to be trained on."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.kl import kl_k1, kl_k2, kl_k3
from jaxrl_llm.losses.ratio import clamp_log_ratio
from jaxrl_llm.masking import check_choice, check_mask, fill_masked, safe_divide, segment_total

RejectionStatistic = Literal["ratio", "k1", "k2", "k3"]
RejectionLevel = Literal["token", "sum", "mean", "max"]


def rejection_mask(
    old_logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    statistic: RejectionStatistic = "k3",
    level: RejectionLevel = "mean",
    low: float | None = None,
    high: float | None = None,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """Marks the tokens, or the sequences, on which sampler and learner do not differ too much.

        low ≤ S ≤ high        S = dₜ ("token"), Σₜ dₜ ("sum"), Σₜ dₜ / n ("mean"), or every dₜ of the sequence ("max")
        d = −log ρ ("k1"),  (log ρ)² / 2 ("k2"),  ρ − 1 − log ρ ("k3"),  log ρ, and exp of the result ("ratio")

    with ρ = exp(old_logprobs − sampler_logprobs), its logarithm clamped to ±20. The first three estimate the KL of the
    sampler from the learner's old policy: k2 and k3 cannot cancel over a sequence, as k1 can. "ratio" by "sum" is the
    product of a sequence's ratios, by "mean" its geometric mean (`geometric_filter`). Unlike `mis_weights`, it returns
    no weight: what is kept may be corrected or not.

    Args:
        old_logprobs: As `importance_weights`.
        sampler_logprobs: As `importance_weights`.
        mask: As `importance_weights`.
        statistic: What is bounded.
        level: Over what it is taken; but for "token", a sequence is kept as a whole or not at all.
        low: Lower bound. None: none.
        high: Upper bound. None: none.
        segment_ids: As `importance_weights`.

    Returns:
        Bool `[..., T]`, False at masked positions. As `weights` of a loss, rejected tokens still count in denominators;
        as part of its mask, they do not.

    Raises:
        ValueError: As `importance_weights`, on an unknown option, no bound at all, or bounds in the wrong order.

    Source: Liu et al. 2025, "When speed kills stability: demystifying RL collapse from the training-inference
    mismatch"; verl, `rollout_rs`; estimators: J. Schulman, "Approximating KL divergence" (2020).
    """
    check_choice("statistic", statistic, RejectionStatistic)
    check_choice("level", level, RejectionLevel)
    if low is None and high is None:
        raise ValueError("low and high are both None: nothing would be rejected; pass a bound")
    if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
        raise ValueError(f"low is {low} and high is {high}: nothing is between them")
    mask = check_mask(mask, old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs, segment_ids=segment_ids)
    log_ratio = fill_masked(old_logprobs, mask) - fill_masked(sampler_logprobs, mask)
    log_ratio = jax.lax.stop_gradient(clamp_log_ratio(log_ratio))
    values = log_ratio
    if statistic != "ratio":
        estimate = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[statistic]
        values = estimate(jnp.zeros_like(log_ratio), log_ratio)
    if level in ("sum", "mean"):
        values = segment_total(values, mask, segment_ids)
    if level == "mean":
        values = safe_divide(values, segment_total(mask, mask, segment_ids))
    if statistic == "ratio":
        values = jnp.exp(clamp_log_ratio(values))
    within = (values >= (-jnp.inf if low is None else low)) & (values <= (jnp.inf if high is None else high))
    if level == "max":
        within = segment_total(mask & ~within, mask, segment_ids) == 0
    return mask & within
