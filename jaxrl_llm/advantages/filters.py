"""Which samples and groups take part in an update: masks of static shape, never indices.

A mask of samples `[..., G]` becomes one of tokens as `mask & keep[..., None]`. Truncated samples are left out
(overlong filtering) as `mask & finished[..., None]`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.group import group_advantages, zero_std_groups
from jaxrl_llm.advantages.statistics import group_labels, group_rank, group_statistics
from jaxrl_llm.masking import as_float, check_choice, check_same_shape, fill_masked, mask_or_all

ThresholdKind = Literal["hard", "soft"]
ThresholdScale = Literal["none", "group"]


def keep_mixed_groups(
    accuracies: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """DAPO's dynamic sampling: keeps a group only if its samples are neither all right nor all wrong.

        0 < number of right samples < G        (in general: not all valid accuracies are equal)

    It looks at the correctness itself, before any shaping: a penalty for length would make differences that are no
    signal. The rest of the batch is sampled anew on the host, a bounded number of times. Unlike `gpg_alpha`, which
    makes up for such groups, it lets others take their place.

    Args:
        accuracies: The unshaped metric, `[..., G]` with a group along the last axis; or any shape with `group_ids`.
        mask: Bool, of that shape: False for samples that could not be scored.
        group_ids: Labels of that shape; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        Bool: `[...]`, one for each group; with `group_ids`, for each sample that of its group.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Yu et al. 2025, "DAPO" (2503.14476).
    """
    group_ids = group_labels(group_ids, group_size, accuracies=accuracies)
    return ~zero_std_groups(accuracies, mask=mask, group_ids=group_ids)


class FilteredAdvantages(NamedTuple):
    """Advantages, and the samples that are kept; both of the shape of the rewards."""

    advantages: Array
    keep: Array


def threshold_filter(
    rewards: ArrayLike,
    *,
    threshold: ThresholdKind = "hard",
    top_percent: float | None = None,
    scale: ThresholdScale = "none",
    ddof: int = 1,
    eps: float = 1e-4,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> FilteredAdvantages:
    """Keeps the better samples of each group, with advantages against the mean of all of them.

        hard: keep R > mean;   soft: keep the top_percent % of the group with the largest R, at least one
        A = R − mean        (scale="group": divided by std + eps)

    The loss is the mean over the kept samples of −logprob · A. It learns from successes alone and is biased as a
    policy gradient: kin of rejection sampling (RAFT) with weights. "hard" keeps nothing of a group of equal rewards;
    "soft" may keep samples with A ≤ 0, and of equal ones takes the first. Unlike `gfpo_advantages`, the mean is
    over all samples.

    Args:
        rewards: `[..., G]`, a group along the last axis; or any shape with `group_ids`.
        threshold: "hard" or "soft".
        top_percent: The share that "soft" keeps, in (0, 100]; rounded up.
        scale: "none", or "group" for standardized advantages.
        ddof: As `group_advantages`.
        eps: As `group_advantages`.
        mask: Bool, of the shape of `rewards`: False for samples that could not be scored.
        group_ids: Labels of the shape of `rewards`; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        Advantages of all valid samples, and which are kept.

    Raises:
        ValueError: On unequal shapes, an unknown option, or "soft" without a share.

    Source: A reading of GRPO in secondary literature; RAFT: Dong et al. 2023 (2304.06767).
    """
    group_ids = group_labels(group_ids, group_size, rewards=rewards)
    check_choice("threshold", threshold, ThresholdKind)
    check_choice("scale", scale, ThresholdScale)
    if (threshold == "soft") != (top_percent is not None):
        raise ValueError(
            f"threshold is {threshold!r} and top_percent {top_percent}: it is for 'soft', and needed there"
        )
    if isinstance(top_percent, int | float) and not 0 < top_percent <= 100:
        raise ValueError(f"top_percent is {top_percent}: it must be in (0, 100]")
    mask = mask_or_all(mask, rewards=rewards)
    rewards = fill_masked(rewards, mask)
    advantages = group_advantages(rewards, scale=scale, ddof=ddof, eps=eps, mask=mask, group_ids=group_ids)
    group = group_statistics(rewards, mask, group_ids)
    if top_percent is None:
        keep = (rewards > group.mean + 1e-8) & ~group.is_constant
    else:  # less a rounding error, so that 7 % of 100 are 7
        share = jnp.ceil(group.count * top_percent / 100 - 1e-4)
        keep = group_rank(rewards, mask, group_ids) < jnp.maximum(share, 1)
    return FilteredAdvantages(advantages, mask & keep)


def gfpo_mask(
    metric: ArrayLike,
    *,
    keep: ArrayLike,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """Group filtered policy optimization: keeps the samples of each group with the largest metric.

        rank of the metric in its group < keep        (of equal ones, the first)

    The metric is −length (short samples) or reward / length (efficient ones). Unlike `threshold_filter`, what is
    selected need not be the reward.

    Args:
        metric: `[..., G]`, a group along the last axis; or any shape with `group_ids`.
        keep: How many samples of a group are kept: an integer, or an array that broadcasts to the shape of `metric`,
            as from `gfpo_adaptive_keep`.
        mask: Bool, of the shape of `metric`: False for samples that could not be scored.
        group_ids: Labels of the shape of `metric`; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        Bool, of the shape of `metric`.

    Raises:
        ValueError: On unequal shapes, or a `keep` below 1.

    Source: Shrivastava et al. 2025, "Sample more to think less" (2508.09726).
    """
    group_ids = group_labels(group_ids, group_size, metric=metric)
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"keep is {keep}: it must be at least 1")
    mask = mask_or_all(mask, metric=metric)
    return mask & (group_rank(metric, mask, group_ids) < jnp.asarray(keep))


def gfpo_advantages(
    rewards: ArrayLike,
    metric: ArrayLike,
    *,
    keep: ArrayLike,
    ddof: int = 1,
    eps: float = 1e-4,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> FilteredAdvantages:
    """Advantages of GRPO among the samples that `gfpo_mask` keeps.

        A = (R − mean_kept) / (std_kept + eps) if kept, 0 if not

    Unlike `group_advantages` with all samples, those that are not kept have no part in mean and deviation either.
    The loss is normalized by the tokens that are kept: its mask is `mask & keep[..., None]`.

    Args:
        rewards: `[..., G]`, a group along the last axis; or any shape with `group_ids`.
        metric: As `gfpo_mask`.
        keep: As `gfpo_mask`.
        ddof: As `group_advantages`.
        eps: As `group_advantages`.
        mask: As `gfpo_mask`.
        group_ids: As `gfpo_mask`.
        group_size: As `gfpo_mask`.

    Returns:
        Advantages, and which samples are kept.

    Raises:
        ValueError: As `gfpo_mask`.

    Source: Shrivastava et al. 2025, "Sample more to think less" (2508.09726).
    """
    group_ids = group_labels(group_ids, group_size, rewards=rewards)
    check_same_shape(rewards=rewards, metric=metric)
    kept = gfpo_mask(metric, keep=keep, mask=mask, group_ids=group_ids)
    return FilteredAdvantages(group_advantages(rewards, ddof=ddof, eps=eps, mask=kept, group_ids=group_ids), kept)


def gfpo_adaptive_keep(mean_rewards: ArrayLike, *, boundaries: ArrayLike, keep: ArrayLike) -> Array:
    """How many samples GFPO keeps of a prompt of a certain difficulty.

        keep[number of boundaries ≤ mean reward of the group]

    The boundaries are quantiles of the mean rewards of recent prompts, hard ones first; the paper keeps more
    samples of hard prompts. Unlike with a fixed `keep`, easy prompts are cut down the most.

    Args:
        mean_rewards: Mean reward of each group, any shape; for `gfpo_mask`, `[..., 1]`.
        boundaries: `[K]`, ascending.
        keep: `[K + 1]` integers.

    Returns:
        Integers of the shape of `mean_rewards`.

    Raises:
        ValueError: If there is not one `keep` more than boundaries.

    Source: Shrivastava et al. 2025, "Sample more to think less" (2508.09726).
    """
    if np.ndim(boundaries) != 1 or np.shape(keep) != (np.size(boundaries) + 1,):
        raise ValueError(
            f"boundaries has shape {np.shape(boundaries)} and keep {np.shape(keep)}: pass [K] and [K + 1] numbers"
        )
    place = jnp.searchsorted(as_float(boundaries), as_float(mean_rewards), side="right")
    return jnp.asarray(keep)[place]
