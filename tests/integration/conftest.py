"""The loop of the tests that let a small policy learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.algorithms.distillation.self_teacher import ITSELF
from jaxrl_llm.algorithms.distillation.step import make_distillation_step
from jaxrl_llm.algorithms.interfaces import Algorithm, Feedback
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient.critic import Critic
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.preference.online import OnlinePreference, make_online_preference_step
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh, replicated
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.types import Rollout

History = list[dict[str, float]]


def _only_rewards(algorithm: Algorithm, rollout: Rollout, rewards: np.ndarray, numbers: Any) -> np.ndarray:
    return rewards


def _train(
    algorithm: Algorithm,
    model: Transformer,
    *,
    reward: Callable[[Rollout], np.ndarray],
    feedback: Callable[..., Any] = _only_rewards,
    shares_trunk: bool = False,
    learning_rate: float = 4e-3,
    plan: UpdateConfig | None = None,
    steps: int = 60,
    seed: int = 0,
    params: Params | None = None,
    prompts: np.ndarray | None = None,
    group: int = 16,
    max_tokens: int = 3,
    stop_tokens: tuple[int, ...] = (0,),
    teachers: Mapping[str, tuple[Transformer, Params]] = MappingProxyType({}),
    **sampling: Any,
) -> History:
    """The metrics of each step; `reward` is that of the samples drawn before it.

    The prompts of every step are `prompts`, or eight random ones; `feedback` adds to the rewards what an algorithm
    reads beside them; `sampling` are settings of the sampler; training starts at a copy of `params`, or at random ones.
    Nothing is compiled twice.
    """
    settings = OptimizerConfig(learning_rate=learning_rate)
    optimizer = make_optimizer(settings, make_schedule(settings, steps))
    params = jax.jit(model.init)(jax.random.key(seed)) if params is None else jax.tree.map(jnp.copy, params)
    critic, critic_params = None, None
    if algorithm.needs_critic:
        scorer = ScoreModel(model, lm_head=shares_trunk)
        critic = Critic(scorer, None if shares_trunk else optimizer)
        if shares_trunk:
            params = scorer.from_trunk(params)
        else:
            critic_params = scorer.from_trunk(jax.tree.map(jnp.copy, params))
    mesh = make_mesh(devices=jax.devices()[:1])
    state = make_train_state(params, optimizer, seed, algorithm=algorithm, critic=critic, critic_params=critic_params)
    state = jax.device_put(state, replicated(mesh))  # where an update leaves it
    reference = jax.device_put(jax.tree.map(jnp.copy, params), replicated(mesh)) if algorithm.needs_reference else None
    sampler = Sampler(
        model,
        SamplingConfig(max_tokens=max_tokens, **sampling),
        group=group,
        stop_tokens=stop_tokens,
        mesh=mesh,
        greedy=algorithm.needs_greedy,
        keep_mask=algorithm.keeps_mask,
        keep_experts=algorithm.keeps_experts,
    )
    if isinstance(algorithm, OnlinePreference):
        step = make_online_preference_step(model, optimizer, algorithm, plan)
    elif isinstance(algorithm, Distillation):
        step = make_distillation_step(model, optimizer, algorithm, {n: m for n, (m, _) in teachers.items()}, plan)
        itself = {ITSELF: reference} if algorithm.needs_reference else {}
        reference = {name: params for name, (_, params) in teachers.items()} | itself
    else:
        step = make_update_step(model, optimizer, algorithm, plan, critic=critic)
    update = jax.jit(step, donate_argnums=0)
    numbers, history = np.random.default_rng(seed), []
    with CompilationCounter() as counter:
        for number in range(steps):
            if prompts is None:
                drawn = numbers.integers(1, model.config.vocab_size, (8, 3)), numbers.integers(1, 4, 8)
            else:
                drawn = prompts, np.full(len(prompts), prompts.shape[1])
            rollout = sampler(state.params, *drawn, state.key, number)
            rewards = reward(rollout)
            given = feedback(algorithm, rollout, rewards, numbers)
            if "reference_rewards" in algorithm.needs:
                given = Feedback(rewards, reference_rewards=reward(sampler(reference, *drawn, state.key ^ 1, number)))
            state, metrics = update(state, rollout, given, reference)
            history.append({name: float(value) for name, value in metrics.items() if not name.startswith("perf/")})
    assert counter.counts["sample"] == counter.counts["update_step"] == 1, counter.counts
    return history


@pytest.fixture(scope="session")
def train() -> Callable[..., History]:
    """Trains a policy; see `_train`."""
    return _train
