"""The programs of an on-policy run, jitted as they are run; what measures them beforehand takes them from here, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrl_llm.algorithms.iteration import DeviceReward, Iteration, make_device_scores, make_iteration
from jaxrl_llm.models.unrolling import compiler_options
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sharding import replicated
from jaxrl_llm.training.learner import Learner
from jaxrl_llm.types import TrainState


def update_program(learner: Learner, state: TrainState, mesh: Mesh) -> Any:
    """The update step: `(state, rollout, feedback, reference) -> (state, metrics)`, the state donated.

    Args:
        learner: what is learned with.
        state: abstract, with its shardings.
        mesh: the learner's.
    """
    return jax.jit(
        learner.step,
        donate_argnums=0,
        out_shardings=(_placed(state), replicated(mesh)),
        compiler_options=compiler_options(learner.policy.config, mesh),
    )


def score_program(rewards: Sequence[DeviceReward], mesh: Mesh) -> Any:
    """Scores of rewards that are JAX functions, where others are not: `(params of each, rollout) -> DeviceScores`."""
    return jax.jit(make_device_scores(rewards), out_shardings=replicated(mesh))


def iteration_program(
    learner: Learner, state: TrainState, sampler: Sampler, rewards: Sequence[DeviceReward], prompts: int
) -> Any:
    """A whole iteration where nothing waits for the host, as `make_iteration` has it, the state donated.

    Args:
        learner: what is learned with.
        state: abstract, with its shardings.
        sampler: of its completions.
        rewards: all that there are.
        prompts: P.
    """
    whole = replicated(sampler.mesh)
    out: Any = (_placed(state), whole, sampler.shardings(prompts), whole)
    return jax.jit(
        make_iteration(sampler, rewards, learner.step),
        donate_argnums=0,
        out_shardings=Iteration(*out),
        compiler_options=compiler_options(learner.policy.config, sampler.mesh),
    )


def _placed(state: TrainState) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, state)
