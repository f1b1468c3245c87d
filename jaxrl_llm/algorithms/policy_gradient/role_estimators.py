"""Advantage estimators of one policy in several roles, which columns of the data name."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import advantages as functions
from jaxrl_llm.algorithms.interfaces import Advantage, Credit, Need, Signals
from jaxrl_llm.algorithms.policy_gradient.estimators import PREFIX
from jaxrl_llm.checks import below_one, check_fields
from jaxrl_llm.records import Mean, Metrics


@dataclasses.dataclass(frozen=True)
class OfRoles(Advantage):
    """Settings that estimators of several roles share."""

    roles: tuple[str, ...] = ("0", "1")
    """What the column holds, as text: each is a role."""
    role_column: str = "role"
    """Column of the data: the role that the prompt gives."""

    smallest_group = 1

    @property
    def needs(self) -> frozenset[Need]:
        """The roles."""
        return frozenset({"roles"})

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            PREFIX,
            self,
            roles=(len(set(self.roles)) == len(self.roles) > 0, "be at least one name, each of them once"),
        )

    def roles_of(self, signals: Signals) -> jax.Array:
        """The role of each sample, `[P, G]`."""
        return jnp.broadcast_to(jnp.asarray(signals.feedback.roles)[:, None], signals.rewards.shape)


@dataclasses.dataclass(frozen=True)
class RAEAdvantage(OfRoles):
    """A = R − running mean of what the same role got; see `jaxrl_llm.advantages.rae_advantages`."""

    decay: float = 0.95
    """Weight of the past, from one sample to the next."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        super().__post_init__()
        check_fields(PREFIX, self, decay=below_one(self.decay))

    def start(self) -> jax.Array:
        """The baselines before the first batch."""
        return jnp.zeros(len(self.roles), jnp.float32)

    def __call__(self, signals: Signals, memory: jax.Array) -> Credit:
        """Advantages `[P, G]`."""
        named = zip(self.roles, memory, strict=True)
        metrics: Metrics = {f"rae/baseline_{name}": Mean.of(value) for name, value in named}
        return Credit(self._estimate(signals, memory).advantages, metrics=metrics)

    def remember(self, signals: Signals, memory: jax.Array) -> jax.Array:
        """The baselines after the batch."""
        return self._estimate(signals, memory).baselines

    def _estimate(self, signals: Signals, memory: jax.Array) -> functions.RoleAdvantages:
        return functions.rae_advantages(signals.rewards, self.roles_of(signals), memory, decay=self.decay)


@dataclasses.dataclass(frozen=True)
class HierarchicalAdvantage(OfRoles):
    """A = R − mean of the peers, of one prompt or of one task; see `jaxrl_llm.advantages.hierarchical_advantages`.

    A prompt is an episode: its samples have one role. Those of the other roles are compared with the samples of all
    prompts of a step that are of the same task.
    """

    roles: tuple[str, ...] = ("proposer", "solver")
    episode_roles: tuple[str, ...] = ("solver",)
    """Roles whose samples are compared with those of the same prompt alone."""
    task_column: str = "task"
    """Column of the data: equal for prompts of one task."""

    @property
    def needs(self) -> frozenset[Need]:
        """Tasks as well."""
        return frozenset({"roles", "tasks"})

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        super().__post_init__()
        check_fields(
            PREFIX,
            self,
            episode_roles=(set(self.episode_roles) <= set(self.roles), f"be among the roles, {', '.join(self.roles)}"),
        )

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`."""
        shape = signals.rewards.shape
        return Credit(
            functions.hierarchical_advantages(
                signals.rewards,
                self.roles_of(signals),
                jnp.broadcast_to(jnp.arange(shape[0])[:, None], shape),
                jnp.broadcast_to(jnp.asarray(signals.feedback.tasks)[:, None], shape),
                episode_roles=[self.roles.index(name) for name in self.episode_roles],
            )
        )
