"""The critic of PPO: a scalar head on the policy's trunk, or on a transformer of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from jaxrl_llm.algorithms.rounding import Rounding, optimizer_state
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.lora import split_trainable
from jaxrl_llm.types import CriticState


@dataclasses.dataclass(frozen=True)
class Critic:
    """A value function, and how it is trained."""

    model: ScoreModel
    """The transformer with its head."""
    optimizer: optax.GradientTransformation | None = None
    """Of a critic with parameters of its own; `None`: its head is among the policy's parameters, and is trained by one
    joint loss."""
    stop_gradient: bool = False
    """With a shared trunk, let only the head learn from the values."""
    rounding: Rounding = "master"
    """As `make_train_state`, for parameters of its own."""
    offload: bool = False
    """As `abstract_train_state`, for the state of its optimizer."""

    @property
    def shares_trunk(self) -> bool:
        """Whether the critic is a head on the policy's trunk."""
        return self.optimizer is None

    def start(self, params: Params | None, key: jax.Array) -> CriticState:
        """The state of a critic with parameters of its own before the first step; `key` is that of their rounding."""
        if self.optimizer is None or params is None:
            raise ValueError("a critic with an optimizer of its own needs parameters of its own: pass critic_params=")
        return CriticState(params, optimizer_state(split_trainable(params)[0], self.optimizer, self.rounding, key))

    def values(self, params: Params, texts: Any) -> jax.Array:
        """Vₜ of each completion token, `[P, G, Tc]`."""
        return self.model.values(params, texts)

    def values_of(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Vₜ from the states `[…, D]` that predict the tokens, where the trunk is shared."""
        return self.model.head(params, jax.lax.stop_gradient(hidden) if self.stop_gradient else hidden)[..., 0]
