"""Least squares on the log-ratio of whole sequences to the reference: A*-PO."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import check_positive, policy_rows
from jaxrl_llm.losses.aggregate import aggregate
from jaxrl_llm.masking import safe_divide, segment_first, segment_total
from jaxrl_llm.records import Mean, Metrics


def a_star_po_loss(
    logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: float = 1e-3,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Optimal advantage regression: the log-ratio of a sequence to the reference is fitted to its optimal advantage.

        mean over sequences of  (beta Σₜ (logprobs − ref_logprobs) − A)²        A = R − V

    The best policy that pays beta a nat for leaving the reference has beta log(π / reference) = R − V for every
    sequence, so that the minimum is known and nothing has to be clipped. Unlike `dpo_loss`, which fits differences of
    two samples of a prompt, it fits each by itself, since V (`optimal_values`) is known.

    Args:
        logprobs: Log-probabilities of the sampled tokens under the policy, `[..., T]`.
        ref_logprobs: The same under the reference; a constant.
        advantages: One for each sequence, `[...]`; or `[..., T]`, the same for all tokens of a sequence (needed with
            `segment_ids`).
        mask: Bool `[..., T]`, True on the tokens of the completions.
        beta: Price of a nat. TRL's is 1e-3, beside 0.5 in `optimal_values`.
        weights: As `grpo_loss`; weights of tokens are averaged over the sequence.
        normalizer: The number of sequences in the whole batch, if these rows are a part of it.
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.

    Returns:
        The loss, a float32 scalar, and the metrics `implicit_reward/mean`, of beta Σ (logprobs − ref_logprobs), and
        `advantage/mean`, of A, over sequences.

    Raises:
        ValueError: As `gspo_loss`, and on a beta that is not positive.

    Source: Brantley et al. 2025, "Accelerating RL for LLM reasoning with optimal advantage regression" (2505.20686).
    """
    check_positive(beta=beta)
    rows = policy_rows(logprobs, ref_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    implicit = beta * segment_total(rows.log_ratio, rows.mask, segment_ids)
    losses = (implicit - rows.advantages) ** 2
    if rows.weights is not None:
        count = segment_total(rows.mask, rows.mask, segment_ids)
        losses *= safe_divide(segment_total(rows.weights, rows.mask, segment_ids), count)
    first = segment_first(rows.mask, segment_ids)
    loss = aggregate(
        jnp.where(first, losses, 0.0),
        rows.mask,
        mode="seq-mean-token-sum",
        normalizer=normalizer,
        segment_ids=segment_ids,
    )
    metrics: Metrics = {
        "implicit_reward/mean": Mean.of(jax.lax.stop_gradient(implicit), first),
        "advantage/mean": Mean.of(rows.advantages, first),
    }
    return loss, metrics
