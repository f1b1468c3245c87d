"""On-line preference steps: the pairs that rewards make of samples, and the step on them."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.offline import make_offline_step
from jaxrl_llm.algorithms.online_preference import make_online_preference_step, sampled_pairs
from jaxrl_llm.algorithms.preference import PreferenceBatch, PreferenceObjective
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models.transformer import Transformer

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


def test_the_step_is_that_on_given_pairs(rollout, expected, tiny_config, lively_params, assert_trees_close):
    model = Transformer(tiny_config())
    optimizer, objective = optax.sgd(1.0), PreferenceObjective()
    state = make_train_state(lively_params(model), optimizer, 0)
    reference = lively_params(model, seed=1)
    online, metrics = jax.jit(make_online_preference_step(model, optimizer, objective))(
        state, rollout, REWARDS, reference
    )
    given, others = jax.jit(make_offline_step(model, optimizer, objective))(state, expected, reference)
    assert_trees_close(online.params, given.params)
    assert {name: float(metrics[name]) for name in others} == pytest.approx(
        {name: float(value) for name, value in others.items()}, rel=1e-5
    )
    assert float(metrics["reward"]) == pytest.approx(REWARDS.mean())
    assert float(metrics["frac_reward_zero_std"]) == 0.25
