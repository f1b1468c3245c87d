"""Advantages from the entropies of the policy: GTPO and GRPO-S."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import advantages as functions
from jaxrl_llm.advantages import EntropyNorm
from jaxrl_llm.algorithms.interfaces import Advantage, Credit, Need, Signals
from jaxrl_llm.algorithms.policy_gradient.estimators import PREFIX
from jaxrl_llm.checks import check_fields, finite, not_negative, one_of


@dataclasses.dataclass(frozen=True)
class EntropyAdvantage(Advantage):
    """Settings that GTPO and GRPO-S share: rewards of successes and failures shaped by the policy's entropy."""

    success_weight: float = 1.0
    """Weight of the outcome."""
    entropy_weight: float = 0.1
    """Weight of the entropy's share."""
    success_reward: float = 1.0
    """Reward from which on a completion is a success, whatever its length is punished with."""
    shape_failures: bool = True
    """Whether failures are shaped, too."""
    norm: EntropyNorm = "joint"
    """Whether successes and failures are normalised together or apart ("separate"), as published for GTPO: then half of
    the tokens of successes are pushed down, and the policy forgets what it knew."""
    mixed_groups_only: bool = True
    """Whether a group of successes alone, or of failures alone, has no advantages: DAPO's dynamic sampling, on which
    the paper builds, leaves such groups out, and normalised they would reward entropy and nothing else."""

    @property
    def needs(self) -> frozenset[Need]:
        """Entropies of the policy."""
        return frozenset({"entropy"})

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            PREFIX,
            self,
            success_weight=not_negative(self.success_weight),
            entropy_weight=not_negative(self.entropy_weight),
            success_reward=finite(self.success_reward),
            norm=one_of(self.norm, EntropyNorm),
        )

    def _credit(self, function: Callable[..., jax.Array], signals: Signals) -> Credit:
        won = signals.outcomes >= self.success_reward
        advantages = function(
            signals.entropy,
            won,
            signals.mask,
            success_weight=self.success_weight,
            entropy_weight=self.entropy_weight,
            shape_failures=self.shape_failures,
            norm=self.norm,
            added=signals.rewards - signals.outcomes,
        )
        if self.mixed_groups_only:
            mixed = jnp.any(won, axis=1) & ~jnp.all(won, axis=1)
            advantages = jnp.where(mixed.reshape(-1, *(1,) * (advantages.ndim - 1)), advantages, 0.0)
        return Credit(advantages)


@dataclasses.dataclass(frozen=True)
class GTPOAdvantage(EntropyAdvantage):
    """One advantage a token, from entropy-shaped rewards; see `jaxrl_llm.advantages.gtpo_advantages`."""

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G, Tc]`."""
        return self._credit(functions.gtpo_advantages, signals)


@dataclasses.dataclass(frozen=True)
class GRPOSAdvantage(EntropyAdvantage):
    """One advantage a completion, by its mean entropy; see `jaxrl_llm.advantages.grpo_s_advantages`."""

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`."""
        return self._credit(functions.grpo_s_advantages, signals)
