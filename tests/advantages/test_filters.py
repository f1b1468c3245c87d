import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.filters import (
    gfpo_adaptive_keep,
    gfpo_advantages,
    gfpo_mask,
    keep_mixed_groups,
    threshold_filter,
)

VALID = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0] * 5, [1] * 5, [0, 1, 1, 0, 0]], bool)
LABELS = np.repeat([4, 9, -2, 0, 77, 5], 5).reshape(6, 5)


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


@pytest.fixture
def rewards():
    rewards = np.random.default_rng(0).normal(size=(6, 5))
    rewards[4] = 0.1  # not a binary fraction: the mean of five is not exact
    return np.where(VALID, rewards, np.nan)


def top_loop(x, p, count):
    members = np.flatnonzero(VALID[p])
    ordered = sorted(members, key=lambda i: -x[p, i])
    return ordered[: int(count)]


# ---- dynamic sampling ----


def test_keep_mixed_groups(examples):
    groups = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]])
    close(keep_mixed_groups(groups), examples["dapo.keep_groups"])
    labels = np.repeat([7, 2, 5], 4).reshape(3, 4)
    np.testing.assert_array_equal(keep_mixed_groups(groups, group_ids=labels), [[False] * 4, [False] * 4, [True] * 4])
    unscored = np.array([[1, np.nan, 1, 1], [0, 0, 1, 0], [np.nan] * 4])
    np.testing.assert_array_equal(keep_mixed_groups(unscored, mask=~np.isnan(unscored)), [False, True, False])


# ---- threshold ----


def test_threshold_golden_numbers(examples):
    rewards, logprobs = np.array([1, 0.5, 1, 0, 1]), np.array([-2, -3, -4, -1, -2.5])

    def loss(out):
        return -np.mean((logprobs * np.asarray(out.advantages))[np.asarray(out.keep)])

    hard = threshold_filter(rewards, group_size=5)
    close(rewards - hard.advantages, [examples["seed002.mean"]] * 5)
    close(hard.keep, examples["seed002.hard_keep"])
    close(hard.advantages, examples["seed002.adv"])
    close(loss(hard), examples["seed002.hard_loss"])
    soft = threshold_filter(rewards, threshold="soft", top_percent=20, group_size=5)
    close(np.flatnonzero(soft.keep), examples["seed002.soft_T20_keep_index"])
    close(loss(soft), examples["seed002.soft_loss"])
    soft = threshold_filter(rewards, threshold="soft", top_percent=40, group_size=5)
    close(np.flatnonzero(soft.keep), examples["seed002.soft_T40_keep_index"])


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("top_percent", [None, 1, 20, 50, 100])
@pytest.mark.parametrize("scale", ["none", "group"])
def test_threshold_equals_the_definition(rewards, labels, top_percent, scale):
    keep, advantages = np.zeros(rewards.shape, bool), np.zeros(rewards.shape)
    for p in range(6):
        held = np.flatnonzero(VALID[p])
        if len(held) == 0:
            continue
        mean = rewards[p, held].mean()
        if top_percent is None:
            keep[p, held] = rewards[p, held] > mean + 1e-8
        else:
            keep[p, top_loop(rewards, p, max(np.ceil(top_percent * len(held) / 100), 1))] = True
        if len(set(rewards[p, held])) > 1:
            divisor = rewards[p, held].std(ddof=1) + 1e-4 if scale == "group" else 1
            advantages[p, held] = (rewards[p, held] - mean) / divisor
    threshold = "hard" if top_percent is None else "soft"
    options = {"threshold": threshold, "top_percent": top_percent, "scale": scale, "group_ids": labels}
    out = threshold_filter(rewards, mask=VALID, **options)
    np.testing.assert_array_equal(out.keep, keep)
    close(out.advantages, advantages)


def test_a_share_is_not_rounded_up_by_a_rounding_error():
    rewards = np.arange(100.0)[None]
    for percent in (7, 14, 28, 55, 56):
        assert threshold_filter(rewards, threshold="soft", top_percent=percent).keep.sum() == percent
    assert threshold_filter(rewards, threshold="soft", top_percent=7.5).keep.sum() == 8


@pytest.mark.parametrize("options", [{}, {"threshold": "soft", "top_percent": 40, "scale": "group"}])
def test_threshold_holds_of_every_estimator(rewards, check_estimator, options):
    rewards[4] = np.arange(5)
    arrays = {"rewards": rewards, "mask": VALID}
    check_estimator(lambda **kwargs: threshold_filter(**kwargs, **options), arrays, trained="rewards")


@pytest.mark.parametrize("value", [0.1, -1e4, 0.7, 0.0])
def test_equal_rewards_pass_no_hard_threshold(value):
    assert not threshold_filter(np.full((2, 7), value, np.float32)).keep.any()


# ---- GFPO ----


def test_gfpo_golden_numbers(examples):
    lengths, rewards = np.array([[10, 40, 20, 30]]), np.array([[1, 1, 0, 1]])
    short = gfpo_advantages(rewards, -lengths, keep=2)
    close(short.keep[0], examples["gfpo.short_k2_mask"])
    close(short.advantages[0], examples["gfpo.short_k2_adv"])
    efficient = gfpo_advantages(rewards, rewards / lengths, keep=2)
    close(efficient.keep[0], examples["gfpo.eff_k2_mask"])
    close(efficient.advantages[0], examples["gfpo.eff_k2_adv"])
    close(gfpo_advantages(rewards, -lengths, keep=3).advantages[0], examples["gfpo.short_k3_adv"])


@pytest.mark.parametrize("labels", [None, LABELS])
def test_gfpo_equals_the_definition(rewards, labels):
    metric = np.random.default_rng(1).integers(0, 3, size=rewards.shape).astype(float)  # with ties
    for size in (1, 2, 4, np.array([[1], [2], [3], [1], [5], [1]])):
        sizes = np.broadcast_to(size, (6, 5))
        keep, advantages = np.zeros(rewards.shape, bool), np.zeros(rewards.shape)
        for p in range(6):
            kept = np.array(top_loop(metric, p, sizes[p, 0]), int)
            keep[p, kept] = True
            if len(set(rewards[p, kept])) > 1:
                centred = rewards[p, kept] - rewards[p, kept].mean()
                advantages[p, kept] = centred / (rewards[p, kept].std(ddof=1) + 1e-4)
        out = gfpo_advantages(rewards, metric, keep=size, mask=VALID, group_ids=labels)
        np.testing.assert_array_equal(out.keep, keep)
        np.testing.assert_array_equal(gfpo_mask(metric, keep=size, mask=VALID, group_ids=labels), keep)
        close(out.advantages, advantages)


def test_gfpo_holds_of_every_estimator(rewards, check_estimator):
    rewards[4] = np.arange(5)
    metric = np.where(VALID, np.random.default_rng(1).normal(size=rewards.shape), np.nan)
    arrays = {"rewards": rewards, "metric": metric, "mask": VALID}
    check_estimator(lambda **kwargs: gfpo_advantages(**kwargs, keep=3), arrays, trained="rewards")


def test_gfpo_keeps_more_of_hard_prompts():
    rewards = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    keep = gfpo_adaptive_keep(
        rewards.mean(-1, keepdims=True), boundaries=np.array([0.25, 0.5]), keep=np.array([4, 3, 1])
    )
    np.testing.assert_array_equal(keep, [[4], [3], [1], [1]])
    lengths = np.array([4, 3, 2, 1]) + 0 * rewards
    np.testing.assert_array_equal(gfpo_mask(-lengths, keep=keep).sum(-1), [4, 3, 1, 1])
    adaptive = jax.jit(lambda x: gfpo_adaptive_keep(x, boundaries=np.array([0.25, 0.5]), keep=np.array([4, 3, 1])))
    np.testing.assert_array_equal(adaptive(jnp.bfloat16(0.3)), 3)


def test_errors(rewards):
    with pytest.raises(ValueError, match="unknown threshold 'top': choose one of hard, soft"):
        threshold_filter(rewards, threshold="top")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown scale 'batch': choose one of none, group"):
        threshold_filter(rewards, scale="batch")  # pyright: ignore[reportArgumentType]
    for options in ({"threshold": "soft"}, {"top_percent": 20}):
        with pytest.raises(ValueError, match="it is for 'soft', and needed there"):
            threshold_filter(rewards, **options)
    with pytest.raises(ValueError, match="top_percent is 0: it must be in"):
        threshold_filter(rewards, threshold="soft", top_percent=0)
    with pytest.raises(ValueError, match="keep is 0: it must be at least 1"):
        gfpo_mask(rewards, keep=0)
    with pytest.raises(ValueError, match=r"metric has shape \(6,\), but rewards has shape \(6, 5\)"):
        gfpo_advantages(rewards, np.ones(6), keep=2)
    with pytest.raises(ValueError, match=r"boundaries has shape \(2,\) and keep \(2,\): pass \[K\] and \[K \+ 1\]"):
        gfpo_adaptive_keep(rewards, boundaries=np.ones(2), keep=np.ones(2, int))


def test_the_share_may_be_traced():
    rewards = np.array([[1.0, 0.5, 1.0, 0.0, 1.0]])

    def kept(share):
        return threshold_filter(rewards, threshold="soft", top_percent=share).keep

    np.testing.assert_array_equal(jax.jit(kept)(40.0), kept(40.0))
