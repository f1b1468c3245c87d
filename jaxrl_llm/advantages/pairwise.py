"""BRPO: rewards from comparisons with one of the group's own samples, drawn as the reference."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.statistics import group_labels, group_rank
from jaxrl_llm.masking import (
    check_choice,
    check_mask,
    check_same_shape,
    fill_masked,
    group_total,
    mask_or_all,
    safe_divide,
)

InconsistentVerdict = Literal["loss", "tie"]


def draw_reference(
    key: Array, mask: ArrayLike, *, group_ids: ArrayLike | None = None, group_size: int | None = None
) -> Array:
    """Draws the sample of each group that the others are compared with, each valid one with equal probability.

        reference ~ uniform over the valid samples of the group

    A new draw changes the advantages, so that the key belongs to the batch, not to the epoch. Unlike the greedy
    completion of ReMax, it costs no further sample.

    Args:
        key: PRNG key.
        mask: Bool `[..., G]`, a group along the last axis, or any shape with `group_ids`: the samples there are.
        group_ids: Labels of the shape of `mask`; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        Bool, of the shape of `mask`: True at one sample of each group that has any.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Jia et al. 2025, "Writing-Zero" (2506.00103).
    """
    group_ids = group_labels(group_ids, group_size, mask=mask)
    mask = check_mask(mask, group_ids=group_ids)
    return mask & (group_rank(jax.random.uniform(key, mask.shape), mask, group_ids) == 0)


def brpo_advantages(
    preferred: ArrayLike,
    is_reference: ArrayLike,
    *,
    preferred_swapped: ArrayLike | None = None,
    inconsistent: InconsistentVerdict = "loss",
    mask: ArrayLike | None = None,
) -> Array:
    """Bootstrapped relative policy optimization: +1 for a sample that beats the reference, −1 for any other.

        A = 1 if preferred to the reference, −1 if not, 0 for the reference itself

    There is no mean and no deviation. A judge favours a position, so that it should see each pair in both orders.
    Unlike `group_advantages`, no score is needed, only verdicts.

    Args:
        preferred: Bool `[..., G]`: the judge prefers the sample to its group's reference. A tie is no preference.
        is_reference: Bool, of that shape, from `draw_reference`; what the verdict says there does not matter.
        preferred_swapped: The same with the two shown in the other order. None: one order only.
        inconsistent: A sample preferred in one order alone: "loss" (−1) or "tie" (0).
        mask: Bool, of that shape: False for samples that could not be judged.

    Returns:
        The shape of `preferred`, float32.

    Raises:
        ValueError: On unequal shapes or an unknown option.

    Source: Jia et al. 2025, "Writing-Zero" (2506.00103).
    """
    check_choice("inconsistent", inconsistent, InconsistentVerdict)
    mask = mask_or_all(mask, preferred=preferred)
    check_same_shape(preferred=preferred, is_reference=is_reference, preferred_swapped=preferred_swapped)
    first = jnp.asarray(preferred, bool)
    second = first if preferred_swapped is None else jnp.asarray(preferred_swapped, bool)
    otherwise = jnp.where(first != second, 0.0, -1.0) if inconsistent == "tie" else -1.0
    verdict = jnp.where(first & second, 1.0, otherwise)
    return jnp.where(mask & ~jnp.asarray(is_reference, bool), verdict, 0.0)


def brpo_skew(
    advantages: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """How one-sided the verdicts of a group are: 0 if balanced, near 1 if the reference was the worst or the best.

        |Σᵢ Aᵢ| / G

    Groups with more than 0.6 teach little and are left out: `keep = brpo_skew(advantages) <= 0.6`. Unlike
    `keep_mixed_groups`, it also drops groups that are nearly one-sided.

    Args:
        advantages: From `brpo_advantages`, `[..., G]`; or any shape with `group_ids`.
        mask: Bool, of that shape: False for samples that could not be judged, which do not count in G.
        group_ids: Labels of that shape; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        Float32 `[...]`, one for each group; with `group_ids`, for each sample that of its group.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Jia et al. 2025, "Writing-Zero" (2506.00103).
    """
    group_ids = group_labels(group_ids, group_size, advantages=advantages)
    mask = mask_or_all(mask, advantages=advantages)
    total = group_total(fill_masked(advantages, mask), mask, group_ids)
    skew = jnp.abs(safe_divide(total, group_total(mask, mask, group_ids)))
    return skew[..., 0] if group_ids is None else skew
