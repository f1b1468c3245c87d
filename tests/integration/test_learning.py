"""Each algorithm family learns: from a fixed seed its reward rises on a task that it had not solved."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.presets import dapo, dr_grpo, grpo
from jaxrl_llm.algorithms.update import make_train_state, make_update_step
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.types import Rollout

STOP, WANTED, VOCABULARY, STEPS = 0, 5, 16, 60


def says_it_and_stops(rollout: Rollout) -> np.ndarray:
    """½ for a first token that is `WANTED`, ½ for stopping right after one token; `[P, G]`."""
    stops = (rollout.completion_lengths == 2) & rollout.finished
    return np.float32(0.5) * np.asarray(rollout.completion[..., 0] == WANTED) + np.float32(0.5) * np.asarray(stops)


@pytest.mark.parametrize("algorithm", [grpo(), dr_grpo(), dapo()], ids=["grpo", "dr_grpo", "dapo"])
def test_group_relative_policy_gradients_learn(algorithm, tiny_config):
    model = Transformer(tiny_config(vocab_size=VOCABULARY))
    settings = OptimizerConfig(learning_rate=4e-3)
    optimizer = make_optimizer(settings, make_schedule(settings, STEPS))
    state = make_train_state(jax.jit(model.init)(jax.random.key(0)), optimizer, seed=0)
    reference = jax.tree.map(lambda leaf: leaf.copy(), state.params) if algorithm.needs_reference else None
    sampler = Sampler(
        model, SamplingConfig(max_tokens=3), group=16, stop_tokens=(STOP,), mesh=make_mesh(devices=jax.devices()[:1])
    )
    update = jax.jit(make_update_step(model, optimizer, algorithm), donate_argnums=0)
    numbers, rewards = np.random.default_rng(0), []
    for step in range(STEPS):
        prompts = numbers.integers(1, VOCABULARY, (8, 3))
        rollout = sampler(state.params, prompts, numbers.integers(1, 4, 8), state.key, step)
        reward = says_it_and_stops(rollout)
        rewards.append(float(reward.mean()))
        state, _ = update(state, rollout, reward, reference)
    assert np.mean(rewards[:5]) < 0.2, rewards
    assert np.mean(rewards[-5:]) > 0.7, rewards
