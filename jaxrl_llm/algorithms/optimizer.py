"""The optimizer: AdamW behind a clipped gradient norm, with a learning-rate schedule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm.algorithms.leafwise import Leafwise
from jaxrl_llm.algorithms.rounding import Rounding
from jaxrl_llm.models.lora import ADAPTERS

ScheduleShape = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019)."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: ScheduleShape = "constant"
    """Shape after the warm-up: constant, or falling to 0 at the last step, linearly or as a cosine."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly; the first has peak / (steps + 1). A shape that
    falls needs a run that is longer; a constant one may be cut in the middle of its rise."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (not on biases and norms); of adapters, on A and B."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float | None = 1.0
    """Bound on the gradient's global norm; `None` for none."""
    rounding: Rounding = "master"
    """What small updates do to parameters that are stored in bfloat16. master: they add up in a float32 copy in the
    optimizer's state (4 bytes a parameter), and what is stored is that copy, rounded. stochastic: parameters are
    rounded up or down at random, right on average, without a copy. nearest: updates below half a parameter's last
    place are lost, which at 1e-6 are nearly all. Parameters in float32 are not rounded."""
    offload: bool = False
    """Keep the optimizer's state (moments, and the float32 copy of `rounding`) in the host's memory, and have on the
    devices that of one parameter at a time, while it is updated: 8 to 12 bytes a parameter less there, for which as
    many are moved forth and back in each step."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        if self.schedule not in get_args(ScheduleShape):
            raise ValueError(f"optimizer.schedule={self.schedule!r} is not one of {get_args(ScheduleShape)}")
        if self.rounding not in get_args(Rounding):
            raise ValueError(f"optimizer.rounding={self.rounding!r} is not one of {get_args(Rounding)}")
        # Conditions that hold, so that NaN is refused, too.
        for fields, holds, wanted in (
            (("learning_rate", "warmup_steps", "weight_decay"), lambda x: 0 <= x < math.inf, "not be negative"),
            (("b1", "b2"), lambda x: 0 <= x < 1, "be at least 0 and below 1"),
            (("eps",), lambda x: 0 < x < math.inf, "be positive"),
            (("max_grad_norm",), lambda x: x is None or x > 0, "be positive, or None"),
        ):
            for field in fields:
                if not holds(value := getattr(self, field)):
                    raise ValueError(f"optimizer.{field}={value} must {wanted}")


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of optimizer steps made.

    Raises:
        ValueError: the warm-up leaves no step in which the rate could fall.
    """
    rest = total_steps - config.warmup_steps
    if config.schedule != "constant" and config.warmup_steps and rest <= 0:
        raise ValueError(
            f"optimizer.warmup_steps={config.warmup_steps} leaves nothing of {total_steps} optimizer steps for "
            f"optimizer.schedule={config.schedule} to fall in: shorten the warm-up, or choose constant"
        )
    peak = config.learning_rate
    shapes = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(1, rest)),
    }
    after = shapes[config.schedule]()
    if not config.warmup_steps:
        return after
    # The first step already moves: step i of the warm-up has the rate (i + 1)/(steps + 1).
    first = peak / (config.warmup_steps + 1)
    return optax.join_schedules([optax.linear_schedule(first, peak, config.warmup_steps), after], [config.warmup_steps])


class Rates:
    """The learning rates of a schedule by the number of steps made, computed some thousand at a time."""

    _BLOCK = 4096

    def __init__(self, schedule: optax.Schedule):
        self._program = jax.jit(jax.vmap(schedule))
        self._number, self._rates = 0, self._block(0)  # compiled now, not in the middle of a run

    def __getitem__(self, step: int) -> float:
        """The rate after so many steps."""
        number, place = divmod(step, self._BLOCK)
        if number != self._number:
            self._number, self._rates = number, self._block(number)
        return float(self._rates[place])

    def _block(self, number: int) -> np.ndarray:
        return np.asarray(self._program(number * self._BLOCK + np.arange(self._BLOCK)))


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> Leafwise:
    """The gradient transformation of `config`."""
    adam = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=_weights_only
    )
    if config.max_grad_norm is not None:
        adam = optax.chain(_clip(config.max_grad_norm), adam)
    return Leafwise(*optax.with_extra_args_support(adam))


def _clip(bound: float) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm of the gradient, which is given where the gradient is one parameter's."""

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_norm: jax.Array | None = None, **_: Any
    ) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        factor = jnp.where(norm < bound, 1.0, bound / norm)
        return jax.tree.map(lambda g: factor * g, updates), state

    return optax.GradientTransformationExtraArgs(optax.identity().init, update)


def _weights_only(params: Any) -> Any:
    """Marks what decays: weights and adapters; rank does not tell, since stacked biases are matrices, too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("weight", *ADAPTERS), params)
