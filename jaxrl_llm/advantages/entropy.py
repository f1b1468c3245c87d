"""Rewards shaped by the policy's entropy, within the successes and the failures of a group: GTPO and GRPO-S.

Not the unrelated GTPO of 2508.03772. The entropy is that of the policy that sampled, at the sampling temperature.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.statistics import row_labels, rows_total, safe_sqrt
from jaxrl_llm.masking import (
    as_float,
    check_choice,
    check_mask,
    check_same_shape,
    fill_masked,
    group_total,
    masked_mean,
    per_token,
    safe_divide,
)

EntropyNorm = Literal["separate", "joint"]


def gtpo_rewards(
    entropy: ArrayLike,
    successes: ArrayLike,
    mask: ArrayLike,
    *,
    success_weight: float = 1.0,
    entropy_weight: float = 0.1,
    entropy_floor: float = 1e-8,
    shape_failures: bool = True,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """GTPO's token rewards: more for uncertain tokens of a success, less for confident ones of a failure.

        success:  success_weight + entropy_weight · dₜ · Hᵢₜ / Σₖ Hₖₜ
        failure: −success_weight − entropy_weight · hₜ · Hᵢₜ⁻¹ / Σₖ Hₖₜ⁻¹

    with sums over the dₜ successes (hₜ failures) of the group that have a token at position t. The weights 1 and 0.1
    are one reading of the paper; 0.9 and 0.1, which keep the sum of the rewards, another. Unlike an entropy bonus,
    the entropy has no gradient.

    Args:
        entropy: Entropy of the distribution that each token was drawn from, `[..., G, T]`, the rows of a group along
            axis −2, or `[..., T]` with `group_ids`; a constant.
        successes: Bool `[..., G]`: the sample is right.
        mask: Bool, of the shape of `entropy`.
        success_weight: Reward of every token of a success, negative for a failure.
        entropy_weight: Weight of the part that the entropy distributes.
        entropy_floor: Lower bound on the entropy before it is inverted.
        shape_failures: False gives failures −success_weight alone, as an early version of the paper does.
        group_ids: Labels `[...]` of the rows.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        The shape of `entropy`, 0 at masked positions.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: Tan et al. 2025, "GTPO and GRPO-S" (2508.04349).
    """
    group_ids = row_labels(group_ids, group_size, mask=mask)
    shaping = (success_weight, entropy_weight, entropy_floor, shape_failures)
    base, shaped, _, _ = _token_parts(entropy, successes, mask, shaping, group_ids)
    return base + shaped


def gtpo_advantages(
    entropy: ArrayLike,
    successes: ArrayLike,
    mask: ArrayLike,
    *,
    success_weight: float = 1.0,
    entropy_weight: float = 0.1,
    entropy_floor: float = 1e-8,
    shape_failures: bool = True,
    norm: EntropyNorm = "separate",
    ddof: int = 0,
    eps: float = 1e-8,
    min_std: float = 1e-6,
    added: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """GTPO: the token rewards standardized over the tokens of a group's successes, and apart over its failures'.

        A = (r − mean) / (std + eps)        r = `gtpo_rewards`; 0 where std ≤ min_std

    Standardized separately, about half of the tokens of *successes* have a negative advantage; "joint", over all
    tokens of the group, avoids that, above all for small groups. Groups with successes only still give a signal,
    unless `keep_mixed_groups` takes them out. Unlike `grpo_s_advantages`, each token has its own.

    Args:
        entropy: As `gtpo_rewards`.
        successes: As `gtpo_rewards`.
        mask: As `gtpo_rewards`.
        success_weight: As `gtpo_rewards`.
        entropy_weight: As `gtpo_rewards`.
        entropy_floor: As `gtpo_rewards`.
        shape_failures: As `gtpo_rewards`.
        norm: "separate" or "joint".
        ddof: 0 for the deviation of the population, 1 for the unbiased one.
        eps: Added to the deviation, outside the root.
        min_std: Deviation up to which the rewards count as equal.
        added: Rewards `[..., G]` that completions have beside their outcome, such as `overlong_penalty`.
        group_ids: As `gtpo_rewards`.
        group_size: As `gtpo_rewards`.

    Returns:
        The shape of `entropy`, 0 at masked positions.

    Raises:
        ValueError: As `gtpo_rewards`, or on an unknown norm.

    Source: Tan et al. 2025, "GTPO and GRPO-S" (2508.04349).
    """
    group_ids = row_labels(group_ids, group_size, mask=mask)
    shaping = (success_weight, entropy_weight, entropy_floor, shape_failures)
    base, shaped, mask, won = _token_parts(entropy, successes, mask, shaping, group_ids)
    return _standardize(_plus(base, added), shaped, mask, won, norm, ddof, eps, min_std, group_ids)


def grpo_s_rewards(
    entropy: ArrayLike,
    successes: ArrayLike,
    mask: ArrayLike,
    *,
    success_weight: float = 1.0,
    entropy_weight: float = 0.1,
    entropy_floor: float = 1e-8,
    shape_failures: bool = True,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """GRPO-S's sequence rewards: as GTPO's token rewards, from the mean entropy of each sequence.

        success:  success_weight + entropy_weight · d · H̄ᵢ / Σₖ H̄ₖ
        failure: −success_weight − entropy_weight · h · H̄ᵢ⁻¹ / Σₖ H̄ₖ⁻¹

    with sums over the d successes (h failures) of the group. Unlike `gtpo_rewards`, one number for a sequence.

    Args:
        entropy: As `gtpo_rewards`.
        successes: As `gtpo_rewards`.
        mask: As `gtpo_rewards`.
        success_weight: As `gtpo_rewards`.
        entropy_weight: As `gtpo_rewards`.
        entropy_floor: As `gtpo_rewards`.
        shape_failures: As `gtpo_rewards`.
        group_ids: As `gtpo_rewards`.
        group_size: As `gtpo_rewards`.

    Returns:
        `[..., G]`; 0 for sequences without a token.

    Raises:
        ValueError: As `gtpo_rewards`.

    Source: Tan et al. 2025, "GTPO and GRPO-S" (2508.04349).
    """
    group_ids = row_labels(group_ids, group_size, mask=mask)
    shaping = (success_weight, entropy_weight, entropy_floor, shape_failures)
    base, shaped, _, _ = _sequence_parts(entropy, successes, mask, shaping, group_ids)
    return (base + shaped)[..., 0]


def grpo_s_advantages(
    entropy: ArrayLike,
    successes: ArrayLike,
    mask: ArrayLike,
    *,
    success_weight: float = 1.0,
    entropy_weight: float = 0.1,
    entropy_floor: float = 1e-8,
    shape_failures: bool = True,
    norm: EntropyNorm = "joint",
    ddof: int = 1,
    eps: float = 1e-6,
    min_std: float = 1e-6,
    added: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """GRPO-S: the sequence rewards standardized over the group, or apart over its successes and failures.

        A = (r − mean) / (std + eps)        r = `grpo_s_rewards`; 0 where std ≤ min_std

    For a loss with one ratio a sequence, as GSPO's. Unlike `gtpo_advantages`, all tokens of a sequence share one.

    Args:
        entropy: As `gtpo_rewards`.
        successes: As `gtpo_rewards`.
        mask: As `gtpo_rewards`.
        success_weight: As `gtpo_rewards`.
        entropy_weight: As `gtpo_rewards`.
        entropy_floor: As `gtpo_rewards`.
        shape_failures: As `gtpo_rewards`.
        norm: As `gtpo_advantages`.
        ddof: As `gtpo_advantages`.
        eps: As `gtpo_advantages`.
        min_std: As `gtpo_advantages`.
        added: As `gtpo_advantages`.
        group_ids: As `gtpo_rewards`.
        group_size: As `gtpo_rewards`.

    Returns:
        `[..., G]`; 0 for sequences without a token.

    Raises:
        ValueError: As `gtpo_advantages`.

    Source: Tan et al. 2025, "GTPO and GRPO-S" (2508.04349).
    """
    group_ids = row_labels(group_ids, group_size, mask=mask)
    shaping = (success_weight, entropy_weight, entropy_floor, shape_failures)
    base, shaped, mask, won = _sequence_parts(entropy, successes, mask, shaping, group_ids)
    return _standardize(_plus(base, added), shaped, mask, won, norm, ddof, eps, min_std, group_ids)[..., 0]


_Shaping = tuple[float, float, float, bool]
"""success_weight, entropy_weight, entropy_floor, shape_failures."""


def _token_parts(
    entropy: ArrayLike, successes: ArrayLike, mask: ArrayLike, shaping: _Shaping, group_ids: ArrayLike | None
) -> tuple[Array, Array, Array, Array]:
    """A reward as ±success_weight and what the entropy adds, the mask, and which tokens are of a success.

    In two parts, since the second is small beside the first, and is what a standardized reward consists of.
    """
    success_weight, entropy_weight, entropy_floor, shape_failures = shaping
    mask = check_mask(mask, entropy=entropy)
    won = per_token(mask, successes=successes).astype(bool) & mask
    lost = mask & ~won
    entropy = jax.lax.stop_gradient(fill_masked(entropy, mask))
    shaped = _share(entropy, won, group_ids)
    if shape_failures:
        shaped -= _share(1 / jnp.maximum(entropy, entropy_floor), lost, group_ids)
    base = jnp.where(won, success_weight, jnp.where(lost, -success_weight, 0.0)).astype(entropy.dtype)
    return base, entropy_weight * shaped, mask, won


def _sequence_parts(
    entropy: ArrayLike, successes: ArrayLike, mask: ArrayLike, shaping: _Shaping, group_ids: ArrayLike | None
) -> tuple[Array, Array, Array, Array]:
    """As `_token_parts`, with a sequence as a row of one token, its mean entropy."""
    mask = check_mask(mask, entropy=entropy)
    successes = per_token(mask, successes=successes)[..., 0]
    means = masked_mean(entropy, mask, axis=-1, keepdims=True)
    return _token_parts(means, successes, jnp.any(mask, axis=-1, keepdims=True), shaping, group_ids)


def _share(x: Array, mask: Array, group_ids: ArrayLike | None) -> Array:
    """What each has of the sum at its position, times the number of those that share it: 1 on average."""
    total, count = rows_total(x, mask, group_ids), rows_total(mask, mask, group_ids)
    return jnp.where(mask, safe_divide(x * count, total), 0.0)


def _plus(base: Array, added: ArrayLike | None) -> Array:
    """Rewards `[..., G, T]` with what each completion has beside."""
    if added is None:
        return base
    check_same_shape(base=base[..., 0], added=added)
    return base + as_float(added)[..., None]


def _standardize(
    base: Array,
    shaped: Array,
    mask: Array,
    won: Array,
    norm: str,
    ddof: int,
    eps: float,
    min_std: float,
    group_ids: ArrayLike | None,
) -> Array:
    """Standardizes the rewards base + shaped, `[..., G, T]`, over the tokens of each group."""
    check_choice("norm", norm, EntropyNorm)

    def over(mask: Array) -> Array:
        def group_sum(x: Array) -> Array:
            rows = jnp.sum(jnp.where(mask, x, 0.0), axis=-1)
            return group_total(rows, jnp.ones(rows.shape, bool), group_ids)[..., None]

        count = group_sum(jnp.ones_like(shaped))
        # Each part about its own mean: that of the large one is exact where all are equal.
        centred = (base - safe_divide(group_sum(base), count)) + (shaped - safe_divide(group_sum(shaped), count))
        std = safe_sqrt(safe_divide(group_sum(centred**2), jnp.maximum(count - ddof, 0)))
        return jnp.where(mask & (std > min_std), safe_divide(centred, std + eps), 0.0)

    return over(mask) if norm == "joint" else over(won) + over(mask & ~won)
