"""What an estimator remembers outlives a batch that is not finite, on every path that makes a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.iteration import DeviceReward, make_iteration
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.critic import Critic
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig, make_trust_region_step
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.types import Rollout, TrainState

REWARDS = np.random.default_rng(5).random((4, 4)).astype(np.float32)
SGD = optax.sgd(0.1)


def spoiled(bad: float) -> np.ndarray:
    rewards = REWARDS.copy()
    rewards[2, 1] = bad
    return rewards


def assert_recovers(step: Any, state: TrainState, good: Any, bad: Any) -> None:
    """A good step, a bad one that leaves the memory as it is, and a good one that learns again."""
    before, _ = step(state, *good)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before.memory, state.memory)), strict=True))
    after, metrics = step(before, *bad)
    chex.assert_trees_all_equal(after.memory, before.memory)
    assert metrics["frac_steps_skipped"] == 1
    again, metrics = step(after, *good)
    assert metrics["frac_steps_skipped"] == 0
    chex.assert_tree_all_finite((again.memory, again.params))
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), again.params, after.params)
    assert max(jax.tree.leaves(moved)) > 1e-6


@pytest.mark.parametrize(("preset", "bad"), [(presets.reinforce, np.nan), (presets.ha_dw, np.nan)])
def test_a_bad_reward_is_not_remembered(preset, bad, tiny_config, lively_params, make_rollout):
    model, algorithm, rollout = Transformer(tiny_config()), preset(), make_rollout()
    step = jax.jit(make_update_step(model, SGD, algorithm))
    state = make_train_state(lively_params(model), SGD, 0, algorithm=algorithm)
    assert_recovers(step, state, (rollout, REWARDS), (rollout, spoiled(bad)))


def test_an_infinite_reward_is_not_remembered_by_a_trust_region(tiny_config, lively_params, make_rollout):
    algorithm = dataclasses.replace(presets.reinforce(), surrogate=presets.dapo().surrogate)
    model, rollout = Transformer(tiny_config()), make_rollout()
    region = TrustRegionConfig(cg_iterations=2, tries=4)
    step = jax.jit(make_trust_region_step(model, algorithm, region))
    state = make_train_state(lively_params(model), optax.identity(), 0, algorithm=algorithm)
    assert_recovers(step, state, (rollout, REWARDS), (rollout, spoiled(np.inf)))


def test_a_kl_that_is_not_finite_is_not_remembered_by_its_controller(tiny_config, lively_params, make_rollout):
    advantage = dataclasses.replace(presets.ppo().advantage, kl_target=0.1, kl_horizon=20.0)
    algorithm = dataclasses.replace(presets.ppo(), advantage=advantage)
    model, rollout = Transformer(tiny_config()), make_rollout()
    critic = Critic(ScoreModel(model, lm_head=True))
    params = lively_params(model)
    reference = jax.tree.map(lambda x: x * 1.05, params)
    broken = reference | {"final_norm": {"scale": jnp.full_like(params["final_norm"]["scale"], np.nan)}}
    step = jax.jit(make_update_step(model, SGD, algorithm, critic=critic))
    start = critic.model.from_trunk(params)
    state = make_train_state(start, SGD, 0, algorithm=algorithm, critic=critic)
    assert_recovers(step, state, (rollout, REWARDS, reference), (rollout, REWARDS, broken))


def test_a_bad_device_reward_is_not_remembered_by_a_fused_iteration(tiny_config, lively_params):
    def reward(params: Any, rollout: Rollout) -> jax.Array:
        return rollout.completion_lengths * params["scale"]

    model, algorithm = Transformer(tiny_config()), presets.reinforce()
    sampler = Sampler(
        model,
        SamplingConfig(max_tokens=4),
        group=4,
        stop_tokens=(1, 2, 3, 4),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
    )
    update_step = make_update_step(model, SGD, algorithm)
    iteration = make_iteration(sampler, [DeviceReward("length", reward)], update_step)
    prompt = np.random.default_rng(0).integers(0, 64, (4, 5)).astype(np.int32)

    @jax.jit
    def step(state: TrainState, scale: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        done = iteration(state, prompt, np.full(4, 5, np.int32), [{"scale": scale}])
        return done.state, done.metrics

    state = make_train_state(lively_params(model), SGD, 0, algorithm=algorithm)
    assert_recovers(step, state, (np.float32(1.0),), (np.float32(np.nan),))
