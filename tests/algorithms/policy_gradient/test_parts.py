"""Every preset computes the published advantage and loss: those of the pure functions, with their defaults."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.algorithms.interfaces import Feedback, Signals
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.estimators import GDPOAdvantage, HADWAdvantage
from jaxrl_llm.algorithms.policy_gradient.objective import Correction, LearnerBatch, OverlongPenalty, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.surrogates import SoftGated
from jaxrl_llm.logprobs import TokenScores
from jaxrl_llm.masking import whiten

PROMPTS, GROUP, WIDTH = 3, 4, 5


def make_signals() -> Signals:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, WIDTH + 1, (PROMPTS, GROUP))
    mask = np.arange(WIDTH) < lengths[..., None]
    rewards = rng.integers(0, 2, (PROMPTS, GROUP)).astype(np.float32)
    rewards[0] = [1, 0, 0, 1]

    def logprobs() -> jax.Array:
        return jnp.asarray(-rng.exponential(size=mask.shape), jnp.float32)

    is_reference = np.arange(GROUP) == rng.integers(0, GROUP, (PROMPTS, 1))
    feedback = Feedback(
        jnp.asarray(rewards),
        greedy=jnp.asarray(rng.normal(size=PROMPTS), jnp.float32),
        by_function=jnp.asarray(rng.normal(size=(PROMPTS, GROUP, 2)), jnp.float32),
        is_reference=jnp.asarray(is_reference),
        preferred=jnp.asarray(rng.random((PROMPTS, GROUP)) < 0.5),
        preferred_swapped=jnp.asarray(rng.random((PROMPTS, GROUP)) < 0.5),
        reference_rewards=jnp.asarray(np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)),
        roles=jnp.array([0, 1, 0]),
        tasks=jnp.array([7, 3, 7]),
    )
    return Signals(
        rewards=jnp.asarray(rewards),
        token_rewards=None,
        mask=jnp.asarray(mask),
        finished=jnp.asarray(rng.random((PROMPTS, GROUP)) < 0.7),
        feedback=feedback,
        old_logprobs=logprobs(),
        ref_logprobs=logprobs(),
        entropy=jnp.asarray(rng.random(mask.shape), jnp.float32),
        values=logprobs(),
    )


SIGNALS = make_signals()
LENGTHS = jnp.sum(SIGNALS.mask, axis=-1)
KL = {"old_logprobs": SIGNALS.old_logprobs, "ref_logprobs": SIGNALS.ref_logprobs}
BY_TOKEN = (SIGNALS.entropy, SIGNALS.rewards >= 1, SIGNALS.mask)
MIXED = np.ptp(SIGNALS.rewards, axis=1, keepdims=True) > 0


def expected_of_ppo() -> jax.Array:
    rewards = advantages.shape_rewards(SIGNALS.rewards, SIGNALS.mask, **KL, kl_coef=0.05)
    return whiten(advantages.gae(rewards, SIGNALS.values, SIGNALS.mask, gamma=1, lam=0.95).advantages, SIGNALS.mask)


def expected_of_ha_dw() -> jax.Array:
    plain = advantages.group_advantages(SIGNALS.rewards)
    return advantages.hadw_advantages(plain, SIGNALS.rewards, jnp.mean(SIGNALS.rewards))


group = functools.partial(advantages.group_advantages, SIGNALS.rewards)
ADVANTAGES: dict[str, Callable[[], Any]] = {
    "reinforce": lambda: advantages.reinforce_advantages(
        advantages.shape_rewards(SIGNALS.rewards, SIGNALS.mask, kl_coef=0), SIGNALS.mask
    ),
    "remax": lambda: advantages.remax_advantages(
        SIGNALS.rewards, jnp.tile(SIGNALS.feedback.greedy[:, None], (1, GROUP)), SIGNALS.mask
    ),
    "rloo": lambda: advantages.rloo_advantages(SIGNALS.rewards, *KL.values(), SIGNALS.mask, kl_coef=0.05),
    "reinforce_plus_plus": lambda: advantages.reinforce_plus_plus_advantages(
        SIGNALS.rewards, SIGNALS.mask, **KL, kl_coef=0.01
    ),
    "reinforce_plus_plus_baseline": lambda: advantages.reinforce_plus_plus_baseline_advantages(
        SIGNALS.rewards, lengths=LENGTHS
    ),
    "ppo": expected_of_ppo,
    "dr_grpo": lambda: group(scale="none"),
    "lite_ppo": lambda: group(scale="batch"),
    "gtpo": lambda: advantages.gtpo_advantages(*BY_TOKEN, norm="joint") * MIXED[..., None],
    "grpo_s": lambda: advantages.grpo_s_advantages(*BY_TOKEN) * MIXED,
    "gpg": lambda: advantages.gpg_advantages(SIGNALS.rewards),
    "opo": lambda: advantages.opo_advantages(SIGNALS.rewards, LENGTHS),
    "gfpo": lambda: advantages.gfpo_advantages(SIGNALS.rewards, -LENGTHS, keep=4).advantages,
    "gdpo": lambda: advantages.gdpo_advantages(SIGNALS.feedback.by_function),
    "pass_at_k": lambda: advantages.pass_at_k_advantages(SIGNALS.rewards),
    "max_rl": lambda: advantages.max_rl_advantages(SIGNALS.rewards),
    "a_star_po": lambda: advantages.optimal_advantages(SIGNALS.rewards, SIGNALS.feedback.reference_rewards),
    "dppo_log2": lambda: group(scale="none"),
    "ha_dw": expected_of_ha_dw,
    "brpo": lambda: advantages.brpo_advantages(
        SIGNALS.feedback.preferred,
        SIGNALS.feedback.is_reference,
        preferred_swapped=SIGNALS.feedback.preferred_swapped,
        inconsistent="tie",
    ),
    "grpo_threshold": lambda: advantages.threshold_filter(SIGNALS.rewards).advantages,
}
"""All others have GRPO's."""


@pytest.mark.parametrize("preset", presets.POLICY_GRADIENTS, ids=lambda preset: preset.__name__)
def test_advantages(preset: Callable[[], PolicyGradient]) -> None:
    estimator = preset().advantage
    credit = estimator(SIGNALS, estimator.start())
    expected = ADVANTAGES.get(preset.__name__, group)()
    np.testing.assert_allclose(credit.advantages, expected, rtol=1e-6, atol=1e-7)
    assert (credit.returns is not None) == (preset is presets.ppo)
    if preset is presets.brpo:
        skew = advantages.brpo_skew(expected)
        np.testing.assert_array_equal(credit.keep, np.tile((np.asarray(skew) <= 0.6)[:, None], (1, GROUP)))
    elif preset is presets.a_star_po:  # of the second prompt the reference solved nothing
        np.testing.assert_array_equal(credit.keep, np.tile([[True], [False], [True]], (1, GROUP)))
        assert dataclasses.replace(estimator, drop_unsolved=False)(SIGNALS, ()).keep is None
    elif preset is presets.grpo_threshold:
        np.testing.assert_array_equal(credit.keep, advantages.threshold_filter(SIGNALS.rewards).keep)


def make_rows() -> tuple[TokenScores, LearnerBatch]:
    rng = np.random.default_rng(1)
    assert SIGNALS.old_logprobs is not None
    logprobs = SIGNALS.old_logprobs + jnp.asarray(0.3 * rng.normal(size=SIGNALS.mask.shape), jnp.float32)
    batch = LearnerBatch(
        prompt=jnp.zeros((PROMPTS, 2), jnp.int32),
        prompt_lengths=jnp.ones(PROMPTS, jnp.int32),
        completion=jnp.zeros(SIGNALS.mask.shape, jnp.int32),
        mask=SIGNALS.mask,
        advantages=jnp.asarray(rng.normal(size=(PROMPTS, GROUP)), jnp.float32),
        sampler_logprobs=SIGNALS.old_logprobs + jnp.asarray(0.1 * rng.normal(size=SIGNALS.mask.shape), jnp.float32),
        seeds=jnp.arange(PROMPTS, dtype=jnp.uint32),
        old_logprobs=SIGNALS.old_logprobs,
        ref_logprobs=SIGNALS.ref_logprobs,
    )
    return TokenScores(logprobs, SIGNALS.entropy), batch


SCORES, BATCH = make_rows()
TOKENS = (SCORES.logprobs, BATCH.old_logprobs, BATCH.advantages, BATCH.mask)
PLAIN = (SCORES.logprobs, BATCH.advantages, BATCH.mask)
LOSSES: dict[str, Callable[[], tuple[jax.Array, Any]]] = {
    "reinforce": lambda: losses.reinforce_loss(*PLAIN),
    "remax": lambda: losses.reinforce_loss(*PLAIN),
    "rloo": lambda: losses.reinforce_loss(*PLAIN),
    "reinforce_plus_plus": lambda: losses.ppo_loss(*TOKENS),
    "ppo": lambda: losses.ppo_loss(*TOKENS),
    "grpo": lambda: losses.grpo_loss(*TOKENS, ref_logprobs=BATCH.ref_logprobs, kl_clip=10.0),
    "dr_grpo": lambda: losses.dr_grpo_loss(*TOKENS, max_length=WIDTH),
    "lite_ppo": lambda: losses.ppo_loss(*TOKENS),
    "gspo": lambda: losses.gspo_loss(*TOKENS),
    "gspo_token": lambda: losses.gspo_token_loss(*TOKENS),
    "luspo": lambda: losses.luspo_loss(*TOKENS),
    "sapo": lambda: losses.sapo_loss(*TOKENS),
    "gmpo": lambda: losses.gmpo_loss(*TOKENS),
    "cispo": lambda: losses.cispo_loss(*TOKENS),
    "grpo_s": lambda: losses.grpo_s_loss(*TOKENS),
    "gpg": lambda: losses.gpg_loss(*PLAIN),
    "opo": lambda: losses.reinforce_loss(*PLAIN),
    "gfpo": lambda: losses.ppo_loss(*TOKENS),
    "gdpo": lambda: losses.ppo_loss(*TOKENS),
    "pass_at_k": lambda: losses.ppo_loss(*TOKENS),
    "max_rl": lambda: losses.ppo_loss(*TOKENS),
    "a_star_po": lambda: losses.a_star_po_loss(SCORES.logprobs, BATCH.ref_logprobs, BATCH.advantages, BATCH.mask),
    "dppo_log2": lambda: losses.dppo_loss(*TOKENS, delta_low=0.2, delta_high=0.2, log_ratio_coef=1e-3),
    "ha_dw": lambda: losses.grpo_loss(*TOKENS, kl_coef=0),
    "grpo_threshold": lambda: losses.reinforce_loss(*PLAIN),
    "clip_cov": lambda: losses.clip_cov_loss(*TOKENS, jax.random.key(0)),
    "kl_cov": lambda: losses.kl_cov_loss(*TOKENS),
    "vespo": lambda: losses.vespo_loss(*TOKENS),
}
"""All others have DAPO's; that of `reinforce_plus_plus_baseline` has a KL term as well."""


def loss_of(algorithm: PolicyGradient) -> float:
    return float(algorithm.loss(SCORES, BATCH, algorithm.normalizer(BATCH.mask))[0])


@pytest.mark.parametrize("preset", presets.POLICY_GRADIENTS, ids=lambda preset: preset.__name__)
def test_losses(preset: Callable[[], PolicyGradient]) -> None:
    if preset is presets.reinforce_plus_plus_baseline:
        kl, _ = losses.kl_loss(
            SCORES.logprobs, BATCH.ref_logprobs, BATCH.mask, kl_coef=1e-5, kl_estimator="k2", aggregation="token-mean"
        )
        expected = losses.ppo_loss(*TOKENS)[0] + kl
    else:
        expected = LOSSES.get(preset.__name__, lambda: losses.dapo_loss(*TOKENS))()[0]
    assert loss_of(preset()) == pytest.approx(float(expected), rel=1e-6)


def test_loss_of_dppo() -> None:
    expected, _ = losses.dppo_loss(*TOKENS, delta_low=0.1, delta_high=0.2)
    assert loss_of(presets.dppo(0.1, 0.2)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("correction", "function"),
    [
        (Correction(), losses.tis_weights),
        (Correction("mis", level="sequence"), losses.mis_weights),
        (Correction("icepop", w_min=0.8, w_max=1.2), functools.partial(losses.icepop_weights, w_min=0.8, w_max=1.2)),
        (
            Correction("geometric", w_min=0.9, w_max=1.1),
            functools.partial(losses.geometric_filter, w_min=0.9, w_max=1.1),
        ),
    ],
    ids=lambda x: getattr(x, "rule", ""),
)
def test_corrections_weigh_the_policy_term_alone(correction: Correction, function: Callable[..., jax.Array]) -> None:
    weights = function(BATCH.old_logprobs, BATCH.sampler_logprobs, BATCH.mask)
    expected, _ = losses.grpo_loss(
        *TOKENS, ref_logprobs=BATCH.ref_logprobs, kl_coef=0.5, kl_clip=10.0, weights=weights.astype(jnp.float32)
    )
    assert loss_of(PolicyGradient(correction=correction, kl_coef=0.5)) == pytest.approx(float(expected), rel=1e-6)


def test_an_entropy_bonus_is_reduced_as_the_loss_is() -> None:
    with_bonus, without = (loss_of(PolicyGradient(entropy_coef=c, aggregation="token-mean")) for c in (0.5, 0.0))
    entropy = np.asarray(SCORES.entropy)[np.asarray(BATCH.mask)].mean()
    assert with_bonus == pytest.approx(without - 0.5 * entropy, rel=1e-5)


def test_the_penalty_for_length_lowers_rewards() -> None:
    algorithm = PolicyGradient(overlong=OverlongPenalty(cache=2, scale=0.5))
    lengths = jnp.array([[1, 3, 4, 5]])
    np.testing.assert_allclose(algorithm.shape(jnp.ones((1, 4)), lengths, 5), [[1, 1, 0.75, 0.5]])
    with pytest.raises(ValueError, match=r"overlong.cache=2 must be less than the longest completion, 2"):
        algorithm.shape(jnp.ones((1, 4)), lengths, 2)


def test_a_surrogate_without_that_aggregation_says_so() -> None:
    with pytest.raises(
        ValueError, match="must be 'seq-mean-token-mean': the surrogate GeometricMeanClipped has no other"
    ):
        PolicyGradient(surrogate=presets.gmpo().surrogate, aggregation="token-mean")


@pytest.mark.parametrize(
    ("surrogate", "loss"),
    [
        (presets.gspo().surrogate, losses.gspo_loss),
        (presets.gspo_token().surrogate, losses.gspo_token_loss),
        (SoftGated(ratio_level="sequence"), functools.partial(losses.sapo_loss, ratio_level="sequence")),
    ],
    ids=["gspo", "gspo_token", "sapo"],
)
def test_ratios_of_sequences_are_reduced_by_any_aggregation(surrogate: Any, loss: Callable[..., Any]) -> None:
    for mode in ("token-mean", "seq-mean-token-sum-norm"):
        expected, _ = loss(*TOKENS, aggregation=mode, max_length=WIDTH)
        assert loss_of(PolicyGradient(surrogate=surrogate, aggregation=mode)) == pytest.approx(
            float(expected), rel=1e-6
        )


def test_memories_move_after_their_use() -> None:
    estimator = presets.reinforce().advantage
    start = estimator.start()
    assert float(start.value()) == 0
    after = estimator.remember(SIGNALS, start)
    assert float(after.value()) == pytest.approx(float(SIGNALS.rewards.mean()))
    first, second = (estimator(SIGNALS, memory).advantages for memory in (start, after))
    moved = np.where(SIGNALS.mask, float(SIGNALS.rewards.mean()), 0)
    np.testing.assert_allclose(first - second, moved, atol=1e-6)


def test_baselines_of_roles_move_with_each_sample() -> None:
    estimator, start = presets.rae().advantage, jnp.array([0.5, -0.5])
    roles = np.repeat([[0], [1], [0]], GROUP, axis=1)
    expected = advantages.rae_advantages(SIGNALS.rewards, roles, start)
    credit = estimator(SIGNALS, start)
    np.testing.assert_allclose(credit.advantages, expected.advantages, rtol=1e-6)
    np.testing.assert_allclose(estimator.remember(SIGNALS, start), expected.baselines, rtol=1e-6)
    assert {name: float(record.value()) for name, record in credit.metrics.items()} == {
        "rae/baseline_0": 0.5,
        "rae/baseline_1": -0.5,
    }


def test_peers_are_of_the_prompt_or_of_the_task() -> None:
    """The first and the third prompt are of one task, and of the role that is compared across prompts."""
    rewards = np.asarray(SIGNALS.rewards)
    expected = rewards - rewards.mean(1, keepdims=True)
    expected[::2] = rewards[::2] - rewards[::2].mean()
    found = presets.hierarchical_grpo().advantage(SIGNALS, ()).advantages
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def anchors(estimator: HADWAdvantage, accuracies: np.ndarray) -> np.ndarray:
    """The anchor after each batch of these mean accuracies."""

    def after(memory: Any, accuracy: jax.Array) -> tuple[Any, jax.Array]:
        given = SIGNALS._replace(rewards=jnp.full((PROMPTS, GROUP), accuracy))
        memory = estimator.remember(given, memory)
        return memory, memory.value

    return np.asarray(jax.lax.scan(after, estimator.start(), jnp.float32(accuracies))[1])


RISING = np.concatenate([np.linspace(0.2, 0.9, 500), np.full(300, 0.9)])


@pytest.mark.parametrize("estimator", [HADWAdvantage(), HADWAdvantage(anchor="moving_average")], ids=lambda e: e.anchor)
@pytest.mark.parametrize("accuracies", [RISING, RISING[::-1], RISING + 0.05 * np.sin(np.arange(800))])
def test_the_anchor_of_ha_dw_follows_the_accuracy(estimator, accuracies):
    np.testing.assert_allclose(anchors(estimator, accuracies)[20:], accuracies[20:], atol=0.07)


def test_the_published_anchor_falls_behind():
    """It is a setting, and no default."""
    published = anchors(HADWAdvantage(min_rate=0), RISING)
    assert RISING[300] - RISING[20] > 0.35
    assert abs(published[300] - published[20]) < 0.01


@pytest.mark.parametrize("weights", [None, (0.5, 2.0)])
def test_a_reward_function_that_does_not_apply_has_no_part_in_gdpo(weights):
    rewards = np.array(SIGNALS.feedback.by_function)
    rewards[0, 1, 0] = rewards[1, :, 1] = rewards[2, 3] = np.nan
    given = SIGNALS._replace(feedback=Feedback(SIGNALS.rewards, by_function=jnp.asarray(rewards), weights=weights))
    expected = advantages.gdpo_advantages(np.nan_to_num(rewards, nan=7.0), mask=~np.isnan(rewards), weights=weights)
    found = presets.gdpo().advantage(given, ()).advantages
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    own = GDPOAdvantage(weights=(1.0, 3.0))
    expected = advantages.gdpo_advantages(rewards, mask=~np.isnan(rewards), weights=(1.0, 3.0))
    np.testing.assert_allclose(own(given, ()).advantages, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "lite_ppo", "opo", "gpg", "pass_at_k", "max_rl"])
def test_a_sample_without_a_reward_has_no_part_in_a_group(name: str) -> None:
    """Whatever stands in its place; with all known, nothing changes."""
    estimator = getattr(presets, name)().advantage
    scored = jnp.ones_like(SIGNALS.rewards, bool)
    every = estimator(SIGNALS._replace(scored=scored), ()).advantages
    np.testing.assert_array_equal(every, estimator(SIGNALS, ()).advantages)
    best = 0, int(jnp.argmax(SIGNALS.rewards[0]))
    given = SIGNALS._replace(scored=scored.at[best].set(False))
    one, other = (
        np.asarray(estimator(given._replace(rewards=SIGNALS.rewards.at[best].set(value)), ()).advantages)
        for value in (0.0, 100.0)
    )
    assert estimator.skips_unscored and one[best] == 0 and np.any(one != every)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("preset", [presets.gtpo, presets.grpo_s])
def test_entropy_shapes_only_groups_with_successes_and_failures(preset: Callable[[], PolicyGradient]) -> None:
    rewards = SIGNALS.rewards.at[1].set(0.0).at[2].set(1.0)
    uniform = SIGNALS._replace(rewards=rewards)
    estimator = preset().advantage
    advantages_of = np.asarray(estimator(uniform, ()).advantages)
    np.testing.assert_array_equal(advantages_of[1:], 0)
    np.testing.assert_array_equal(advantages_of[0], estimator(SIGNALS, ()).advantages[0])
    assert np.abs(advantages_of[0]).max() > 0.1
    every = dataclasses.replace(estimator, mixed_groups_only=False)
    assert np.abs(np.asarray(every(uniform, ()).advantages[1])).max() > 0.1


def test_ppo_may_continue_what_was_cut_with_the_critics_value() -> None:
    estimator = dataclasses.replace(presets.ppo().advantage, bootstrap_truncated=True, gamma=0.9, whiten=False)
    assert estimator.needs - presets.ppo().advantage.needs == {"final_values"}
    final = jnp.asarray(np.random.default_rng(2).normal(size=(PROMPTS, GROUP)), jnp.float32)
    rewards = advantages.shape_rewards(SIGNALS.rewards, SIGNALS.mask, **KL, kl_coef=0.05)
    rewards = advantages.bootstrap_truncated(rewards, final, SIGNALS.finished, SIGNALS.mask, gamma=0.9)
    expected = advantages.gae(rewards, SIGNALS.values, SIGNALS.mask, gamma=0.9, lam=0.95)
    credit = estimator(SIGNALS._replace(final_values=final), ())
    np.testing.assert_allclose(credit.advantages, expected.advantages, rtol=1e-6)
    np.testing.assert_allclose(credit.returns, expected.returns, rtol=1e-6)
    plain = dataclasses.replace(estimator, bootstrap_truncated=False)(SIGNALS, ())
    cut = ~np.asarray(SIGNALS.finished)
    assert 0 < cut.sum() < cut.size
    np.testing.assert_array_equal((np.asarray(plain.returns != credit.returns) & SIGNALS.mask).any(-1), cut)
