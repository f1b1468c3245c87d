"""A baseline for each token of a group, weighted by how uncertain the way to it was."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.statistics import row_labels, rows_total
from jaxrl_llm.masking import as_float, check_mask, fill_masked, safe_divide, suffix_sum


def optimal_token_baseline_advantages(
    token_rewards: ArrayLike,
    old_logprobs: ArrayLike,
    sum_squared_probs: ArrayLike,
    mask: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    zero_tail: bool = True,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """Rewards to go minus the optimal token baseline: a mean over the group at each position, weighted by variance.

        Gᵢₜ = Σₖ₌ₜ rᵢₖ;   Wᵢₜ = Σₖ≤ₜ weightsᵢₖ² (1 − 2 pᵢₖ + Σᵥ pᵢₖ(v)²)
        Aᵢₜ = Gᵢₜ − Σⱼ Wⱼₜ Gⱼₜ / Σⱼ Wⱼₜ

    with p the probability of the sampled token. W stands for the squared norm of the score ∇ log π of the prefix,
    seen from the logits. Rows are compared at equal positions. Unlike `opo_advantages`, which weighs by whole
    lengths, it weighs each prefix by how uncertain its tokens were.

    Args:
        token_rewards: `[..., G, T]`, the rows of a group along axis −2; or `[..., T]` with `group_ids`.
        old_logprobs: Log-probabilities of the tokens under the policy that sampled, of that shape; a constant.
        sum_squared_probs: Σᵥ p(v)² of the distribution that each token was drawn from, of that shape; a constant.
        mask: Bool, of that shape.
        weights: Importance weights of the tokens, of that shape; a constant. None: 1.
        zero_tail: Whether the baseline is 0 where only one row of the group has a token: there it would be the
            row's own return, and the advantage 0. A group of one row has baseline 0 in any case.
        group_ids: Labels `[...]` of the rows.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        The shape of `token_rewards`, 0 at masked positions.

    Raises:
        ValueError: On unequal shapes, a mask that is not bool, or rows without a group.

    Source: verl, `compute_optimal_token_baseline_advantage`.
    """
    group_ids = row_labels(group_ids, group_size, mask=mask)
    mask = check_mask(
        mask,
        token_rewards=token_rewards,
        old_logprobs=old_logprobs,
        sum_squared_probs=sum_squared_probs,
        weights=weights,
    )
    returns = suffix_sum(token_rewards, mask)
    energy = 1 - 2 * jnp.exp(fill_masked(old_logprobs, mask)) + fill_masked(sum_squared_probs, mask)
    if weights is not None:
        energy = energy * as_float(fill_masked(weights, mask)) ** 2
    prefix_energy = jax.lax.stop_gradient(jnp.cumsum(jnp.where(mask, energy, 0.0), axis=-1))
    baseline = safe_divide(
        rows_total(returns * prefix_energy, mask, group_ids), rows_total(prefix_energy, mask, group_ids)
    )
    alive = rows_total(mask, mask, group_ids)
    has_token = jnp.any(mask, axis=-1, keepdims=True)
    is_only_row = rows_total(has_token, has_token, group_ids) == 1
    without = is_only_row | (alive == 1) if zero_tail else is_only_row
    return jnp.where(mask, returns - jnp.where(without, 0.0, baseline), 0.0)
