"""On-line preference steps: the pairs that rewards make of samples, and the step on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.offline import make_offline_step
from jaxrl_llm.algorithms.preference.objective import PreferenceBatch, PreferenceObjective
from jaxrl_llm.algorithms.preference.online import OnlinePreference, make_online_preference_step, sampled_pairs
from jaxrl_llm.algorithms.state import make_train_state, step_key
from jaxrl_llm.models.config import LoraConfig, Params
from jaxrl_llm.models.lora import split_trainable, without_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.types import Rollout

REWARDS = np.array([[0.0, 1.0, 0.5], [2.0, 2.0, 2.0], [1.0, -1.0, -1.0], [0.0, 0.0, 3.0]], np.float32)
CHOSEN, REJECTED = [1, 0, 0, 2], [0, 2, 2, 1]
TIED = 1


@pytest.fixture(scope="module")
def rollout(make_rollout):
    return make_rollout(prompts=4, group=3)


@pytest.fixture(scope="module")
def expected(rollout) -> PreferenceBatch:
    rows = np.arange(4)
    sides = np.stack([CHOSEN, REJECTED], axis=1)
    mask = np.array(rollout.mask)[rows[:, None], sides]
    mask[TIED] = False
    completion = np.asarray(rollout.completion)[rows[:, None], sides]
    return PreferenceBatch(rollout.prompt, rollout.prompt_lengths, completion, mask)


def test_the_best_and_the_worst_sample_are_a_pair(rollout, expected):
    pairs = sampled_pairs(rollout, REWARDS)
    np.testing.assert_array_equal(pairs.completion, expected.completion)
    np.testing.assert_array_equal(pairs.mask, expected.mask)
    with pytest.raises(ValueError, match="two samples of each prompt at least"):
        sampled_pairs(rollout.samples(0, 1), REWARDS[:, :1])


@pytest.fixture(scope="module")
def model(tiny_config) -> Transformer:
    return Transformer(tiny_config())


@pytest.fixture(scope="module")
def run(model, lively_params) -> Callable[..., tuple[Params, dict[str, float]]]:
    """Parameters and metrics after a step of SGD with rate 1 from the same start, against another reference."""
    optimizer = optax.sgd(1.0)

    def run(algorithm: OnlinePreference, rollout: Rollout, rewards: Any, plan: UpdateConfig | None = None) -> Any:
        state = make_train_state(lively_params(model), optimizer, 0)
        step = jax.jit(make_online_preference_step(model, optimizer, algorithm, plan))
        state, metrics = step(state, rollout, rewards, lively_params(model, seed=1))
        chex.assert_tree_all_finite(state.params)  # a comparison takes two NaNs for equal
        return state.params, {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}

    return run


def test_the_step_is_that_on_given_pairs(rollout, expected, model, run, lively_params):
    optimizer, objective = optax.sgd(1.0), PreferenceObjective()
    online, metrics = run(OnlinePreference(objective), rollout, REWARDS)
    state = make_train_state(lively_params(model), optimizer, 0)
    given, others = jax.jit(make_offline_step(model, optimizer, objective))(
        state, expected, lively_params(model, seed=1)
    )
    chex.assert_trees_all_close(online, given.params, rtol=0, atol=1e-5)
    others = {name: value for name, value in others.items() if not name.startswith("perf/")}
    assert {name: metrics[name] for name in others} == pytest.approx(
        {name: float(value) for name, value in others.items()}, rel=1e-5
    )
    assert metrics["reward"] == pytest.approx(REWARDS.mean())
    assert metrics["frac_reward_zero_std"] == 0.25
    mask = np.asarray(rollout.mask)
    assert metrics["entropy"] == pytest.approx(-np.asarray(rollout.sampler_logprobs)[mask].mean(), rel=1e-5)


def test_rewards_of_tokens_are_summed(rollout, run):
    mask = np.asarray(rollout.mask)
    by_token = np.where(mask, (REWARDS / mask.sum(-1))[..., None], np.nan).astype(np.float32)
    whole, metrics = run(OnlinePreference(), rollout, REWARDS)
    summed, same = run(OnlinePreference(), rollout, by_token)
    chex.assert_trees_all_close(summed, whole, rtol=0, atol=1e-5)
    assert same == pytest.approx(metrics, rel=1e-5)


def test_a_prompt_without_a_difference_has_no_pair(rollout, model, run, lively_params):
    """Nor has one with a reward that is NaN; without any pair, nothing moves."""
    rewards = np.where(np.arange(3) == 1, np.nan, REWARDS).astype(np.float32)
    assert not np.asarray(sampled_pairs(rollout, rewards).mask).any()
    after, metrics = run(OnlinePreference(), rollout, np.ones_like(REWARDS))
    assert metrics["grad_norm"] == 0
    chex.assert_trees_all_equal(after, lively_params(model))


def test_a_completion_without_an_end_is_worth_less(rollout, run):
    finished = np.asarray(rollout.finished)
    assert not finished.all()
    penalised, metrics = run(OnlinePreference(missing_eos_penalty=3.0), rollout, REWARDS)
    lowered, _ = run(OnlinePreference(), rollout, REWARDS - 3 * ~finished)
    chex.assert_trees_all_close(penalised, lowered, rtol=0, atol=1e-5)
    assert metrics["reward"] == pytest.approx(REWARDS.mean())  # as it was given


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(fsdp=2, tensor=2), MeshConfig(data=2, fsdp=2)])
def test_micro_batches_and_meshes_change_nothing(config, run, make_rollout):
    rollout = make_rollout(prompts=8, group=3)
    rewards = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    plain, metrics = run(OnlinePreference(), rollout, rewards)
    with jax.set_mesh(make_mesh(config, jax.devices()[: max(1, config.data) * max(1, config.fsdp) * config.tensor])):
        again, same = run(OnlinePreference(), rollout, rewards, UpdateConfig(micro_batches=2))
    chex.assert_trees_all_close(again, plain, rtol=0, atol=1e-4)
    assert same == pytest.approx(metrics, rel=1e-4)


def test_pairs_that_would_be_cut_raise(rollout, run):
    with pytest.raises(ValueError, match=r"cannot be cut into update\.micro_batches=3 × 1 row shards"):
        run(OnlinePreference(), rollout, REWARDS, UpdateConfig(micro_batches=3))


def test_minibatches_are_steps_one_after_the_other(rollout, expected, model, run, lively_params):
    """On the pairs of some prompts each, all against the reference and none against the step before."""
    together, _ = run(OnlinePreference(), rollout, REWARDS, UpdateConfig(minibatches=2))
    optimizer = optax.sgd(1.0)
    state = make_train_state(lively_params(model), optimizer, 0)
    order = jax.random.permutation(jax.random.fold_in(step_key(state, 1), 0), 4)
    step = jax.jit(make_offline_step(model, optimizer, PreferenceObjective()))
    for part in (order[:2], order[2:]):
        state, _ = step(state, jax.tree.map(lambda x, part=part: x[part], expected), lively_params(model, seed=1))
    chex.assert_trees_all_close(together, state.params, rtol=0, atol=1e-5)


def test_with_adapters_the_base_is_the_reference_and_stays(rollout, tiny_config, lively_params):
    model, optimizer = Transformer(tiny_config(lora=LoraConfig(rank=2))), optax.sgd(1.0)
    params = lively_params(model)
    state = make_train_state(params, optimizer, 0)
    step = jax.jit(make_online_preference_step(model, optimizer, OnlinePreference()))
    ours, metrics = step(state, rollout, REWARDS)
    given, _ = step(state, rollout, REWARDS, without_adapters(params))
    chex.assert_trees_all_close(ours.params, given.params, rtol=0, atol=1e-5)
    assert float(metrics["rewards/margins"]) != 0  # the adapters are no longer what they began with
    trained, base = split_trainable(ours.params)
    chex.assert_trees_all_equal(base, split_trainable(params)[1])
    assert any(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (trained, split_trainable(params)[0])), strict=True)
    )


def test_parameters_in_bfloat16(rollout, tiny_config, lively_params):
    model, optimizer = Transformer(tiny_config(dtype="bfloat16", param_dtype="bfloat16")), optax.adam(1e-2)
    state = make_train_state(lively_params(model), optimizer, 0)
    step = jax.jit(make_online_preference_step(model, optimizer, OnlinePreference(), UpdateConfig(epochs=2)))
    after, metrics = step(state, rollout, REWARDS, lively_params(model, seed=1))
    assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(after.params))
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True))


def test_a_penalty_below_0_is_refused():
    with pytest.raises(ValueError, match=r"algorithm.missing_eos_penalty=-1.0 must not be negative"):
        OnlinePreference(missing_eos_penalty=-1.0)
