import numpy as np
import pytest

from jaxrl_llm.advantages import hierarchical_advantages, rae_advantages


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def played():
    """Samples of three roles, five episodes and two tasks, some of which could not be scored."""
    rng = np.random.default_rng(0)
    mask = rng.random((6, 5)) < 0.8
    episodes = rng.integers(0, 5, mask.shape)
    return {
        "rewards": np.where(mask, rng.normal(size=mask.shape), np.nan),
        "roles": rng.integers(0, 3, mask.shape),
        "episodes": episodes,
        "tasks": episodes % 2,
        "mask": mask,
    }


def rae_loop(rewards, roles, baselines, mask, decay):
    baselines, out = np.array(baselines, float), np.zeros(rewards.shape)
    for i in np.ndindex(rewards.shape):
        if mask[i]:
            out[i] = rewards[i] - baselines[roles[i]]
            baselines[roles[i]] = decay * baselines[roles[i]] + (1 - decay) * rewards[i]
    return out, baselines


def hierarchical_loop(rewards, roles, episodes, tasks, mask, episode_roles):
    out = np.zeros(rewards.shape)
    for i in np.argwhere(mask):
        i = tuple(i)
        peers = [
            rewards[j]
            for j in map(tuple, np.argwhere(mask))
            if roles[j] == roles[i] and tasks[j] == tasks[i]
            and (episodes[j] == episodes[i] or roles[i] not in episode_roles)
        ]  # fmt: skip
        out[i] = rewards[i] - np.mean(peers)
    return out


def test_golden_numbers(examples):
    found = rae_advantages(np.array([1, -1, 1, -1]), np.array([0, 1, 0, 1]), np.zeros(2), decay=0.9)
    close(found.advantages, examples["rae.adv_decay0p9"])
    close(found.baselines, examples["rae.baselines_decay0p9"])
    roles, episodes = np.array([0, 1, 1, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 1])
    rewards = np.array([0.5, 1, 0, 0, 1, 1])
    A = hierarchical_advantages(rewards, roles, episodes, np.zeros(6, int), episode_roles=[1])
    close(A, examples["hierarchical.adv"])


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_rae_equals_the_definition(played, decay):
    start = np.array([0.5, -1.0, 0.0])
    rewards, roles, mask = (played[name] for name in ("rewards", "roles", "mask"))
    advantages, baselines = rae_loop(rewards, roles, start, mask, decay)
    found = rae_advantages(rewards, roles, start, decay=decay, mask=mask)
    close(found.advantages, advantages)
    close(found.baselines, baselines)


@pytest.mark.parametrize("episode_roles", [(), (1,), (0, 2)])
def test_hierarchical_equals_the_definition(played, episode_roles):
    expected = hierarchical_loop(**played, episode_roles=episode_roles)
    close(hierarchical_advantages(**played, episode_roles=episode_roles), expected)


def test_hierarchical_holds_of_every_estimator(played, check_estimator):
    check_estimator(lambda **given: hierarchical_advantages(**given, episode_roles=(1,)), played)


def test_a_role_that_always_loses_is_not_pushed_down():
    """Its baseline goes where its rewards are; with one baseline for both roles the loser's advantage would stay."""
    roles = np.tile([0, 1], 200)
    found = rae_advantages(np.where(roles == 0, 1.0, -1.0), roles, np.zeros(2))
    close(found.advantages[-2:], np.array([1, -1]) * 0.95**199)


def test_errors(played):
    with pytest.raises(ValueError, match=r"decay is 1: it must be in \[0, 1\)"):
        rae_advantages(np.ones(2), np.zeros(2, int), np.zeros(1), decay=1)
    with pytest.raises(ValueError, match="roles has shape"):
        rae_advantages(np.ones(2), np.zeros(3, int), np.zeros(1))
    with pytest.raises(ValueError, match="tasks has shape"):
        hierarchical_advantages(**(played | {"tasks": np.zeros(3)}), episode_roles=(1,))
