from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm import advantages as functions
from jaxrl_llm.advantages.group import group_advantages, zero_std_groups

REWARDS = np.array([[1, 0, 0, 1], [1, 1, 1, 0]])
SCALES = ["group", "batch", "variance", "none"]
BASELINES = ["mean", "leave_one_out"]


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def advantages_loop(rewards, mask, scale, baseline, ddof, eps):
    out = np.zeros(rewards.shape)
    for p in range(rewards.shape[0]):
        valid = np.flatnonzero(mask[p])
        group = rewards[p, valid]
        if len(set(group)) < 2:
            continue
        for i in valid:
            others = [j for j in valid if baseline == "mean" or j != i]
            divisor = {
                "group": lambda group=group: group.std(ddof=ddof) + eps,
                "batch": lambda: rewards[mask].std(ddof=ddof) + eps,
                "variance": lambda group=group: group.var(ddof=ddof) + eps,
                "none": lambda: 1.0,
            }[scale]()
            out[p, i] = (rewards[p, i] - rewards[p, others].mean()) / divisor
    return out


@pytest.fixture
def ragged():
    """Groups with samples that could not be scored: one left, none left, all equal, and ordinary ones."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(6, 5))
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0] * 5, [1] * 5, [0, 1, 1, 0, 0]], bool)
    rewards[4] = 0.1  # not a binary fraction: the mean of five is not exact
    return np.where(mask, rewards, np.nan), mask


@pytest.mark.parametrize("rewards", [REWARDS, REWARDS.astype(np.float32)])
def test_golden_numbers(rewards, examples):
    close(group_advantages(rewards), examples["grpo.adv_unbiased_1e-4"])
    close(group_advantages(rewards, eps=1e-6), examples["grpo.adv_unbiased_1e-6"])
    close(group_advantages(rewards, ddof=0), examples["grpo.adv_population_1e-4"])
    close(group_advantages(rewards, scale="batch"), examples["grpo.adv_batch_std"])
    close(group_advantages(rewards, scale="variance", eps=0), examples["grpo.adv_seed000_variance"])
    close(group_advantages(rewards, scale="none"), examples["drgrpo.adv"])
    close(group_advantages(rewards, scale="none"), examples["rppb.centered"])
    left_out = group_advantages(rewards, scale="none", baseline="leave_one_out")
    close(left_out, examples["drgrpo.adv_seed003_loo"])
    close(left_out, examples["rloo.adv"])
    close(rewards - left_out, examples["rloo.baseline"])
    close(group_advantages(np.full((1, 4), 0.7)), examples["grpo.adv_degenerate"])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_equals_the_definition(ragged, scale, baseline, ddof):
    rewards, mask = ragged
    options = {"scale": scale, "baseline": baseline, "ddof": ddof, "eps": 1e-3}
    expected = advantages_loop(rewards, mask, **options)
    close(group_advantages(rewards, mask=mask, **options), expected)
    # The same rewards as labelled samples, in another order.
    order = np.random.default_rng(1).permutation(30)
    labels = np.repeat([4, 9, -2, 0, 77, 5], 5)[order]
    flat = group_advantages(rewards.ravel()[order], mask=mask.ravel()[order], group_ids=labels, **options)
    close(flat, expected.ravel()[order])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 0.7])
def test_constant_groups_are_exactly_zero(scale, baseline, value):
    """Also where the mean is off by a rounding error, beside a group that is not constant."""
    rewards = np.full((2, 7), value, np.float32)
    rewards[1, 0] += 1
    out = group_advantages(rewards, scale=scale, baseline=baseline, eps=1e-8)
    assert (out[0] == 0).all()
    assert (out[1] != 0).all()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("case", ["constant", "one", "none"])
def test_degenerate_groups_are_finite_in_value_and_gradient(labelled, case):
    rewards, mask = jnp.full((2, 3), 0.1), jnp.ones((2, 3), bool)
    if case != "constant":
        mask = jnp.arange(6).reshape(2, 3) % 3 < (case == "one")
        rewards = jnp.where(mask, rewards, jnp.nan)
    ids = jnp.array([[0] * 3, [1] * 3]) if labelled else None

    def weighted(rewards):
        out = [
            group_advantages(rewards, scale=scale, baseline=baseline, mask=mask, group_ids=ids, eps=0)
            for scale in SCALES
            for baseline in BASELINES
        ]
        return jnp.sum(jnp.stack(out) * jnp.arange(1.0, 49.0).reshape(8, 2, 3))

    value, grad = jax.jit(jax.value_and_grad(weighted))(rewards)
    assert value == 0
    assert np.isfinite(grad).all()


def test_zero_std_groups(ragged):
    rewards, mask = ragged
    expected = [False, False, True, True, True, False]
    assert zero_std_groups(rewards, mask=mask).tolist() == expected
    by_sample = zero_std_groups(rewards, mask=mask, group_ids=np.repeat([3, 1, 2, 9, 5, 4], 5).reshape(6, 5))
    assert by_sample.tolist() == [[flag] * 5 for flag in expected]
    assert zero_std_groups(np.zeros((2, 3, 1))).tolist() == [[True] * 3] * 2
    # A difference of one rounding unit is a difference: the test is exact.
    assert not zero_std_groups(
        np.array([0.1, np.nextafter(np.float32(0.1), np.float32(1))], np.float32), group_size=2
    ).any()


def test_a_group_does_not_see_another_one(ragged):
    rewards, mask = ragged
    out = group_advantages(rewards, mask=mask)
    for change in (np.nan, np.inf, 100.0):
        changed = rewards.copy()
        changed[0, 1] = change
        np.testing.assert_array_equal(group_advantages(changed, mask=mask)[1:], out[1:])
        ids = np.arange(6)[:, None].repeat(5, 1)
        labelled = group_advantages(changed, mask=mask, group_ids=ids)
        close(labelled[1:], out[1:])
        # A NaN that counts as valid is not hidden.
        if np.isnan(change):
            assert np.isnan(labelled[0]).all()
            assert np.isnan(group_advantages(changed, mask=mask)[0]).all()


def test_permutation_of_groups_and_samples(ragged):
    rewards, mask = ragged
    rows, columns = np.array([3, 1, 5, 0, 4, 2]), np.array([4, 2, 0, 1, 3])
    permuted = group_advantages(rewards[rows][:, columns], mask=mask[rows][:, columns])
    close(permuted, group_advantages(rewards, mask=mask)[rows][:, columns])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("labelled", [False, True])
def test_gradient_equals_finite_differences(scale, labelled):
    with jax.enable_x64(True):
        rewards = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
        weights = np.random.default_rng(1).normal(size=(3, 4))
        ids = np.array([[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]) if labelled else None

        @jax.jit
        def weighted(rewards):
            return jnp.sum(weights * group_advantages(rewards, scale=scale, group_ids=ids))

        check_grads(weighted, (rewards,), order=1, modes=["rev"], eps=1e-6)


def test_jit_vmap_and_half_precision(ragged):
    rewards, mask = jnp.float32(ragged[0]), jnp.asarray(ragged[1])

    def advantages(rewards, mask):
        return group_advantages(rewards, mask=mask, group_size=5)  # under vmap a row is all that there is

    expected = group_advantages(rewards, mask=mask)
    close(jax.jit(advantages)(rewards, mask), expected)
    close(jax.jit(jax.vmap(advantages))(rewards, mask), expected)
    half = rewards.astype(jnp.bfloat16)
    assert advantages(half, mask).dtype == jnp.float32
    np.testing.assert_array_equal(advantages(half, mask), advantages(half.astype(jnp.float32), mask))


def test_errors():
    with pytest.raises(ValueError, match="unknown scale 'std': choose one of group, batch, variance, none"):
        group_advantages(REWARDS, scale="std")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown baseline 'loo': choose one of mean, leave_one_out"):
        group_advantages(REWARDS, baseline="loo")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"rewards has shape \(2, 4\), but mask has shape \(2, 3\)"):
        group_advantages(REWARDS, mask=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"group_ids has shape \(2,\), but mask has shape \(2, 4\)"):
        jax.eval_shape(lambda rewards: group_advantages(rewards, group_ids=np.zeros(2, int)), REWARDS)


FLAT: dict[str, Callable[..., Any]] = {
    "group": lambda x, **how: functions.group_advantages(x, **how),
    "zero_std": lambda x, **how: functions.zero_std_groups(x, **how),
    "mixed": lambda x, **how: functions.keep_mixed_groups(x, **how),
    "threshold": lambda x, **how: functions.threshold_filter(x, **how),
    "gfpo": lambda x, **how: functions.gfpo_advantages(x, -x, keep=2, **how),
    "opo": lambda x, **how: functions.opo_advantages(x, x + 2, **how),
    "gpg": lambda x, **how: functions.gpg_advantages(x, **how),
    "pass_at_k": lambda x, **how: functions.pass_at_k_advantages(x, **how),
    "reinforce++": lambda x, **how: functions.reinforce_plus_plus_baseline_advantages(x, lengths=x + 1, **how),
    "rloo": lambda x, **how: functions.rloo_advantages(
        x, *[x[..., None]] * 2, jnp.ones_like(x[..., None], bool), **how
    ),
    "hadw": lambda x, **how: functions.hadw_advantages(x, x, 0.5, **how),
    "skew": lambda x, **how: functions.brpo_skew(x, **how),
    "reference": lambda x, **how: functions.draw_reference(jax.random.key(0), x >= 0, **how),
    "gdpo": lambda x, **how: functions.gdpo_advantages(jnp.stack([x, x**2], axis=-1), **how),
    "gtpo": lambda x, **how: functions.gtpo_advantages(*_rows(x), **how),
    "grpo_s": lambda x, **how: functions.grpo_s_advantages(*_rows(x), **how),
    "process": lambda x, **how: functions.process_advantages(
        x[..., None], jnp.zeros_like(x[..., None], int), *[jnp.ones_like(x[..., None], bool)] * 2, **how
    ),
    "token_baseline": lambda x, **how: functions.optimal_token_baseline_advantages(
        x[..., None], -x[..., None], 0.5 + 0 * x[..., None], jnp.ones_like(x[..., None], bool), **how
    ),
}


def _rows(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Entropies, successes and a mask: one token a row."""
    return x[..., None] + 0.5, x > 1, jnp.ones_like(x[..., None], bool)


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_batch_says_which_samples_share_a_prompt(name):
    """Twelve rewards of four prompts: `[4, 3]`, or flat with the size of a group, or with labels; never one group."""
    rewards = jnp.array([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 3.0, 0.0], [1.0, 2.0, 3.0]])
    expected, flat = FLAT[name](rewards), rewards.ravel()
    with pytest.raises(
        ValueError, match=r"has shape \(12,.*does not say which (samples|rows) share a prompt: pass group_size="
    ):
        FLAT[name](flat)
    for how in ({"group_size": 3}, {"group_ids": np.repeat(np.arange(4), 3)}):
        for given, wanted in zip(jax.tree.leaves(FLAT[name](flat, **how)), jax.tree.leaves(expected), strict=True):
            if wanted.size == 4:  # one for each group
                wanted = jnp.repeat(wanted, 3)
            np.testing.assert_allclose(jnp.ravel(given), jnp.ravel(wanted), atol=1e-6)
    with pytest.raises(ValueError, match=r"group_size is 5, but .* has shape \(12,\): it must divide the last axis"):
        FLAT[name](flat, group_size=5)
    with pytest.raises(ValueError, match="group_ids and group_size=3 are both given"):
        FLAT[name](flat, group_size=3, group_ids=np.repeat(np.arange(4), 3))
