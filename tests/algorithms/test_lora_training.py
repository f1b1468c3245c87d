"""Training with adapters: what moves and what does not, the reference without a copy, the sampler, learning."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches, UpdateConfig
from jaxrl_llm.algorithms.gradient import Loss, make_gradient_step
from jaxrl_llm.algorithms.offline import make_offline_step
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient.presets import grpo
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.rounding import widen
from jaxrl_llm.algorithms.state import abstract_train_state, make_train_state
from jaxrl_llm.algorithms.supervised import Demonstrations, SupervisedObjective
from jaxrl_llm.models.config import LoraConfig, ModelConfig, Params
from jaxrl_llm.models.lora import add_adapters, merge_adapters, split_adapters, split_trainable, without_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Metrics
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh, replicated
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.types import Rollout, TrainState

OPTIMIZER = optax.adamw(1e-2, weight_decay=0.1)
REWARDS = np.random.default_rng(5).normal(size=(4, 4)).astype(np.float32)
PLAN = UpdateConfig(minibatches=2, micro_batches=2)


@functools.cache
def compiled_step(model: Transformer, plan: UpdateConfig) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    return jax.jit(make_update_step(model, OPTIMIZER, grpo(), plan), donate_argnums=0)


@pytest.fixture(scope="module")
def model(tiny_config: Callable[..., ModelConfig]) -> Transformer:
    return Transformer(tiny_config(lora=LoraConfig(rank=4)))


@pytest.fixture(scope="module")
def params(model: Transformer, lively_params: Callable[..., Params]) -> Params:
    return jax.tree.map(lambda leaf: 0.3 * leaf, lively_params(model))


def copied(tree: Any) -> Any:
    return jax.tree.map(jnp.array, tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_adapters_move(model, params, make_rollout, dtype):
    """Bit by bit, through minibatches, micro-batches, weight decay and donation; with both types of the base."""
    model = Transformer(dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype))
    params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, model.abstract_params())
    adapters, base = split_adapters(params)
    state = make_train_state(copied(params), OPTIMIZER, 0)
    moments = jax.tree.leaves(state.opt_state[0].mu)
    assert [leaf.shape for leaf in moments] == [leaf.shape for leaf in jax.tree.leaves(adapters)]
    after, metrics = compiled_step(model, PLAN)(state, make_rollout(), REWARDS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    moved, still = split_adapters(after.params)
    chex.assert_trees_all_equal(still, base)
    for leaf, old, new in zip(moments, jax.tree.leaves(adapters), jax.tree.leaves(moved), strict=True):
        assert leaf.dtype == new.dtype == jnp.float32
        assert not np.any(np.asarray(old) == np.asarray(new))
    assert metrics["grad_norm"] > 0


def test_the_reference_is_the_base_without_a_copy(model, params, make_rollout):
    step, rollout = compiled_step(model, UpdateConfig()), make_rollout()
    given, expected = step(make_train_state(copied(params), OPTIMIZER, 0), rollout, REWARDS, without_adapters(params))
    own, metrics = step(make_train_state(copied(params), OPTIMIZER, 0), rollout, REWARDS)
    assert expected["kl"] > 1e-3
    chex.assert_trees_all_equal((own, metrics), (given, expected))
    base = without_adapters(params)
    with pytest.raises(ValueError, match="reads a reference"):
        jax.eval_shape(step, make_train_state(base, OPTIMIZER, 0), rollout, REWARDS)


def test_gradient_norm_is_that_of_what_is_trained():
    """Of Σ (w + a·b + h)², whose gradient in each of its parts is 2 (w + a·b + h) times what stands beside it."""
    leaf = {"weight": jnp.float32(3), "lora_a": jnp.float32(2), "lora_b": jnp.float32(0.5)}
    params = {"layers": {"x": leaf}, "value_head": {"weight": jnp.float32(1)}, "embed": {"weight": jnp.float32(7)}}

    def loss(params: Params, rows: Any, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
        x = params["layers"]["x"]
        total = x["weight"] + x["lora_a"] * x["lora_b"] + params["value_head"]["weight"] + params["embed"]["weight"]
        return jnp.sum(rows * total**2), {}

    optimizer = optax.sgd(0.01)
    step = make_gradient_step(Loss(lambda params, texts: params, loss), optimizer, MicroBatches())
    carry = (params, optimizer.init(widen(split_trainable(params)[0])))
    (after, _), metrics = step(carry, jnp.ones(1), jnp.float32(1))
    assert float(metrics["grad_norm"].value()) == pytest.approx(24 * np.sqrt(0.5**2 + 2**2 + 1))
    expected = {"weight": 3.0, "lora_a": 2 - 0.12, "lora_b": 0.5 - 0.48}
    assert jax.tree.map(float, after["layers"]["x"]) == pytest.approx(expected)
    assert float(after["value_head"]["weight"]) == pytest.approx(1 - 0.24)
    assert after["embed"] == params["embed"]


def test_eight_devices_train_as_one_does(model, params, make_rollout, mesh_config):
    rollout, mesh = make_rollout(), make_mesh(mesh_config)
    alone, expected = compiled_step(model, UpdateConfig())(
        make_train_state(copied(params), OPTIMIZER, 0), rollout, REWARDS
    )
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_train_state(model, OPTIMIZER, mesh))
    step = jax.jit(
        make_update_step(model, OPTIMIZER, grpo()), donate_argnums=0, out_shardings=(placed, replicated(mesh))
    )
    with jax.set_mesh(mesh), CompilationCounter() as counter:
        state = jax.jit(lambda p: make_train_state(p, OPTIMIZER, 0), out_shardings=placed)(params)
        state, metrics = step(state, rollout, REWARDS)
        moments = jax.device_get(state.opt_state[0].mu)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == placed
        jax.block_until_ready(step(state, rollout, REWARDS))
        assert counter.counts["update_step"] == 1
    chex.assert_tree_all_finite(moments)  # a comparison takes two NaNs for equal
    chex.assert_trees_all_close(moments, alone.opt_state[0].mu, rtol=0, atol=1e-5)
    ours = {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}
    alone = {name: float(value) for name, value in expected.items() if not name.startswith("perf/")}
    assert ours == pytest.approx(alone, rel=1e-3, abs=1e-4)


def test_the_sampler_draws_from_the_merged_model(model, params):
    prompts, lengths = np.random.default_rng(0).integers(1, 64, (4, 5)), np.array([5, 3, 1, 4])
    key = np.asarray(jax.random.key_data(jax.random.key(1)))
    settings = {"group": 3, "stop_tokens": (0,), "mesh": make_mesh(MeshConfig(), jax.devices()[:1])}
    config = SamplingConfig(max_tokens=6)
    ours = Sampler(model, config, **settings)({**params, "value_head": {"weight": REWARDS}}, prompts, lengths, key, 1)
    plain = Sampler(model.base, config, **settings)
    merged = plain(merge_adapters(params, model.config), prompts, lengths, key, 1)
    np.testing.assert_array_equal(ours.completion, merged.completion)
    np.testing.assert_allclose(ours.logprobs, merged.logprobs, atol=1e-5)
    base = plain(without_adapters(params), prompts, lengths, key, 1)
    assert not np.array_equal(ours.completion, base.completion)


# ---- Learning ------------------------------------------------------------------------------------

STOP, WANTED, VOCABULARY = 0, 5, 16


@pytest.fixture
def fresh(lively_params: Callable[..., Params]) -> Callable[..., TrainState]:
    """The state of fresh adapters beside a base whose head has something to say: from `init` its logits are near 0."""

    def start(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
        params = add_adapters(lively_params(model.base), model, jax.random.key(0))
        return make_train_state(params, optimizer, seed=0)

    return start


def test_grpo_learns_with_adapters(tiny_config, fresh):
    """With the KL term to the base, of which there is no copy; no weight of the base moves."""
    model, steps = Transformer(tiny_config(vocab_size=VOCABULARY, lora=LoraConfig(rank=4, alpha=32.0))), 15
    settings = OptimizerConfig(learning_rate=2e-2)
    optimizer = make_optimizer(settings, make_schedule(settings, steps))
    state = fresh(model, optimizer)
    base = jax.device_get(without_adapters(state.params))
    sampler = Sampler(
        model, SamplingConfig(max_tokens=3), group=16, stop_tokens=(STOP,), mesh=make_mesh(devices=jax.devices()[:1])
    )
    update = jax.jit(make_update_step(model, optimizer, grpo()), donate_argnums=0)

    def reward(rollout: Rollout) -> np.ndarray:
        return (np.asarray(rollout.completion[..., 0]) == WANTED).astype(np.float32)

    numbers, rewards = np.random.default_rng(0), []
    for step in range(steps):
        prompts = numbers.integers(1, VOCABULARY, (8, 3))
        rollout = sampler(state.params, prompts, numbers.integers(1, 4, 8), state.key, step)
        rewards.append(float(reward(rollout).mean()))
        state, _ = update(state, rollout, reward(rollout))
    assert rewards[0] < 0.1, rewards
    assert np.mean(rewards[-3:]) > 0.8, rewards
    chex.assert_trees_all_equal(without_adapters(state.params), base)


def test_supervised_training_learns_with_adapters(tiny_config, fresh):
    """To repeat the prompt's last token: attention must be learned, so that a bias of the output would not do."""
    model, steps = Transformer(tiny_config(vocab_size=VOCABULARY, lora=LoraConfig(rank=8, alpha=32.0))), 60
    settings = OptimizerConfig(learning_rate=1e-2)
    optimizer = make_optimizer(settings, make_schedule(settings, steps))
    step = jax.jit(make_offline_step(model, optimizer, SupervisedObjective()), donate_argnums=0)
    state, numbers, losses = fresh(model, optimizer), np.random.default_rng(0), []
    for _ in range(steps):
        prompt = numbers.integers(1, VOCABULARY, (16, 3))
        completion = np.repeat(prompt[:, None, -1:], 2, axis=2)
        rows = Demonstrations(prompt, np.full(16, 3), completion, np.ones(completion.shape, bool))
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2.5
    assert losses[-1] < 0.5, losses
