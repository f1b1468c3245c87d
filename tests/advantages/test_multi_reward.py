import numpy as np
import pytest

from jaxrl_llm.advantages.group import group_advantages
from jaxrl_llm.advantages.multi_reward import gdpo_advantages

TWO = np.array([[1, 0, 0, 1], [0, 10, 10, 10]]).T  # [G, K]


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def gdpo_loop(rewards, mask, weights, lengths, normalize_over, ddof, eps):
    total = np.zeros(mask.shape[:2])
    for p, k in np.ndindex(len(mask), mask.shape[-1]):
        held = mask[p, :, k]
        group = rewards[p, held, k]
        if len(group) > ddof and len(set(group)) > 1:
            total[p, held] += weights[k] * (group - group.mean()) / (group.std(ddof=ddof) + eps)
    valid = mask.any(-1)
    if normalize_over == "sequences":
        scale = total[valid].std(ddof=ddof) + eps
        return np.where(valid, (total - total[valid].mean()) / scale, 0)
    tokens = np.repeat(total[valid], lengths[valid])
    return np.where(valid, (total - tokens.mean()) / np.sqrt(tokens.var(ddof=ddof) + 1e-8), 0)


@pytest.fixture
def data():
    """Three rewards; some do not apply, one sample has none, one reward is constant in a group."""
    rng = np.random.default_rng(0)
    rewards, mask = rng.normal(size=(3, 4, 3)) * [1, 10, 0.1], rng.uniform(size=(3, 4, 3)) < 0.8
    mask[1, 2] = False
    mask[0, :2, 1] = True
    rewards[0, :, 1] = 0.1
    lengths = rng.integers(1, 30, size=(3, 4))
    return {"rewards": np.where(mask, rewards, np.nan), "mask": mask, "lengths": lengths}


def test_golden_numbers(examples):
    standardized = [group_advantages(TWO[:, k], eps=1e-6, group_size=4) for k in range(2)]
    close(standardized[0] + standardized[1], examples["gdpo.sum_of_normalised"])
    # Sequences of one token each: what verl whitens.
    out = gdpo_advantages(TWO, normalize_over="tokens", lengths=np.ones(4, int), eps=1e-6, group_size=4)
    close(out, examples["gdpo.batch_whitened"])
    close(gdpo_advantages(TWO, eps=1e-8, group_size=4), examples["gdpo.batch_whitened"], atol=3e-6)
    close(group_advantages(TWO.sum(-1), eps=1e-6, group_size=4), examples["gdpo.grpo_on_summed"])


@pytest.mark.parametrize("normalize_over", ["sequences", "tokens"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("ddof", [0, 1])
def test_equals_the_definition(data, normalize_over, labelled, ddof):
    weights = np.array([1.0, 0.5, -2.0])
    labels = np.repeat([5, 1, 3], 4).reshape(3, 4) if labelled else None
    options = {"normalize_over": normalize_over, "ddof": ddof, "eps": 1e-3}
    expected = gdpo_loop(data["rewards"], data["mask"], weights, data["lengths"], **options)
    close(gdpo_advantages(**data, weights=weights, group_ids=labels, **options), expected)
    ones = gdpo_loop(data["rewards"], data["mask"], np.ones(3), data["lengths"], **options)
    close(gdpo_advantages(**data, group_ids=labels, **options), ones)


@pytest.mark.parametrize("normalize_over", ["sequences", "tokens"])
def test_holds_of_every_estimator(data, check_estimator, normalize_over):
    data["rewards"][0, :, 1] *= np.arange(1, 5)
    check_estimator(lambda **kwargs: gdpo_advantages(**kwargs, normalize_over=normalize_over), data, trained="rewards")


def test_errors(data):
    rewards = data["rewards"]
    with pytest.raises(ValueError, match="unknown normalize_over 'batch': choose one of tokens, sequences"):
        gdpo_advantages(rewards, normalize_over="batch")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match=r"weights has shape \(2,\), but rewards has shape \(3, 4, 3\): pass one a reward"
    ):
        gdpo_advantages(rewards, weights=np.ones(2))
    with pytest.raises(ValueError, match="pass lengths, or 'sequences'"):
        gdpo_advantages(rewards, normalize_over="tokens")
    with pytest.raises(ValueError, match=r"lengths has shape \(3,\), but there are \(3, 4\) samples"):
        gdpo_advantages(rewards, normalize_over="tokens", lengths=np.ones(3))
    with pytest.raises(ValueError, match=r"rewards has shape \(3,\), which does not say which rows share a prompt"):
        gdpo_advantages(rewards[0, 0])
