"""What an on-policy run learns with: the update step, the state that it changes, and what both are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import optax

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.algorithms.distillation.step import make_distillation_step
from jaxrl_llm.algorithms.interfaces import Algorithm
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient.credit_assignment import NOTHING, Observed
from jaxrl_llm.algorithms.policy_gradient.critic import Critic
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.update import UpdateStep, make_update_step
from jaxrl_llm.algorithms.preference.online import OnlinePreference, make_online_preference_step
from jaxrl_llm.algorithms.rounding import Rounding
from jaxrl_llm.algorithms.state import abstract_train_state, make_train_state
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig, make_trust_region_step
from jaxrl_llm.checks import changes
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.types import TrainState


@dataclasses.dataclass(frozen=True)
class CriticSource:
    """The critic of an algorithm that is made of one (PPO)."""

    shares_trunk: bool = False
    """A head on the policy's last state, trained by one joint loss; else a transformer of its own."""
    stop_gradient: bool = False
    """With a shared trunk, let only the head learn from the values."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """Of a critic of its own."""

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        if self.shares_trunk:
            return {"optimizer": "the policy's trains a critic on its trunk; leave critic.shares_trunk out"}
        return {"stop_gradient": "a critic of its own has no part in the policy; set critic.shares_trunk, too"}

    def critic_of(self, policy: Transformer, optimizer_steps: int) -> Critic:
        """The critic of a policy that is trained for so many optimizer steps."""
        model = ScoreModel(policy, lm_head=self.shares_trunk)
        if self.shares_trunk:
            return Critic(model, stop_gradient=self.stop_gradient)
        rule = make_optimizer(self.optimizer, make_schedule(self.optimizer, optimizer_steps))
        return Critic(model, rule, rounding=self.optimizer.rounding, offload=self.optimizer.offload)


@dataclasses.dataclass(frozen=True, eq=False)  # compared as what it is: a step is a function
class Learner:
    """An update step with its parts, and the state that it starts from."""

    policy: Transformer
    algorithm: Algorithm
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    """The optimizer's learning rate, by its own steps."""
    critic: Critic | None
    step: UpdateStep
    """Pure, still to be compiled."""
    rounding: Rounding
    """Of the policy's parameters."""
    offload: bool
    """Whether the optimizer's state lies in the host's memory."""

    def start(self, params: Params, critic_params: Params | None, seed: int) -> TrainState:
        """The state before the first step; a critic without parameters starts from the policy's, with a new head."""
        critic = self.critic
        if critic is not None and critic.shares_trunk:
            params = critic.model.from_trunk(params)
        elif critic is not None and critic_params is None:
            critic_params = critic.model.from_trunk(params)
        return make_train_state(
            params,
            self.optimizer,
            seed,
            algorithm=self.algorithm,
            critic=critic,
            critic_params=critic_params,
            rounding=self.rounding,
        )

    def abstract_state(self, mesh: jax.sharding.Mesh) -> TrainState:
        """Shapes, types and shardings of the state."""
        return abstract_train_state(
            self.policy,
            self.optimizer,
            mesh,
            algorithm=self.algorithm,
            critic=self.critic,
            rounding=self.rounding,
            offload=self.offload,
        )


def check_group(algorithm: Algorithm, samples: int) -> None:
    """Checks that so many samples of each prompt can teach an algorithm anything.

    Raises:
        ValueError: it compares a sample with others, and there are none.
    """
    if samples < (least := algorithm.smallest_group):
        raise ValueError(
            f"training.samples_per_prompt={samples} cannot learn: {algorithm.reader} compares a "
            f"sample with the others of its prompt; pass --training.samples-per-prompt={least} or more"
        )


def check_critic(algorithm: Algorithm, critic: CriticSource) -> None:
    """Checks that there are no settings of a critic where there is none.

    Raises:
        ValueError: names one.
    """
    if not algorithm.needs_critic:
        for path, value in changes(critic, CriticSource(), "critic"):
            raise ValueError(f"{path}={value!r} would have no effect: {algorithm.reader} has no critic; PPO has one")


def make_learner(
    policy: Transformer,
    algorithm: Algorithm,
    *,
    iterations: int,
    plan: UpdateConfig,
    optimizer: OptimizerConfig,
    sampling: SamplingConfig,
    critic: CriticSource,
    trust_region: TrustRegionConfig | None,
    teachers: Mapping[str, Transformer] = MappingProxyType({}),
    observed: Observed = NOTHING,
) -> Learner:
    """The learner of a run of so many iterations.

    Args:
        policy: the model.
        algorithm: the objective.
        iterations: length of the run.
        plan: epochs, minibatches, micro-batches.
        optimizer: of the policy; with a trust region only its rounding is used.
        sampling: how rollouts are drawn.
        critic: the value function, if the algorithm is made of one.
        trust_region: TRPO's step in place of the optimizer's.
        teachers: models by name, where the algorithm learns from some.
        observed: of which completions the step tells what it made, as `make_update_step`.

    Raises:
        ValueError: these do not fit together.
        TypeError: the algorithm is of a type that has no step.
    """
    if trust_region is not None and plan.optimizer_steps > 1:
        raise ValueError(
            f"update.epochs={plan.epochs} and update.minibatches={plan.minibatches} would have no effect: a trust "
            "region makes one step of a batch; pass 1"
        )
    if isinstance(algorithm, PolicyGradient):
        algorithm.check_width(sampling.max_tokens)
    total = iterations * plan.optimizer_steps
    if total >= 2**31:
        raise ValueError(
            f"training.steps={iterations} × {plan.optimizer_steps} optimizer steps are more than counters hold"
        )
    schedule = make_schedule(optimizer, total)
    rule = make_optimizer(optimizer, schedule)
    value_function = critic.critic_of(policy, total) if algorithm.needs_critic else None
    drawn: dict[str, Any] = {"temperature": sampling.temperature, "truncated": sampling.truncates, "observed": observed}
    match algorithm:
        case PolicyGradient() if trust_region is None:
            step = make_update_step(policy, rule, algorithm, plan, critic=value_function, **drawn)
        case PolicyGradient() if optimizer.rounding == "stochastic":
            raise ValueError(
                "optimizer.rounding='stochastic' would move the policy from where the trust region was measured: "
                "pass --optimizer.rounding=master"
            )
        case PolicyGradient() if optimizer.offload:
            raise ValueError(
                "optimizer.offload=True would have no effect: a trust region has no moments; pass "
                "--optimizer.no-offload"
            )
        case PolicyGradient() if policy.config.batch_invariant:
            raise ValueError(
                "model.batch_invariant=True does not go with a trust region, which takes derivatives of derivatives: "
                "leave it out"
            )
        case PolicyGradient() if algorithm.keeps_mask:
            raise ValueError(
                "algorithm.keep_sampling_mask=True does not go with a trust region, whose divergence is over all "
                "tokens: leave it out"
            )
        case PolicyGradient() if algorithm.watches_router:
            raise ValueError(
                f"algorithm.routing={algorithm.routing!r} and algorithm.router={algorithm.router} do not go with a "
                "trust region: leave them out"
            )
        case PolicyGradient():
            rule = optax.identity()
            step = make_trust_region_step(policy, algorithm, trust_region, plan=plan.of_minibatch, **drawn)
        case OnlinePreference() | Distillation() if trust_region is not None:
            raise ValueError(f"{algorithm.reader} has no surrogate that a trust region could bound")
        case OnlinePreference() if sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 gives equal samples, of which no pair can be made")
        case OnlinePreference():
            step = make_online_preference_step(policy, rule, algorithm, plan)
        case Distillation():
            given, temperature = dict(teachers), sampling.temperature
            step = make_distillation_step(policy, rule, algorithm, given, plan, temperature=temperature)
        case _:
            raise TypeError(f"no update step is known for an algorithm of type {type(algorithm).__name__}")
    if algorithm.keeps_mask:
        sampling.check_keeps_mask()
    return Learner(policy, algorithm, rule, schedule, value_function, step, optimizer.rounding, optimizer.offload)
