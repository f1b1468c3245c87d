"""AOT: the chosen completions of a batch against its rejected ones as two distributions, not pair by pair."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._pairs import make_pairs, mean_over, pair_metrics
from jaxrl_llm.losses.preference_terms import cdpo_term
from jaxrl_llm.masking import count_true
from jaxrl_llm.records import Metrics


def aot_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike,
    ref_rejected_logprobs: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    paired: bool = True,
    mask: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Alignment via optimal transport: DPO on the differences of quantiles of a batch, and not of each pair.

        mean over ranks of  −(1 − label_smoothing) log σ(beta δ) − label_smoothing log σ(−beta δ)
        paired:    δ = sort(log π(y_w)/π(y_l)) − sort(log π_ref(y_w)/π_ref(y_l))
        unpaired:  δ = sort(log π(y_w)/π_ref(y_w)) − sort(log π(y_l)/π_ref(y_l))

    It asks that the policy's distribution of margins dominates the reference's (paired), or that the rewards of
    chosen completions dominate those of rejected ones (unpaired: then the two sides need not answer the same prompts).

    Unlike `dpo_loss`, a pair's gradient depends on its rank: the sort is over *all* pairs given, so that these must be
    the whole batch. Losses of micro-batches are those of other distributions, hence no `normalizer`.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        beta: As `dpo_loss`.
        label_smoothing: Share of wrong labels, in [0, 0.5).
        paired: Which of the two differences.
        mask: As `dpo_loss`.

    Returns:
        As `dpo_loss`.

    Raises:
        ValueError: As `dpo_loss`, and on a share outside [0, 0.5).

    Source: Melnyk et al. 2024, "Distributional preference alignment of LLMs via optimal transport" (2406.05882).
    """
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    upper, lower = pairs.chosen_log_ratios, pairs.rejected_log_ratios
    if paired:
        upper = pairs.chosen_logprobs - pairs.rejected_logprobs
        lower = upper - pairs.margin
    valid = jnp.arange(pairs.mask.size) < count_true(pairs.mask)
    delta = jnp.where(valid, _sort_valid(upper, pairs.mask, valid) - _sort_valid(lower, pairs.mask, valid), 0.0)
    loss = mean_over(cdpo_term(delta, label_smoothing=label_smoothing, beta=beta), valid)
    return loss, pair_metrics(pairs, pairs.chosen_log_ratios * beta, pairs.rejected_log_ratios * beta)


def _sort_valid(x: Array, mask: Array, valid: Array) -> Array:
    """The valid elements in ascending order, then zeros where `valid` is False."""
    return jnp.where(valid, jnp.sort(jnp.where(mask, x, jnp.inf), axis=None), 0.0)
