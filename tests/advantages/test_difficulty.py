import functools
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.difficulty import (
    DifficultyAnchor,
    hadw_advantages,
    hadw_weights,
    mean_accuracy_of_mixed_groups,
)


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def test_golden_numbers(examples):
    state = DifficultyAnchor(jnp.float32(0.6), jnp.array([0.4, 0.5, 0.6]), jnp.int32(3))
    close(state.deviation(), examples["hadw.sigma"])
    close(state.update(0.7).value, examples["hadw.C_post_eta1"])
    advantages, accuracies = np.array([0.75, -0.25, -0.25, -0.25]), np.array([1, 0, 0, 0])
    weights = hadw_weights(advantages, accuracies, 0.6, group_size=4)
    close(weights, examples["hadw.Phi_lambda1p3"])
    close(accuracies.mean() - 0.6, examples["hadw.diff"])
    close(np.log(weights / 1.3) / abs(examples["hadw.diff"]), examples["hadw.D"])
    close(hadw_advantages(advantages, accuracies, 0.6, group_size=4), examples["hadw.adv"])
    close(mean_accuracy_of_mixed_groups(0.1, 8), examples["hadw.E_phat_given_S_p0p1_G8"])


@pytest.mark.parametrize(("eta", "min_rate"), [(1.0, 0.0), (0.7, 0.0), (30.0, 0.0), (1.0, 0.3), (0.7, 1.0)])
def test_anchor_equals_the_definition(eta, min_rate):
    window, accuracies = 3, [0.2, 0.6, 0.5, 0.9, 0.1, 0.4]
    state, history, anchor = DifficultyAnchor.init(window), [], None
    update = jax.jit(functools.partial(DifficultyAnchor.update, eta=eta, min_rate=min_rate))
    for accuracy in accuracies:
        prior = accuracy if anchor is None else anchor
        close(state.prior(accuracy), prior)
        rate = min(max(eta * (np.std(history[-window:]) if len(history) >= window else 1), min_rate), 1)
        anchor = (1 - rate) * prior + rate * accuracy
        history.append(anchor)
        state = update(state, accuracy)
        close(state.value, anchor)


def test_moving_average_equals_the_definition():
    state, seen = DifficultyAnchor.init(3), []
    for accuracy in [0.2, 0.6, 0.5, 0.9, 0.1]:
        close(state.prior(accuracy), np.mean(seen[-3:]) if seen else accuracy)
        state = jax.jit(DifficultyAnchor.update_moving_average)(state, accuracy)
        seen.append(accuracy)
        close(state.value, np.mean(seen[-3:]))


def test_defaults_of_the_anchor():
    state = DifficultyAnchor.init()
    assert state.history.shape == (10,)
    assert {leaf.dtype.name for leaf in state} == {"float32", "int32"}
    assert {leaf.dtype.name for leaf in state.update(jnp.bfloat16(0.5))} == {"float32", "int32"}
    with pytest.raises(ValueError, match="window is 0: it must be at least 1"):
        DifficultyAnchor.init(0)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0] * 4], bool)
    advantages, accuracies = rng.normal(size=mask.shape), rng.integers(0, 2, size=mask.shape).astype(float)
    advantages[0, 0] = 0
    return {name: np.where(mask, x, np.nan) for name, x in (("advantages", advantages), ("accuracies", accuracies))} | {
        "mask": mask
    }


@pytest.mark.parametrize("labelled", [False, True])
def test_weights_equal_the_definition(data, labelled):
    A, accuracies, mask = data.values()
    labels = np.repeat([3, 1, 4, 9], 4).reshape(4, 4) if labelled else None
    expected = np.full(mask.shape, 1.4)
    for p, i in zip(*np.nonzero(mask), strict=True):
        difference = accuracies[p, mask[p]].mean() - 0.3
        expected[p, i] *= np.exp(-np.sign(A[p, i]) * np.sign(difference) * abs(difference))
    close(hadw_weights(**data, anchor=0.3, scale=1.4, group_ids=labels), expected)
    close(hadw_advantages(**data, anchor=0.3, scale=1.4, group_ids=labels), np.where(mask, expected * A, 0))


@pytest.mark.parametrize("trained", ["advantages", "accuracies"])
def test_holds_of_every_estimator(data, check_estimator, trained):
    data["advantages"][0, 0] = 0.3  # the sign jumps at 0
    check_estimator(lambda **kwargs: hadw_advantages(**kwargs, anchor=0.3), data, trained=trained)


def test_hard_successes_and_easy_failures_count_more():
    easy, hard = np.array([1, 1, 1, 0.0]), np.array([1, 0, 0, 0.0])
    for accuracies, larger in ((easy, [False, False, False, True]), (hard, [True, False, False, False])):
        weights = hadw_weights(accuracies - accuracies.mean(), accuracies, 0.5, group_size=4)
        assert (weights > 1.3).tolist() == larger


@pytest.mark.parametrize("num_samples", [2, 3, 8, 64])
def test_bias_formula_is_the_conditional_expectation(num_samples):
    for p in (1e-3, 0.1, 0.5, 0.73, 0.999):
        chances = np.array([comb(num_samples, k) * p**k * (1 - p) ** (num_samples - k) for k in range(num_samples + 1)])
        mixed = np.arange(1, num_samples)
        expected = (chances[mixed] @ mixed) / num_samples / chances[mixed].sum()
        close(mean_accuracy_of_mixed_groups(p, num_samples), expected)


def test_bias_formula_at_the_ends():
    close(mean_accuracy_of_mixed_groups(np.array([0.0, 1e-30, 1.0]), 4), [0.25, 0.25, 0.75])
    grad = jax.vmap(jax.grad(lambda p: mean_accuracy_of_mixed_groups(p, 4)))(jnp.array([0.0, 1e-6, 0.3, 1.0]))
    assert np.isfinite(grad).all()
    with pytest.raises(ValueError, match="num_samples is 1"):
        mean_accuracy_of_mixed_groups(0.5, 1)


def test_errors(data):
    with pytest.raises(ValueError, match=r"accuracies has shape \(4,\), but advantages has shape \(4, 4\)"):
        hadw_weights(data["advantages"], np.ones(4), 0.5, group_size=4)
