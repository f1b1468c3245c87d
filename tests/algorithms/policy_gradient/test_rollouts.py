"""What the estimators read of a rollout: rewards with and without the penalty for length, and by token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.interfaces import Feedback, Signals
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.objective import OverlongPenalty, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.rollouts import read_rollout
from jaxrl_llm.algorithms.policy_gradient.shaped_estimators import GAEAdvantage, ReinforceAdvantage
from jaxrl_llm.masking import masked_sum, segment_last
from jaxrl_llm.types import Rollout

OUTCOMES = np.array([[1, 1, 0, 0], [0, 1, 0, 0]], np.float32)
PENALTY = OverlongPenalty(cache=4)


@pytest.fixture
def rollout(make_rollout) -> Rollout:
    """Two groups of four completions of at most 6 tokens, all long enough to be punished."""
    lengths = np.array([[6, 5, 4, 6], [3, 6, 5, 4]], np.int32)
    return make_rollout(prompts=2).replace(completion_lengths=lengths)


def signals_of(algorithm: PolicyGradient, rollout: Rollout, rewards: Any) -> Signals:
    """With an entropy that differs from token to token, and values of 0."""
    signals = read_rollout(algorithm, rollout, Feedback(jnp.asarray(rewards)))[0]
    entropy = np.random.default_rng(0).random(rollout.completion.shape).astype(np.float32)
    return signals._replace(entropy=jnp.asarray(entropy), values=jnp.zeros(entropy.shape))


def by_token(rollout: Rollout, rewards: np.ndarray) -> np.ndarray:
    """Rewards of completions as rewards of their last tokens, and what must not count at the padding."""
    mask = np.asarray(rollout.mask)
    return np.where(mask, np.where(np.asarray(segment_last(mask)), rewards[..., None], 0), np.nan).astype(np.float32)


# ---- Right or wrong ----------------------------------------------------------------------------------


def test_outcomes_are_the_rewards_before_the_penalty(rollout):
    algorithm = PolicyGradient(overlong=PENALTY)
    for rewards in (OUTCOMES, by_token(rollout, OUTCOMES)):
        signals = signals_of(algorithm, rollout, rewards)
        np.testing.assert_array_equal(signals.outcomes, OUTCOMES)
        np.testing.assert_allclose(
            signals.rewards, OUTCOMES - np.clip((np.asarray(rollout.completion_lengths) - 2) / 4, 0, 1), rtol=1e-6
        )


@pytest.mark.parametrize("preset", [presets.gtpo, presets.grpo_s], ids=lambda preset: preset.__name__)
@pytest.mark.parametrize("cache", [2, 4, 5])
def test_a_long_answer_that_is_right_is_a_success(rollout, preset, cache):
    algorithm = dataclasses.replace(preset(), overlong=OverlongPenalty(cache=cache))
    advantages = np.asarray(algorithm.advantage(signals_of(algorithm, rollout, OUTCOMES), ()).advantages)
    if advantages.ndim == 3:
        advantages = np.sum(advantages, axis=-1)
    for group, right in zip(advantages, OUTCOMES == 1, strict=True):
        assert group[right].min() > group[~right].max()
        assert group.max() > 0.1 > -0.1 > group.min()


@pytest.mark.parametrize("preset", [presets.gtpo, presets.grpo_s], ids=lambda preset: preset.__name__)
def test_a_longer_success_is_worth_less(rollout, preset):
    """The penalty has its part in the shaped rewards."""
    plain, punished = preset(), dataclasses.replace(preset(), overlong=OverlongPenalty(cache=4, scale=0.5))
    without, with_penalty = (
        np.asarray(algorithm.advantage(signals_of(algorithm, rollout, OUTCOMES), ()).advantages)
        for algorithm in (plain, punished)
    )
    lead = [advantages[0, 1] - advantages[0, 0] for advantages in (without, with_penalty)]  # of 5 over 6 tokens
    assert np.all(lead[1].ravel()[:5] > lead[0].ravel()[:5])


def test_difficulty_is_judged_by_outcomes(rollout):
    algorithm = dataclasses.replace(presets.ha_dw(), overlong=PENALTY)
    estimator, signals = algorithm.advantage, signals_of(algorithm, rollout, OUTCOMES)
    after = estimator.remember(signals, estimator.start())
    assert float(after.value) == pytest.approx(OUTCOMES.mean())
    assert float(estimator(signals, estimator.start()).metrics["hadw/anchor"].value()) == pytest.approx(OUTCOMES.mean())


# ---- Rewards by token --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "advantage",
    [ReinforceAdvantage(), GAEAdvantage(kl_coef=0, whiten=False), GAEAdvantage(kl_coef=0, score_clip=0.5, lam=0.9)],
    ids=["reinforce", "ppo", "clipped"],
)
def test_a_completion_and_its_last_token_are_punished_alike(rollout, advantage):
    algorithm = PolicyGradient(advantage=advantage, overlong=PENALTY)
    of_completions, of_tokens = (
        algorithm.advantage(signals_of(algorithm, rollout, rewards), advantage.start()).advantages
        for rewards in (OUTCOMES, by_token(rollout, OUTCOMES))
    )
    np.testing.assert_allclose(of_tokens, of_completions, atol=1e-6)
    unpunished = signals_of(PolicyGradient(advantage=advantage), rollout, by_token(rollout, OUTCOMES))
    assert np.abs(np.asarray(advantage(unpunished, advantage.start()).advantages - of_tokens)).max() > 0.1


def test_the_penalty_lies_at_the_last_token(rollout):
    rewards = np.random.default_rng(1).normal(size=rollout.completion.shape).astype(np.float32)
    plain, punished = (signals_of(PolicyGradient(overlong=overlong), rollout, rewards) for overlong in (None, PENALTY))
    assert plain.token_rewards is not None and punished.token_rewards is not None
    taken = np.asarray(plain.token_rewards - punished.token_rewards)
    np.testing.assert_array_equal(taken[~np.asarray(segment_last(rollout.mask))], 0)
    np.testing.assert_allclose(taken.sum(axis=-1), plain.rewards - punished.rewards, atol=1e-6)
    np.testing.assert_allclose(masked_sum(punished.token_rewards, rollout.mask, axis=-1), punished.rewards, atol=1e-5)


@pytest.mark.parametrize("bound", [0.5, 2.0, 10.0])
def test_a_bound_on_scores_bounds_those_of_tokens(rollout, bound):
    rewards = 4 * np.random.default_rng(2).normal(size=rollout.completion.shape).astype(np.float32)
    advantage = GAEAdvantage(kl_coef=0, whiten=False, lam=1.0, score_clip=bound)
    signals = signals_of(PolicyGradient(advantage=advantage), rollout, rewards)
    bounded = np.where(np.asarray(rollout.mask), np.clip(rewards, -bound, bound), 0)
    expected = np.flip(np.cumsum(np.flip(bounded, -1), -1), -1)
    np.testing.assert_allclose(
        advantage(signals, ()).advantages, np.where(np.asarray(rollout.mask), expected, 0), atol=1e-4
    )
