"""Each on-policy algorithm learns: from a fixed seed its reward rises on a task that it had not solved."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.algorithms.interfaces import Advantage, Algorithm, Credit, Feedback, Need, Signals
from jaxrl_llm.algorithms.offline import make_offline_step, make_reference_pass
from jaxrl_llm.algorithms.policy_gradient.given import GivenAdvantages
from jaxrl_llm.algorithms.policy_gradient.objective import LearnerBatch, PolicyGradient, ValueObjective
from jaxrl_llm.algorithms.policy_gradient.presets import (
    OF_ROLES,
    PRESETS,
    dapo,
    dppo,
    echo,
    gspo,
    online_dpo,
    ppo,
    remax,
)
from jaxrl_llm.algorithms.preference.objective import PreferenceBatch, PreferenceObjective
from jaxrl_llm.algorithms.preference.online import OnlinePreference
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.types import Rollout

pytestmark = pytest.mark.whole_run

WANTED, VOCABULARY, STEPS = 5, 16, 60


def says_it(rollout: Rollout) -> np.ndarray:
    """1 for a first token that is `WANTED`, `[P, G]`."""
    return np.float32(np.asarray(rollout.completion[..., 0]) == WANTED)


def stops(rollout: Rollout) -> np.ndarray:
    """1 for stopping right after one token, `[P, G]`."""
    return np.float32((np.asarray(rollout.completion_lengths) == 2) & np.asarray(rollout.finished))


def says_it_and_stops(rollout: Rollout) -> np.ndarray:
    """½ for each."""
    return np.float32(0.5) * (says_it(rollout) + stops(rollout))


def feedback(algorithm: Algorithm, rollout: Rollout, rewards: np.ndarray, numbers: np.random.Generator) -> Any:
    """What the algorithm reads beside the reward."""
    needs = algorithm.needs
    if "by_function" in needs:
        return Feedback(rewards, by_function=np.stack([says_it(rollout), stops(rollout)], axis=-1))
    if "verdicts" in needs:  # a judge that sees which of two rewards is higher
        chosen = numbers.integers(rewards.shape[1], size=len(rewards))
        is_reference = np.arange(rewards.shape[1]) == chosen[:, None]
        preferred = rewards > np.take_along_axis(rewards, chosen[:, None], axis=1)
        return Feedback(rewards, is_reference=is_reference, preferred=preferred)
    if "roles" in needs:  # the first one's rewards are higher by 2, whatever it says, and their mean is as it was
        roles, tasks = np.arange(len(rewards)) % 2, numbers.integers(4, size=len(rewards))
        return Feedback(rewards + 1 - 2 * np.float32(roles)[:, None], roles=roles, tasks=tasks)
    return rewards


@pytest.fixture
def train(train) -> Callable[..., list[dict[str, float]]]:
    """The loop, on the task of these tests unless told otherwise."""
    return functools.partial(train, reward=says_it_and_stops, feedback=feedback, steps=STEPS)


def rewards_of(history: list[dict[str, float]]) -> tuple[float, float]:
    """Mean reward of the first and of the last five steps."""
    rewards = [metrics["reward"] for metrics in history]
    return float(np.mean(rewards[:5])), float(np.mean(rewards[-5:]))


REWARDS = {"gtpo": says_it, "grpo_s": says_it, "ha_dw": says_it}
"""For algorithms that tell success from failure, or read rewards as chances, one that is 0 or 1."""
SLOWER = {"gfpo": 150}
"""Steps of those that train on a part of the samples."""
HALF_WAY = ("pass_at_k", "brpo")
"""Algorithms that have no more to say once several samples of a group are as good as the best of it."""


VALUES = ("value/mean", "value/returns_mean")


@dataclasses.dataclass(frozen=True)
class Negated(Advantage):
    """What an estimator says, with the sign flipped."""

    inner: Advantage

    @property
    def needs(self) -> frozenset[Need]:
        return self.inner.needs

    def start(self) -> Any:
        return self.inner.start()

    def remember(self, signals: Signals, memory: Any) -> Any:
        return self.inner.remember(signals, memory)

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        credit = self.inner(signals, memory)
        return credit._replace(advantages=-credit.advantages)


@dataclasses.dataclass(frozen=True)
class Swapped(PreferenceObjective):
    """The same objective, with the worse completion as the chosen one."""

    def loss(self, scores: Any, rows: PreferenceBatch, normalizer: Any) -> Any:
        sides = {name: getattr(rows, name)[:, ::-1] for name in ("completion", "mask", "ref_logprobs")}
        scores = scores._replace(logprobs=scores.logprobs[:, ::-1])
        return super().loss(scores, rows._replace(**sides), normalizer)


def flipped(algorithm: Algorithm) -> Algorithm:
    """The same algorithm, with the sign of its advantages or margins flipped."""
    if isinstance(algorithm, OnlinePreference):
        return OnlinePreference(Swapped(**vars(algorithm.objective)))
    assert isinstance(algorithm, PolicyGradient)
    return dataclasses.replace(algorithm, advantage=Negated(algorithm.advantage))


@pytest.fixture
def model(tiny_config) -> Transformer:
    return Transformer(tiny_config(vocab_size=VOCABULARY))


def dppo_wide() -> PolicyGradient:
    """No bounds are confirmed; these are wide."""
    return dppo(0.1, 0.1)


LEARNING = [*PRESETS, *OF_ROLES, dppo_wide]


def reward_for(preset: Callable[[], Algorithm]) -> Callable[[Rollout], np.ndarray]:
    """The one of the task, or the one that the algorithm can read."""
    return REWARDS.get(preset.__name__, says_it_and_stops)


@pytest.mark.slow
@pytest.mark.parametrize("preset", LEARNING, ids=lambda preset: preset.__name__)
def test_every_preset_learns(preset, model, train):
    name = preset.__name__
    first, last = rewards_of(train(preset(), model, reward=reward_for(preset), steps=SLOWER.get(name, STEPS)))
    assert first < 0.1, first
    assert last > (0.35 if name in HALF_WAY else 0.7), last


@pytest.mark.slow
@pytest.mark.parametrize("preset", LEARNING, ids=lambda preset: preset.__name__)
def test_no_preset_learns_with_the_sign_flipped(preset, model, train):
    _, last = rewards_of(train(flipped(preset()), model, reward=reward_for(preset)))
    assert last < 0.1, last


@pytest.mark.parametrize("preset", [dapo, gspo, remax, ppo, online_dpo], ids=lambda preset: preset.__name__)
def test_one_of_each_family_learns(preset, model, train):
    first, last = rewards_of(train(preset(), model))
    assert first < 0.1, first
    assert last > 0.7, last


def test_one_learns_of_a_truncated_distribution(model, train):
    """The mask is kept; new tokens come into the top-k as others are pushed down."""
    first, last = rewards_of(train(dataclasses.replace(dapo(), keep_sampling_mask=True), model, top_k=8))
    assert first < 0.15, first
    assert last > 0.7, last


def test_with_the_sign_flipped_it_does_not_learn(model, train):
    _, last = rewards_of(train(flipped(dapo()), model))
    assert last < 0.1, last


class Repelled(Distillation):
    """Away from the teachers."""

    def weights_of(self, teachers: int) -> tuple[float, ...]:
        return tuple(-weight for weight in super().weights_of(teachers))


@pytest.mark.parametrize(
    ("divergence", "left"),
    [pytest.param("exact", 0.25, marks=pytest.mark.slow), ("sampled", 0.5)],  # the one has no sampling noise
)
def test_a_student_comes_near_its_teacher(divergence, left, model, train, lively_params):
    teachers = {"lively": (model, lively_params(model, seed=5))}
    prompts = np.random.default_rng(0).integers(1, VOCABULARY, (4, 3))
    learn = functools.partial(train, model=model, teachers=teachers, prompts=prompts, learning_rate=1e-2)
    history = learn(Distillation(divergence=divergence), steps=60)
    first, last = (np.mean([line["distillation/lively"] for line in part]) for part in (history[:5], history[-5:]))
    assert first > 0.3, first
    assert last < left * first, last
    away = learn(Repelled(divergence=divergence), steps=10)
    assert away[-1]["distillation/lively"] > first


def test_what_tools_answer_is_learned(model):
    """Beside GRPO, and not by it alone."""
    rng, optimizer = np.random.default_rng(0), optax.adam(1e-2)
    said = np.broadcast_to(np.arange(6) < 2, (4, 2, 6))
    arrays: Any = {
        "prompt": rng.integers(1, VOCABULARY, (4, 3)),
        "prompt_lengths": np.full(4, 3),
        "completion": rng.integers(1, VOCABULARY, said.shape),
        "mask": said,
        "advantages": np.float32([[1, -1]] * 4),
        "sampler_logprobs": np.zeros(said.shape, np.float32),
        "seeds": np.zeros(4, np.uint32),
        "observations": ~said,
    }
    rows, score = LearnerBatch(**arrays), jax.jit(make_reference_pass(model))
    params = jax.jit(model.init)(jax.random.key(0))

    def nll(params: Any) -> float:
        return -float(np.mean(np.asarray(score(params, rows._replace(mask=arrays["observations"])))[~said]))

    for objective, learns in ((echo(), True), (GivenAdvantages(PolicyGradient()), False)):
        step, state = jax.jit(make_offline_step(model, optimizer, objective)), make_train_state(params, optimizer, 0)
        for _ in range(40):
            state, _ = step(state, rows)
        assert (nll(state.params) < 0.5 * nll(params)) == learns


def test_a_critic_on_the_policys_trunk_learns_with_it(model, train):
    history = train(dataclasses.replace(ppo(), value=ValueObjective(coef=1.0)), model, shares_trunk=True)
    assert rewards_of(history)[1] > 0.7
    expected, returned = (np.mean([metrics[name] for metrics in history[-5:]]) for name in VALUES)
    assert abs(expected - returned) < 0.2 < abs(history[0]["value/mean"] - returned)
