"""Dynamic sampling (DAPO): prompts whose samples all have the same reward make room for others."""

from __future__ import annotations

import jax
import numpy as np

from jaxrl_llm.training.episodes.episodes import Episodes
from jaxrl_llm.types import Rollout


class GroupBuffer:
    """Collects groups whose rewards differ until there are enough for a step.

    Rewards are looked at as they come, before any penalty for length, which would make them differ by itself. What is
    left over once a step is full is dropped: it would be off-policy in the next.

    Args:
        wanted: groups of a step.
    """

    def __init__(self, wanted: int):
        self._wanted, self._seen = wanted, 0
        self._rollouts: list[Rollout] = []
        self._episodes: list[Episodes] = []
        self._mixed: list[np.ndarray] = []

    def add(self, rollout: Rollout, episodes: Episodes) -> bool:
        """Takes a batch in, as arrays on the host; whether there are enough groups now."""
        self._rollouts.append(rollout)
        self._episodes.append(episodes)
        lacks = np.isnan(episodes.rewards)
        most, least = (np.where(lacks, end, episodes.rewards) for end in (-np.inf, np.inf))
        self._mixed.append(most.max(axis=1) > least.min(axis=1))
        self._seen += len(episodes.rewards)
        return self._found >= self._wanted

    @property
    def _found(self) -> int:
        return int(sum(mixed.sum() for mixed in self._mixed))

    @property
    def kept_share(self) -> float:
        """Share of the groups seen whose rewards differ."""
        return self._found / self._seen

    def take(self) -> tuple[Rollout, Episodes]:
        """The first groups whose rewards differ; where they are too few, filled up with the first of the others.

        These have advantages of 0, or make no pair; at most denominators change. `frac_reward_zero_std` shows them.
        """
        mixed = np.concatenate(self._mixed)
        order = np.argsort(~mixed, kind="stable")[: self._wanted]
        rollout = jax.tree.map(lambda *parts: np.concatenate(parts)[order], *self._rollouts)
        return rollout, Episodes.joined(self._episodes).groups(order.tolist())
