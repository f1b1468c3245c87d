import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.relative import (
    gpg_advantages,
    gpg_alpha,
    max_rl_advantages,
    opo_advantages,
    pass_at_k_advantages,
)

VALID = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0] * 4, [1] * 4, [0, 1, 1, 0]], bool)
LABELS = np.repeat([4, 9, -2, 0, 77, 5], 4).reshape(6, 4)


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


@pytest.fixture
def rewards():
    """Groups with samples that could not be scored, one left, none left, all equal, and ordinary ones."""
    rewards = np.random.default_rng(0).normal(size=(6, 4))
    rewards[4] = 0.1
    return np.where(VALID, rewards, np.nan)


def per_group(rewards, estimate, *others):
    """Applies `estimate` to the valid samples of each group."""
    out = np.zeros(rewards.shape)
    for p in range(len(rewards)):
        held = VALID[p]
        if len(set(rewards[p, held])) > 1:
            out[p, held] = estimate(rewards[p, held], *(x[p, held] for x in others))
    return out


def pass_at_k_loop(group, ddof=1, eps=1e-6, scaled=True):
    second, best = np.sort(group)[-2:]
    out = np.zeros(len(group))
    out[np.argmax(group)] = (best - second) / (group.std(ddof=ddof) + eps if scaled else 1)
    return out


def test_golden_numbers(examples):
    lengths, rewards = np.array([10, 20, 30, 60]), np.array([1, 0, 0, 1])
    A = opo_advantages(rewards, lengths, group_size=4)
    close(A, examples["opo.adv"])
    close(rewards - A, [examples["opo.baseline"]] * 4)
    groups = np.array([[1, 0, 0, 1], [1, 1, 1, 1]])
    close(gpg_alpha(groups), examples["gpg.alpha_paper"])
    close(gpg_advantages(groups), examples["gpg.adv_paper"])
    close(gpg_alpha(groups, alpha_mode="nonzero_rewards"), examples["gpg.alpha_verl_nonzero_rewards"])
    close(gpg_advantages(groups, alpha_mode="nonzero_rewards")[0], [2 / 3, -2 / 3, -2 / 3, 2 / 3])
    close(pass_at_k_advantages(np.array([1, 0, 0, 0.5]), group_size=4), examples["passk.adv"])
    close(max_rl_advantages(np.array([1, 0, 0, 1, 1, 1, 1, 0]), group_size=4).reshape(2, 4), examples["maxrl.adv"])


@pytest.mark.parametrize("labels", [None, LABELS])
def test_equals_the_definition(rewards, labels):
    lengths = np.random.default_rng(1).integers(1, 50, size=(6, 4))
    options = {"mask": VALID, "group_ids": labels}
    expected = per_group(rewards, lambda group, n: group - (n * group).sum() / n.sum(), lengths)
    close(opo_advantages(rewards, lengths, **options), expected)

    alpha = VALID.sum() / (4 + 3 + 2)
    close(gpg_alpha(rewards, **options), alpha)
    close(gpg_alpha(rewards, **options, eps=0.1), 1 / (1 / alpha + 0.1))
    close(
        gpg_alpha(np.round(rewards), alpha_mode="nonzero_rewards", **options),
        14 / np.sum(np.round(rewards[VALID]) != 0),
    )
    close(gpg_advantages(rewards, **options), alpha * per_group(rewards, lambda group: group - group.mean()))

    for ddof in (0, 1):
        expected = per_group(rewards, lambda group, ddof=ddof: pass_at_k_loop(group, ddof))
        close(pass_at_k_advantages(rewards, ddof=ddof, **options), expected)
    expected = per_group(rewards, lambda group: pass_at_k_loop(group, scaled=False))
    close(pass_at_k_advantages(rewards, scale="none", **options), expected)

    for eps in (0.0, 0.5):
        expected = per_group(np.abs(rewards), lambda group, eps=eps: (group - group.mean()) / (group.mean() + eps))
        close(max_rl_advantages(np.abs(rewards), eps=eps, **options), expected)


def test_without_a_success_on_average_max_rl_learns_nothing():
    rewards = np.array([[0, 0, 0], [-1, 1, 0], [-2, -1, 0.5], [0, 0, 1]])
    close(max_rl_advantages(rewards, eps=0), [[0, 0, 0]] * 3 + [[-1, -1, 2]])


def test_max_rl_weighs_a_prompt_by_how_seldom_it_is_solved():
    """Summed over successes, the weight of a prompt is that of ∇log p: G − (number solved), whatever that is."""
    for solved in range(1, 8):
        advantages = np.asarray(max_rl_advantages(np.arange(8) < solved, eps=0, group_size=8))
        close(advantages[:solved].sum(), 8 - solved)


def test_ties_for_the_best_have_no_lead():
    close(pass_at_k_advantages(np.array([[1, 0, 1], [0.3, 0.3, 0.3]])), np.zeros((2, 3)))


def test_alpha_without_any_valid_group_is_zero():
    assert gpg_alpha(np.ones((2, 3))) == gpg_alpha(np.ones((2, 3)), eps=1e-5) == 0
    assert gpg_alpha(np.zeros((2, 3)), alpha_mode="nonzero_rewards") == 0


def opo(rewards, mask):
    return opo_advantages(rewards, np.arange(1, 5)[None] + np.zeros(rewards.shape), mask=mask)


def gpg(rewards, mask):
    return gpg_advantages(rewards, mask=mask)


def pass_at_k(rewards, mask):
    return pass_at_k_advantages(rewards, mask=mask)


def max_rl(rewards, mask):
    return max_rl_advantages(jnp.abs(rewards), mask=mask)


@pytest.mark.parametrize("estimate", [opo, gpg, pass_at_k, max_rl])
def test_holds_of_every_estimator(rewards, check_estimator, estimate):
    rewards[4] = np.random.default_rng(1).normal(size=4)
    check_estimator(estimate, {"rewards": rewards, "mask": VALID}, trained="rewards")


@pytest.mark.parametrize("estimate", [opo, gpg, pass_at_k, max_rl])
def test_a_group_does_not_see_another_one(rewards, estimate):
    changed = rewards.copy()
    changed[0] *= -3
    np.testing.assert_array_equal(estimate(changed, VALID)[1:], estimate(rewards, VALID)[1:])


def test_errors(rewards):
    with pytest.raises(ValueError, match="unknown alpha_mode 'all': choose one of valid_groups, nonzero_rewards"):
        gpg_alpha(rewards, alpha_mode="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown scale 'batch': choose one of group, none"):
        pass_at_k_advantages(rewards, scale="batch")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"lengths has shape \(6,\), but rewards has shape \(6, 4\)"):
        opo_advantages(rewards, np.ones(6))
