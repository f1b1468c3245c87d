"""Advantages of a sample relative to the other samples of its prompt: GRPO, Dr. GRPO, RLOO, LitePPO."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.statistics import group_labels, group_statistics, safe_sqrt
from jaxrl_llm.masking import check_choice, fill_masked, mask_or_all, masked_var, safe_divide

AdvantageScale = Literal["group", "batch", "variance", "none"]
AdvantageBaseline = Literal["mean", "leave_one_out"]


def group_advantages(
    rewards: ArrayLike,
    *,
    scale: AdvantageScale = "group",
    baseline: AdvantageBaseline = "mean",
    ddof: int = 1,
    eps: float = 1e-4,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """Rewards minus their group's baseline, divided by a scale.

        A = (R − baseline) / (scale + eps)

    The scale is

    - "group": the group's standard deviation (GRPO, Shao et al. 2024, 2402.03300);
    - "batch": the standard deviation of all valid rewards (LitePPO, Liu et al. 2025, 2508.08221);
    - "variance": the group's variance, in place of its root (a reading of GRPO in secondary literature);
    - "none": no division (Dr. GRPO, Liu et al. 2025, 2503.20783).

    The baseline is the "mean" of the group, the sample itself included, or "leave_one_out", the mean of
    its other samples (RLOO, Ahmadian et al. 2024, 2402.14740), which makes A larger by G / (G − 1).

    Unlike `reinforce_plus_plus_baseline_advantages`, nothing but "batch" looks beyond the group. A group of one
    has advantage 0 (in verl, its raw reward). A group whose valid rewards are all equal, by an exact comparison, has
    advantages of exactly 0: its mean may be off by a rounding error, which the division by eps would blow up.

    Args:
        rewards: `[..., G]`, a group along the last axis; or any shape with `group_ids`.
        scale: What the centred rewards are divided by.
        baseline: What is subtracted.
        ddof: 1 for the unbiased deviation (TRL, verl), 0 for the population's.
        eps: Added to the divisor, outside the root.
        mask: Bool, of the shape of `rewards`: False for samples that could not be scored. They have
            advantage 0 and no part in any statistic; their reward may be NaN.
        group_ids: Labels of the shape of `rewards`, in any order; equal labels form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        The shape of `rewards`, float32. A NaN among the valid rewards stays visible as NaN.

    Raises:
        ValueError: On shapes that do not fit or an unknown option.

    Source: Shao et al. 2024, "DeepSeekMath" (2402.03300); Liu et al. 2025, "Understanding R1-Zero-like
    training" (2503.20783); Ahmadian et al. 2024 (2402.14740); Liu et al. 2025, "Tricks or traps?" (2508.08221).
    """
    group_ids = group_labels(group_ids, group_size, rewards=rewards)
    check_choice("scale", scale, AdvantageScale)
    check_choice("baseline", baseline, AdvantageBaseline)
    mask = mask_or_all(mask, rewards=rewards)
    rewards = fill_masked(rewards, mask)
    group = group_statistics(rewards, mask, group_ids)

    if baseline == "mean":
        centred = rewards - group.mean
    else:
        others = group.count - 1
        centred = rewards - safe_divide(group.mean * group.count - rewards, others)
    if scale == "none":
        divisor = 1.0
    elif scale == "variance":
        divisor = group.variance(ddof) + eps
    else:
        variance = group.variance(ddof) if scale == "group" else masked_var(rewards, mask, ddof=ddof)
        divisor = safe_sqrt(variance) + eps
    return jnp.where(mask & ~group.is_constant, safe_divide(centred, divisor), 0.0)


def zero_std_groups(
    rewards: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """Marks the groups that teach nothing: no two valid rewards differ, by an exact comparison.

        max R = min R

    A group with one valid sample, or none, is such a group. Unlike a bound on the standard deviation, the test does
    not depend on rounding, nor on the scale of the rewards.

    Args:
        rewards: `[..., G]`, or any shape with `group_ids`.
        mask: Bool, of the shape of `rewards`: False for samples that could not be scored.
        group_ids: Labels of the shape of `rewards`.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        Bool: `[...]`, one for each group; with `group_ids`, for each sample that of its group.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Yu et al. 2025, "DAPO" (2503.14476).
    """
    group_ids = group_labels(group_ids, group_size, rewards=rewards)
    mask = mask_or_all(mask, rewards=rewards)
    is_constant = group_statistics(fill_masked(rewards, mask), mask, group_ids).is_constant
    return is_constant[..., 0] if group_ids is None else is_constant
