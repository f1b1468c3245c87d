"""Advantages within a group with other baselines and scales than its mean and deviation: OPO, GPG, pass@k, MaxRL."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.group import group_advantages
from jaxrl_llm.advantages.statistics import group_labels, group_rank, group_statistics, safe_sqrt
from jaxrl_llm.masking import (
    check_choice,
    check_same_shape,
    count_true,
    fill_masked,
    group_total,
    mask_or_all,
    safe_divide,
)

GPGAlphaMode = Literal["valid_groups", "nonzero_rewards"]
PassAtKScale = Literal["group", "none"]


def opo_advantages(
    rewards: ArrayLike,
    lengths: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """OPO: rewards minus the mean of their group weighted by length.

        A = R − Σⱼ nⱼ Rⱼ / Σⱼ nⱼ

    That is the baseline of least variance if the gradients of tokens are independent and alike. It is for exactly
    on-policy updates, without KL or entropy terms. Unlike `group_advantages(scale="none")`, the baseline leans to
    the long samples.

    Args:
        rewards: `[..., G]`, a group along the last axis; or any shape with `group_ids`.
        lengths: Lengths nⱼ of the completions in tokens, of the shape of `rewards`.
        mask: Bool, of the shape of `rewards`: False for samples that could not be scored.
        group_ids: Labels of the shape of `rewards`; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        The shape of `rewards`; exactly 0 where all of a group's rewards are equal, and where masked.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Hao et al. 2025, "On-policy RL with optimal reward baseline" (2505.23585).
    """
    group_ids = group_labels(group_ids, group_size, rewards=rewards)
    mask = mask_or_all(mask, rewards=rewards)
    check_same_shape(rewards=rewards, lengths=lengths)
    rewards, lengths = fill_masked(rewards, mask), fill_masked(lengths, mask)
    baseline = safe_divide(group_total(lengths * rewards, mask, group_ids), group_total(lengths, mask, group_ids))
    is_constant = group_statistics(rewards, mask, group_ids).is_constant
    return jnp.where(mask & ~is_constant, rewards - baseline, 0.0)


def gpg_alpha(
    rewards: ArrayLike,
    *,
    alpha_mode: GPGAlphaMode = "valid_groups",
    eps: float = 0.0,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """GPG's factor for the samples that teach nothing: all samples over those that do.

        B / (B − M)        M samples in groups whose rewards are all equal

    1 / alpha is the share of valid samples: below about 0.6 the authors collect more before they update. Unlike
    dropping those groups, it keeps the shapes, with the same gradient as a mean over the others.

    Args:
        rewards: `[..., G]`, a group along the last axis; or any shape with `group_ids`.
        alpha_mode: "valid_groups" as above, or "nonzero_rewards": B over the number of rewards that are not 0 (verl).
        eps: Added to the share, before it is inverted (1e-5 in the authors' code).
        mask: Bool, of the shape of `rewards`: False for samples that could not be scored.
        group_ids: Labels of the shape of `rewards`; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        A float32 scalar; 0 if no sample teaches anything.

    Raises:
        ValueError: On unequal shapes or an unknown option.

    Source: Chu et al. 2025, "GPG" (2504.02546).
    """
    group_ids = group_labels(group_ids, group_size, rewards=rewards)
    check_choice("alpha_mode", alpha_mode, GPGAlphaMode)
    mask = mask_or_all(mask, rewards=rewards)
    rewards = fill_masked(rewards, mask)
    useful = ~group_statistics(rewards, mask, group_ids).is_constant if alpha_mode == "valid_groups" else rewards != 0
    share = safe_divide(count_true(mask & useful), count_true(mask))
    return jnp.where(share > 0, safe_divide(1.0, share + eps), 0.0)


def gpg_advantages(
    rewards: ArrayLike,
    *,
    alpha_mode: GPGAlphaMode = "valid_groups",
    eps: float = 0.0,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """GPG: centred rewards, made larger by what groups without a signal take off the mean.

        A = alpha · (R − mean of its group)

    For the loss −logprobs · A, without ratio, clip or KL. Unlike `group_advantages(scale="none")`, the size of a
    step does not depend on how many groups are valid.

    Args:
        rewards: As `gpg_alpha`.
        alpha_mode: As `gpg_alpha`.
        eps: As `gpg_alpha`.
        mask: As `gpg_alpha`.
        group_ids: As `gpg_alpha`.
        group_size: As `gpg_alpha`.

    Returns:
        The shape of `rewards`.

    Raises:
        ValueError: As `gpg_alpha`.

    Source: Chu et al. 2025, "GPG" (2504.02546).
    """
    group_ids = group_labels(group_ids, group_size, rewards=rewards)
    factor = gpg_alpha(rewards, alpha_mode=alpha_mode, eps=eps, mask=mask, group_ids=group_ids)
    return factor * group_advantages(rewards, scale="none", mask=mask, group_ids=group_ids)


def pass_at_k_advantages(
    rewards: ArrayLike,
    *,
    scale: PassAtKScale = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """The advantage that trains the best of a group's samples: only the best has one, its lead over the second.

        A_best = (R_best − R_second) / (std + eps);   0 for all others

    Two best samples have no lead, so that a group with two successes teaches nothing: pass@k with k the size of
    the group is served already. Unlike `group_advantages`, no sample is pushed down.

    Args:
        rewards: `[..., G]`, a group along the last axis; or any shape with `group_ids`.
        scale: "group": divided by the group's standard deviation; "none".
        ddof: 1 for the unbiased deviation, 0 for the population's.
        eps: Added to the deviation, outside the root.
        mask: Bool, of the shape of `rewards`: False for samples that could not be scored.
        group_ids: Labels of the shape of `rewards`; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        The shape of `rewards`; 0 in groups with fewer than two valid samples.

    Raises:
        ValueError: On unequal shapes or an unknown option.

    Source: Tang et al. 2025, "Optimizing language models for inference time objectives" (2503.19595); verl.
    """
    group_ids = group_labels(group_ids, group_size, rewards=rewards)
    check_choice("scale", scale, PassAtKScale)
    mask = mask_or_all(mask, rewards=rewards)
    rewards = fill_masked(rewards, mask)
    rank = group_rank(rewards, mask, group_ids)
    best, second = (group_total(rewards, mask & (rank == place), group_ids) for place in (0, 1))
    group = group_statistics(rewards, mask, group_ids)
    divisor = safe_sqrt(group.variance(ddof)) + eps if scale == "group" else 1.0
    leads = mask & (rank == 0) & ~group.is_constant
    return jnp.where(leads, safe_divide(best - second, divisor), 0.0)


def max_rl_advantages(
    rewards: ArrayLike,
    *,
    eps: float = 1e-6,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """MaxRL: centred rewards over the mean of their group, so that a prompt counts by how seldom it is solved.

        A = (R − mean of its group) / (mean of its group + eps)

    With rewards of 0 and 1 the mean is the share p̂ that is solved, and R / p̂ an estimate of ∇log p in place of ∇p:
    the likelihood of a success, as supervised learning maximises it, up to the order G in 1 − p. A prompt solved once
    in G weighs as much as one that is solved G times. Unlike `group_advantages`, which divides by a deviation that is
    small for easy and for hard prompts alike, only the hard ones gain weight.

    Args:
        rewards: `[..., G]`, a group along the last axis, not negative; or any shape with `group_ids`.
        eps: Added to the mean.
        mask: Bool, of the shape of `rewards`: False for samples that could not be scored.
        group_ids: Labels of the shape of `rewards`; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        The shape of `rewards`; exactly 0 where all of a group's rewards are equal, or their mean is not above 0.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Tajwar et al. 2026, "Maximum likelihood reinforcement learning" (2602.02710).
    """
    group_ids = group_labels(group_ids, group_size, rewards=rewards)
    mask = mask_or_all(mask, rewards=rewards)
    rewards = fill_masked(rewards, mask)
    group = group_statistics(rewards, mask, group_ids)
    divisor = jnp.where(group.mean > 0, group.mean + eps, 0.0)
    return jnp.where(mask & ~group.is_constant, safe_divide(rewards - group.mean, divisor), 0.0)
