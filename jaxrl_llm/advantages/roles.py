"""Advantages where one policy plays several roles, whose rewards are of different scales: RAE, hierarchical GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.group import group_advantages
from jaxrl_llm.masking import as_float, check_same_shape, fill_masked, mask_or_all


class RoleAdvantages(NamedTuple):
    """What `rae_advantages` returns."""

    advantages: Array
    """Of the shape of the rewards."""
    baselines: Array
    """`[K]`: those that the next batch begins with."""


def rae_advantages(
    rewards: ArrayLike,
    roles: ArrayLike,
    baselines: ArrayLike,
    *,
    decay: float = 0.95,
    mask: ArrayLike | None = None,
) -> RoleAdvantages:
    """Role-conditioned advantage estimation: rewards minus a running mean of what the same role got before.

        A = R − b[role],  then  b[role] ← decay b[role] + (1 − decay) R        sample after sample

    In a game of two roles the rewards of a group say who sits better, not who plays better: with a baseline for each
    role, A is what was gained over that role's usual result. A sample is no part of its own baseline. The baselines are
    state that a checkpoint holds; they start at 0. Unlike `EmaBaseline`, which is one number for all and moves once a
    batch, there are K of them, and each sample moves its own.

    Args:
        rewards: Of the samples, any shape; in the order of the flat array one after the other.
        roles: Integers in [0, K), of the shape of `rewards`.
        baselines: b, `[K]`.
        decay: Weight of the past, in [0, 1).
        mask: Bool, of the shape of `rewards`: False for samples that could not be scored, which have advantage 0 and
            move no baseline.

    Returns:
        Advantages and the baselines after the batch, float32.

    Raises:
        ValueError: On unequal shapes, a mask that is not bool, or a decay outside [0, 1).

    Source: Liu et al. 2025, "SPIRAL" (2506.24119); the order within a batch as in prime-rl.
    """
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}: it must be in [0, 1)")
    check_same_shape(rewards=rewards, roles=roles)
    mask = mask_or_all(mask, rewards=rewards)

    def of_sample(held: Array, sample: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        reward, role, valid = sample
        own = held[role]
        moved = held.at[role].set(jnp.where(valid, decay * own + (1 - decay) * reward, own))
        return moved, jnp.where(valid, reward - own, 0.0)

    samples = fill_masked(rewards, mask).ravel(), jnp.ravel(roles), mask.ravel()
    after, advantages = jax.lax.scan(of_sample, as_float(baselines), samples)
    return RoleAdvantages(advantages.reshape(mask.shape), after)


def hierarchical_advantages(
    rewards: ArrayLike,
    roles: ArrayLike,
    episodes: ArrayLike,
    tasks: ArrayLike,
    *,
    episode_roles: Sequence[int],
    mask: ArrayLike | None = None,
) -> Array:
    """Hierarchical GRPO: each sample minus the mean of its peers: of the same role, in one episode or task.

        A = R − mean of the samples of its role in its episode        roles of episode_roles
        A = R − mean of the samples of its role in its task           all others

    For a proposer of problems and solvers of them: solvers of one problem are compared with each other, proposals with
    the other proposals of the same task, so that neither the difficulty of a problem nor the role passes for merit.
    Unlike `group_advantages(scale="none")`, whose groups are given, groups follow from who did what.

    Args:
        rewards: Of the samples, any shape.
        roles: Integers of the shape of `rewards`.
        episodes: Labels of the shape of `rewards`: samples of one episode (one proposed problem) have equal ones.
        tasks: Labels of the shape of `rewards`: episodes of one task have equal ones.
        episode_roles: Roles that are compared within an episode alone.
        mask: Bool, of the shape of `rewards`: False for samples that could not be scored.

    Returns:
        The shape of `rewards`; 0 for a sample without peers, and where masked.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: prime-rl, "hierarchical_grpo" (2026).
    """
    check_same_shape(rewards=rewards, roles=roles)
    check_same_shape(rewards=rewards, episodes=episodes)
    check_same_shape(rewards=rewards, tasks=tasks)
    roles, episodes, tasks = (jnp.asarray(x) for x in (roles, episodes, tasks))
    within = jnp.isin(roles, jnp.asarray(tuple(episode_roles), roles.dtype))
    keys = jnp.stack([roles, tasks, jnp.where(within, episodes, 0)], axis=-1).reshape(-1, 3)
    _, labels = jnp.unique(keys, axis=0, return_inverse=True, size=len(keys))
    return group_advantages(rewards, scale="none", mask=mask, group_ids=labels.reshape(roles.shape))
