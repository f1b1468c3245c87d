import numpy as np
import pytest

from jaxrl_llm.advantages import optimal_advantages, optimal_values


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def values_loop(rewards, mask, beta):
    values = np.zeros(len(rewards))
    for p, (row, held) in enumerate(zip(rewards, mask, strict=True)):
        if held.any():
            values[p] = beta * np.log(np.mean(np.exp(row[held] / beta)))
    return values


@pytest.fixture
def groups():
    """Five prompts with samples that could not be scored, none left in the third, NaN there."""
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]], bool)
    return {"reference_rewards": np.where(mask, rng.normal(size=mask.shape), np.nan), "mask": mask}


def test_golden_numbers(examples):
    close(optimal_values(np.array([[1, 0, 0, 1], [1, 1, 1, 0]]), beta=0.5), examples["a_star_po.values_beta0p5"])


@pytest.mark.parametrize("beta", [0.05, 0.5, 20.0])
def test_equals_the_definition(groups, beta):
    expected = values_loop(*groups.values(), beta)
    close(optimal_values(**groups, beta=beta), expected)
    rewards = np.random.default_rng(1).normal(size=(5, 4))
    close(optimal_advantages(rewards, **groups, beta=beta), rewards - expected[:, None])


def test_it_is_between_mean_and_maximum():
    rewards = np.array([[0, 0, 1, 0.5], [3, -1, 2, 0]])
    close(optimal_values(rewards, beta=1e3), rewards.mean(1) + 0.5e-3 * rewards.var(1))
    close(optimal_values(rewards, beta=1e-3), rewards.max(1) - 1e-3 * np.log(4))


def test_holds_of_every_estimator(groups, check_estimator):
    check_estimator(optimal_values, groups, trained="reference_rewards")


def test_errors():
    with pytest.raises(ValueError, match="beta is 0: it must be finite and positive"):
        optimal_values(np.ones((2, 3)), beta=0)
    with pytest.raises(ValueError, match=r"rewards has shape \(3, 2\), but reference_rewards has shape \(2, 3\)"):
        optimal_advantages(np.ones((3, 2)), np.ones((2, 3)))
