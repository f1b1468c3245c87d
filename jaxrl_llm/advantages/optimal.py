"""Advantages over the value of the best policy near a reference, which samples of the reference alone tell: A*-PO."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import check_positive
from jaxrl_llm.masking import as_float, fill_masked, mask_or_all, masked_mean


def optimal_values(reference_rewards: ArrayLike, *, beta: float = 0.5, mask: ArrayLike | None = None) -> Array:
    """The value of a prompt under the best policy whose KL from the reference costs beta, from the reference's samples.

        V = beta log( Σᵢ exp(Rᵢ / beta) / N )        N valid samples of the reference

    It is between the mean of the rewards (large beta) and their maximum (small beta), and never changes while a policy
    is trained. Unlike the mean of a group, it needs no sample of the policy.

    Args:
        reference_rewards: Rewards of the reference's samples of each prompt, `[..., N]`.
        beta: Price of a nat; a plain number.
        mask: Bool `[..., N]`, False for samples that could not be scored.

    Returns:
        `[...]`, float32; 0 where no sample is valid.

    Raises:
        ValueError: On a beta that is not positive, unequal shapes or a mask that is not bool.

    Source: Brantley et al. 2025, "Accelerating RL for LLM reasoning with optimal advantage regression" (2505.20686).
    """
    check_positive(beta=beta)
    mask = mask_or_all(mask, reference_rewards=reference_rewards)
    rewards = fill_masked(reference_rewards, mask)
    best = jax.lax.stop_gradient(jnp.max(fill_masked(reference_rewards, mask, -jnp.inf), axis=-1))
    best = jnp.where(jnp.any(mask, axis=-1), best, 0.0)
    # Exact for a large beta, too, where the mean of exponentials is all but 1.
    return best + beta * jnp.log1p(masked_mean(jnp.expm1((rewards - best[..., None]) / beta), mask, axis=-1))


def optimal_advantages(
    rewards: ArrayLike, reference_rewards: ArrayLike, *, beta: float = 0.5, mask: ArrayLike | None = None
) -> Array:
    """The advantage of a sample over what the best policy near the reference gets on average: A*-PO.

        A = R − V        V of `optimal_values`

    For `a_star_po_loss`, which regresses log-ratios on it. Unlike `group_advantages`, whose baseline is what the policy
    gets now, most samples have A < 0 until the policy is as good as V, and one sample of a prompt is enough.

    Args:
        rewards: Of the policy's samples, `[..., G]`.
        reference_rewards: Of the reference's samples of the same prompts, `[..., N]`.
        beta: As `optimal_values`.
        mask: Bool `[..., N]`, False for samples of the reference that could not be scored.

    Returns:
        `[..., G]`, float32.

    Raises:
        ValueError: As `optimal_values`, and on shapes of different prompts.

    Source: Brantley et al. 2025, "Accelerating RL for LLM reasoning with optimal advantage regression" (2505.20686).
    """
    values, rewards = optimal_values(reference_rewards, beta=beta, mask=mask), as_float(rewards)
    if values.shape != rewards.shape[:-1]:
        raise ValueError(
            f"rewards has shape {rewards.shape}, but reference_rewards has shape {jnp.shape(reference_rewards)}: pass "
            "[..., G] and [..., N] of the same prompts"
        )
    return rewards - values[..., None]
