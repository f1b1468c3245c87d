"""The objective as a record: what it needs, and that it hands every setting to the loss."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.interfaces import Feedback, Signals
from jaxrl_llm.algorithms.policy_gradient.estimators import GroupAdvantage
from jaxrl_llm.algorithms.policy_gradient.objective import LearnerBatch, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.surrogates import Clipped
from jaxrl_llm.logprobs import TokenScores
from jaxrl_llm.losses.policy import grpo_loss
from jaxrl_llm.records import Metrics


@pytest.fixture
def batch() -> LearnerBatch:
    rng = np.random.default_rng(0)
    shape = (3, 2, 4)
    mask = np.arange(4) < np.array([[4, 1], [2, 3], [0, 4]])[..., None]

    def logprobs() -> jax.Array:
        return jnp.asarray(-rng.exponential(size=shape), jnp.float32)

    return LearnerBatch(
        prompt=jnp.zeros((3, 2), jnp.int32),
        prompt_lengths=jnp.ones(3, jnp.int32),
        completion=jnp.zeros(shape, jnp.int32),
        mask=jnp.asarray(mask),
        advantages=jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
        sampler_logprobs=logprobs(),
        seeds=jnp.arange(3, dtype=jnp.uint32),
        old_logprobs=logprobs(),
        ref_logprobs=logprobs(),
    )


@pytest.fixture
def scores(batch: LearnerBatch) -> TokenScores:
    rng = np.random.default_rng(1)
    assert batch.old_logprobs is not None
    logprobs = batch.old_logprobs + jnp.asarray(0.3 * rng.normal(size=batch.mask.shape), jnp.float32)
    return TokenScores(logprobs, jnp.asarray(rng.random(batch.mask.shape), jnp.float32))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"surrogate": Clipped(clip_low=0.05, clip_high=0.4)},
    {"surrogate": Clipped(clip_low=None, clip_high=None)},
    {"surrogate": Clipped(dual_clip=1.1)},
    {"surrogate": Clipped(ratio_cap=1.3)},
    {"kl_coef": 0.5},
    {"kl_coef": 0.5, "kl_estimator": "k2"},
    {"kl_coef": 0.5, "kl_clip": 0.1},
    {"aggregation": "token-mean"},
    {"aggregation": "seq-mean-token-sum-norm", "max_length": 7},
]


@functools.partial(jax.jit, static_argnums=0)
def value(algorithm: PolicyGradient, scores: TokenScores, batch: LearnerBatch) -> tuple[jax.Array, Metrics]:
    return algorithm.loss(scores, batch, algorithm.normalizer(batch.mask))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_setting_reaches_the_loss(settings, scores, batch):
    algorithm = PolicyGradient(**settings)
    loss, metrics = value(algorithm, scores, batch)
    common = ("kl_coef", "kl_estimator", "kl_clip", "aggregation", "max_length")
    given = dataclasses.asdict(algorithm.surrogate) | {name: getattr(algorithm, name) for name in common}
    given["max_length"] = given["max_length"] or 4
    given = functools.partial(grpo_loss, ref_logprobs=batch.ref_logprobs, **given)
    expected, _ = jax.jit(given)(scores.logprobs, batch.old_logprobs, batch.advantages, batch.mask)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    if settings:
        assert abs(float(loss) - float(value(PolicyGradient(), scores, batch)[0])) > 1e-4
    mask = np.asarray(batch.mask)
    assert float(metrics["entropy"].value()) == pytest.approx(float(np.asarray(scores.entropy)[mask].mean()), rel=1e-5)


def test_entropy_is_a_metric_and_no_part_of_the_gradient(scores, batch):
    def loss(entropy: jax.Array) -> tuple[jax.Array, Any]:
        value_, metrics = value(PolicyGradient(), scores._replace(entropy=entropy), batch)
        return value_ + metrics["entropy"].value(), metrics

    gradient, _ = jax.grad(loss, has_aux=True)(scores.entropy)
    assert (np.asarray(gradient) == 0).all()


def test_parts_declare_what_they_need():
    assert not PolicyGradient().needs_reference
    assert PolicyGradient(kl_coef=0.1).needs_reference
    assert not PolicyGradient().needs_whole_groups
    assert PolicyGradient(aggregation="group-mean-token-mean").needs_whole_groups
    assert PolicyGradient(aggregation="group-sum-token-mean").needs_whole_groups


def test_advantages_against_numpy():
    rewards = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    deviation = rewards.std(axis=1, ddof=1, keepdims=True)

    def advantages(estimator: GroupAdvantage) -> jax.Array:
        mask = jnp.ones((3, 4, 2), bool)
        given = Signals(jnp.asarray(rewards), None, mask, mask[..., 0], Feedback(jnp.asarray(rewards)))
        return estimator(given, estimator.start()).advantages

    np.testing.assert_allclose(advantages(GroupAdvantage()), centred / (deviation + 1e-4), rtol=1e-4)
    np.testing.assert_allclose(advantages(GroupAdvantage(scale="none")), centred, atol=1e-6)
    rloo = advantages(GroupAdvantage(scale="none", baseline="leave_one_out"))
    np.testing.assert_allclose(rloo, centred * 4 / 3, atol=1e-6)
    population = advantages(GroupAdvantage(ddof=0, eps=0.5))
    np.testing.assert_allclose(population, centred / (rewards.std(axis=1, keepdims=True) + 0.5), rtol=1e-4)


def test_records_are_hashable_and_compare_by_value():
    assert PolicyGradient() == PolicyGradient()
    assert hash(PolicyGradient(kl_coef=0.3)) == hash(PolicyGradient(kl_coef=0.3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        PolicyGradient().kl_coef = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        (Clipped, {"clip_low": -0.1}, r"algorithm\.surrogate\.clip_low=-0\.1 must be None, or a distance from 1"),
        (Clipped, {"clip_low": float("nan")}, r"algorithm\.surrogate\.clip_low=nan must"),
        (Clipped, {"clip_high": -0.1}, r"algorithm\.surrogate\.clip_high=-0\.1 must be None, or a distance from 1"),
        (Clipped, {"dual_clip": 1.0}, r"algorithm\.surrogate\.dual_clip=1\.0 must be None, or above 1"),
        (Clipped, {"ratio_cap": 1.1}, r"algorithm\.surrogate\.ratio_cap=1\.1 must be None, or above 1 \+ clip_high"),
        (Clipped, {"ratio_cap": 3.0, "clip_high": None}, r"algorithm\.surrogate\.ratio_cap=3\.0 must"),
        (PolicyGradient, {"kl_coef": -0.1}, r"algorithm\.kl_coef=-0\.1 must not be negative"),
        (PolicyGradient, {"kl_estimator": "k4"}, r"algorithm\.kl_estimator='k4' must be one of \('k1', "),
        (PolicyGradient, {"kl_clip": 0.0}, r"algorithm\.kl_clip=0\.0 must be None, or positive"),
        (PolicyGradient, {"aggregation": "mean"}, r"algorithm\.aggregation='mean' must be one of \('token-mean', "),
        (PolicyGradient, {"max_length": 0}, r"algorithm\.max_length=0 must be None, or at least 1"),
        (GroupAdvantage, {"scale": "std"}, r"algorithm\.advantage\.scale='std' must be one of \('group', "),
        (GroupAdvantage, {"baseline": "median"}, r"algorithm\.advantage\.baseline='median' must be one of \('mean', "),
        (GroupAdvantage, {"ddof": 2}, r"algorithm\.advantage\.ddof=2 must be 0 or 1"),
        (GroupAdvantage, {"eps": -1e-4}, r"algorithm\.advantage\.eps=-0\.0001 must not be negative"),
    ],
)
def test_settings_that_cannot_be_meant_raise_at_once(record, settings, message):
    with pytest.raises(ValueError, match=message):
        record(**settings)
