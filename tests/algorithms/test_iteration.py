"""Rewards on the device: their weights and their sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.iteration import DeviceReward, make_device_scores
from jaxrl_llm.types import Rollout


def lengths(params: Any, rollout: Rollout) -> jax.Array:
    return rollout.completion_lengths * 1.0


def of_tokens(params: Any, rollout: Rollout) -> jax.Array:
    return jnp.ones(rollout.completion.shape)


def broken(params: Any, rollout: Rollout) -> jax.Array:
    return jnp.full(rollout.completion_lengths.shape, params)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("counted", [lengths, of_tokens])
def test_a_reward_of_weight_0_is_reported_and_has_no_part_in_the_sum(bad, counted, make_rollout):
    rollout, reported = make_rollout(), DeviceReward("broken", broken, np.float32(bad), weight=0.0)
    rewards = [DeviceReward("counted", counted, weight=2.0), reported]
    scores = make_device_scores(rewards)([reward.params for reward in rewards], rollout)
    np.testing.assert_array_equal(rollout.of_completions(scores.total), 2.0 * rollout.completion_lengths)
    np.testing.assert_array_equal(scores.by_name["broken"], np.full(rollout.completion_lengths.shape, bad))


def test_a_sum_of_nothing_is_0(make_rollout):
    rollout = make_rollout()
    total = make_device_scores([DeviceReward("broken", broken, weight=0.0)])([np.nan], rollout).total
    np.testing.assert_array_equal(total, np.zeros(rollout.completion_lengths.shape, np.float32))


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf])
def test_a_weight_is_finite(weight):
    with pytest.raises(ValueError, match=rf"device_rewards\['length'\]\.weight={weight} must be finite"):
        DeviceReward("length", lengths, weight=weight)
