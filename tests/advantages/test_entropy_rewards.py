import jax
import numpy as np
import pytest

from jaxrl_llm.advantages.entropy import grpo_s_advantages, grpo_s_rewards, gtpo_advantages, gtpo_rewards

ENTROPY = np.array([[3, 1, 2], [1, 3, np.nan], [0.5, 2, 1], [4, 2, np.inf]])
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]], bool)
SUCCESSES = np.array([True, True, False, False])


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def gtpo_loop(entropy, successes, mask, a1, a2, shape_failures, floor=1e-8):
    """[P, G, T]"""
    out = np.zeros(mask.shape)
    for p, i, t in zip(*np.nonzero(mask), strict=True):
        same = [k for k in range(mask.shape[1]) if mask[p, k, t] and successes[p, k] == successes[p, i]]
        H = np.maximum(entropy[p, :, t], floor)
        if successes[p, i]:
            total = sum(entropy[p, k, t] for k in same)
            out[p, i, t] = a1 + (a2 * entropy[p, i, t] / total * len(same) if total else 0)
        elif shape_failures:
            out[p, i, t] = -a1 - a2 * (1 / H[i]) / sum(1 / H[k] for k in same) * len(same)
        else:
            out[p, i, t] = -a1
    return out


def standardize_loop(rewards, mask, successes, norm, ddof, eps, gate=1e-6):
    out = np.zeros(mask.shape)
    for p in range(len(mask)):
        won = mask[p] & successes[p][:, None]
        for part in [mask[p]] if norm == "joint" else [won, mask[p] & ~won]:
            held = rewards[p][part]
            if len(held) > ddof and held.std(ddof=ddof) > gate:
                out[p][part] = (held - held.mean()) / (held.std(ddof=ddof) + eps)
    return out


def test_gtpo_golden_numbers(examples):
    arrays = (ENTROPY[None], SUCCESSES[None], MASK[None])
    close(gtpo_rewards(*arrays)[0], examples["gtpo.shaped_a1_1_a2_0p1"])
    close(gtpo_rewards(*arrays, success_weight=0.9)[0], examples["gtpo.shaped_a1_0p9_a2_0p1"])
    close(gtpo_advantages(*arrays)[0], examples["gtpo.adv_separate"], atol=2e-6)


def test_grpo_s_golden_numbers(examples):
    arrays = (ENTROPY, SUCCESSES, MASK)
    flat = {"group_size": 4}
    means = np.nanmean(np.where(MASK, ENTROPY, np.nan), -1)
    close(means, examples["grpos.mean_entropy"])
    close(grpo_s_rewards(*arrays, **flat), examples["grpos.shaped_b1_1_b2_0p1"])
    close(
        grpo_s_rewards(means[:, None], SUCCESSES, np.ones((4, 1), bool), **flat), examples["grpos.shaped_b1_1_b2_0p1"]
    )
    close(grpo_s_advantages(*arrays, **flat), examples["grpos.adv_group_norm"])


@pytest.mark.parametrize("shape_failures", [True, False])
@pytest.mark.parametrize("labelled", [False, True])
def test_gtpo_equals_the_definition(ragged, shape_failures, labelled):
    entropy = ragged.entropy.copy()
    entropy[0, 0, 0] = 0  # a certain token of a success, and one of a failure
    entropy[1, 0, 0] = 0
    arrays = (entropy, ragged.successes, ragged.mask)
    labels = np.repeat([3, 8, 1, 0], 3).reshape(4, 3) if labelled else None
    options = {"success_weight": 0.9, "entropy_weight": 0.2, "shape_failures": shape_failures, "group_ids": labels}
    expected = gtpo_loop(*arrays, 0.9, 0.2, shape_failures)
    close(gtpo_rewards(*arrays, **options), expected)
    for norm in ("separate", "joint"):
        for ddof in (0, 1):
            A = gtpo_advantages(*arrays, **options, norm=norm, ddof=ddof, eps=1e-3)
            close(A, standardize_loop(expected, ragged.mask, ragged.successes, norm, ddof, 1e-3), atol=1e-5)


@pytest.mark.parametrize("shape_failures", [True, False])
@pytest.mark.parametrize("labelled", [False, True])
def test_grpo_s_equals_the_definition(ragged, shape_failures, labelled):
    arrays = (ragged.entropy, ragged.successes, ragged.mask)
    labels = np.repeat([3, 8, 1, 0], 3).reshape(4, 3) if labelled else None
    options = {"success_weight": 0.9, "entropy_weight": 0.2, "shape_failures": shape_failures, "group_ids": labels}
    has_token = ragged.mask.any(-1)
    means = np.where(has_token, np.where(ragged.mask, ragged.entropy, 0).sum(-1) / np.maximum(ragged.lengths, 1), 0)
    sequences = (means[..., None], ragged.successes, has_token[..., None])
    expected = gtpo_loop(*sequences, 0.9, 0.2, shape_failures)
    close(grpo_s_rewards(*arrays, **options), expected[..., 0])
    for norm in ("separate", "joint"):
        A = grpo_s_advantages(*arrays, **options, norm=norm, eps=1e-3)
        loop = standardize_loop(expected, has_token[..., None], ragged.successes, norm, 1, 1e-3)
        close(A, loop[..., 0], atol=1e-5)


@pytest.mark.parametrize("estimate", [gtpo_advantages, grpo_s_advantages])
@pytest.mark.parametrize("norm", ["separate", "joint"])
def test_holds_of_every_estimator(ragged, check_estimator, estimate, norm):
    arrays = {"entropy": ragged.entropy, "successes": ragged.successes, "mask": ragged.mask}
    check_estimator(lambda **kwargs: estimate(**kwargs, norm=norm, eps=1e-3), arrays)


@pytest.mark.parametrize("estimate", [gtpo_advantages, grpo_s_advantages])
def test_entropy_is_a_constant(ragged, estimate):
    def total(entropy):
        return (estimate(entropy, ragged.successes, ragged.mask) ** 2).sum()

    assert (jax.grad(total)(ragged.entropy) == 0).all()


@pytest.mark.parametrize("norm", ["separate", "joint"])
@pytest.mark.parametrize("value", [0.1, 0.7, 3.3, 0.0])
def test_equal_entropies_teach_nothing(norm, value):
    """The deviation is then a rounding error, which must not be blown up."""
    entropy, mask = np.full((1, 7, 5), value), np.ones((1, 7, 5), bool)
    successes = np.ones((1, 7), bool)
    assert (gtpo_advantages(entropy, successes, mask, norm=norm) == 0).all()
    assert (grpo_s_advantages(entropy, ~successes, mask, norm=norm) == 0).all()


def test_total_reward_is_conserved(ragged):
    """The weights 0.9 and 0.1 give each position of the successes the sum of rewards of 1."""
    rewards = gtpo_rewards(ragged.entropy, ragged.successes, ragged.mask, success_weight=0.9, entropy_weight=0.1)
    won = ragged.mask & ragged.successes[..., None]
    close(np.where(won, rewards, 0).sum(1), won.sum(1))
    lost = ragged.mask & ~won
    close(np.where(lost, rewards, 0).sum(1), -lost.sum(1))


@pytest.mark.parametrize("estimate", [gtpo_advantages, grpo_s_advantages])
@pytest.mark.parametrize("norm", ["separate", "joint"])
def test_added_rewards_are_part_of_what_is_standardized(ragged, estimate, norm):
    """A constant changes nothing, and without an entropy's share what is left is their z-score."""
    arrays = (ragged.entropy, ragged.successes, ragged.mask)
    plain = estimate(*arrays, norm=norm)
    close(estimate(*arrays, norm=norm, added=np.full(ragged.successes.shape, 0.3)), plain, atol=1e-4)
    entropy, mask = np.ones((1, 3, 1)), np.ones((1, 3, 1), bool)
    added, won = np.array([[0.0, -0.5, -1.0]]), np.ones((1, 3), bool)
    A = estimate(entropy, won, mask, norm=norm, ddof=0, added=added)
    close(np.reshape(A, (1, 3)), (added - added.mean()) / added.std(), atol=1e-5)


def test_errors(ragged):
    arrays = (ragged.entropy, ragged.successes, ragged.mask)
    for estimate in (gtpo_advantages, grpo_s_advantages):
        with pytest.raises(ValueError, match="unknown norm 'group': choose one of separate, joint"):
            estimate(*arrays, norm="group")
        with pytest.raises(ValueError, match=r"successes has shape \(3,\), but the tokens have shape \(4, 3, 6\)"):
            estimate(ragged.entropy, ragged.successes[0], ragged.mask)
        with pytest.raises(ValueError, match=r"added has shape \(3,\), but base has shape \(4, 3\)"):
            estimate(*arrays, added=np.zeros(3))
        with pytest.raises(ValueError, match=r"group_ids has shape \(4,\), but mask has shape \(4, 3, 6\)"):
            estimate(*arrays, group_ids=np.zeros(4, int))
