import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.shaping import mask_after_last, overlong_penalty, rlhf_reward, shape_rewards
from jaxrl_llm.masking import masked_sum, suffix_sum


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


KL = {
    "k1": lambda d: d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: np.exp(-d) - 1 + d,
    "abs": np.abs,
}


def rewards_loop(scores, mask, old, ref, kl_coef, estimator="k1", position="last"):
    out = np.zeros(mask.shape)
    for row in np.ndindex(mask.shape[:-1]):
        tokens = np.flatnonzero(mask[row])
        for t in tokens:
            out[row][t] -= kl_coef * KL[estimator](old[row][t] - ref[row][t])
        if len(tokens):
            slot = tokens[-1]
            if position == "after_last" and slot + 1 < mask.shape[-1]:
                slot += 1
            out[row][slot] += scores[row]
    return out


def rows(ragged, *names):
    every = {"mask": ragged.mask, "old_logprobs": ragged.old, "ref_logprobs": ragged.ref}
    every |= {"scores": ragged.scores, "finished": ragged.finished}
    return {n: every[n].reshape(-1, *every[n].shape[2:]) for n in names}


def test_shape_rewards_golden_numbers(examples, tok):
    def shaped(**options):
        return shape_rewards(tok.scores, tok.mask, old_logprobs=tok.old, ref_logprobs=tok.ref, **options)

    close(shaped(kl_coef=1.0), examples["ppo.reward_seed_coef1"])
    close(shaped(), examples["ppo.reward_coef0p05"])
    close(suffix_sum(shaped(kl_coef=1.0), tok.mask), examples["ppo.return_suffix_seed"])


def test_rlhf_reward_golden_numbers(examples, tok):
    close(rlhf_reward(np.zeros(2), tok.old, tok.ref, tok.mask, kl_coef=-1.0), examples["rloo.seq_kl_k1"])
    close(rlhf_reward(tok.scores, tok.old, tok.ref, tok.mask), examples["rloo.reward_with_kl_beta0p05"])


@pytest.mark.parametrize("estimator", list(KL))
@pytest.mark.parametrize("position", ["last", "after_last"])
def test_shape_rewards_equals_the_definition(ragged, estimator, position):
    arrays = (ragged.scores, ragged.mask)
    logprobs = {"old_logprobs": ragged.old, "ref_logprobs": ragged.ref}
    out = shape_rewards(*arrays, **logprobs, kl_coef=0.3, kl_estimator=estimator, score_position=position)
    close(out, rewards_loop(*arrays, ragged.old, ragged.ref, 0.3, estimator, position))
    if position == "last":
        total = rlhf_reward(ragged.scores, ragged.old, ragged.ref, ragged.mask, kl_coef=0.3, kl_estimator=estimator)
        has_token = ragged.mask.any(-1)
        close(np.where(has_token, total, 0), masked_sum(out, ragged.mask, -1))


def test_without_a_kl_no_logprobs_are_needed(ragged):
    out = shape_rewards(ragged.scores, ragged.mask, kl_coef=0)
    close(out, rewards_loop(ragged.scores, ragged.mask, ragged.old, ragged.ref, 0))
    close(rlhf_reward(ragged.scores, ragged.old, ragged.ref, ragged.mask, kl_coef=0), ragged.scores)


def test_clip_comes_before_the_penalty_for_a_missing_end():
    mask = np.ones((3, 2), bool)
    finished = np.array([True, False, False])
    options = {"score_clip": 2.0, "missing_eos_penalty": 1.5, "finished": finished, "kl_coef": 0}
    out = shape_rewards(np.array([5.0, 5.0, -7.0]), mask, **options)
    close(out, [[0, 2], [0, 0.5], [0, -3.5]])


def test_kl_of_a_token_is_bounded(tok):
    out = shape_rewards(tok.scores * 0, tok.mask, old_logprobs=tok.old, ref_logprobs=tok.ref, kl_coef=1, kl_clip=0.15)
    close(out, [[0.1, -0.15, -0.15, -0.1], [-0.1, -0.1, 0, 0]])
    total = rlhf_reward(tok.scores, tok.old, tok.ref, tok.mask, kl_coef=1, kl_clip=0.15, score_clip=0.7)
    close(total, [0.7 - 0.3, -0.5 - 0.2])


@pytest.mark.parametrize("position", ["last", "after_last"])
def test_shape_rewards_holds_of_every_estimator(ragged, check_estimator, position):
    def shape(**arrays):
        return shape_rewards(**arrays, kl_estimator="k3", missing_eos_penalty=1.0, score_position=position)

    arrays = rows(ragged, "scores", "mask", "old_logprobs", "ref_logprobs", "finished")
    check_estimator(shape, arrays, trained="scores", packs=True)


def test_rlhf_reward_holds_of_every_estimator(ragged, check_estimator):
    arrays = rows(ragged, "scores", "mask", "old_logprobs", "ref_logprobs")
    check_estimator(lambda **kwargs: rlhf_reward(**kwargs, kl_estimator="k2"), arrays, trained="scores")


def test_logprobs_are_constants(tok):
    def total(old, ref):
        rewards = shape_rewards(tok.scores, tok.mask, old_logprobs=old, ref_logprobs=ref)
        return rewards.sum() + rlhf_reward(tok.scores, old, ref, tok.mask).sum()

    for grad in jax.grad(total, argnums=(0, 1))(jnp.asarray(tok.old), jnp.asarray(tok.ref)):
        assert (grad == 0).all()


def test_overlong_golden_numbers(examples):
    lengths = [80, 81, 90, 100, 101]
    close(overlong_penalty(lengths, max_length=100, cache=20), examples["dapo.overlong_100_20_at_80_81_90_100_101"])
    close(overlong_penalty(18432, max_length=20480, cache=4096), examples["dapo.overlong_20480_4096_at_18432"])
    close(overlong_penalty(110, max_length=100, cache=20, capped=False), examples["dapo.verl_uncapped_at_110"])
    close(overlong_penalty(110, max_length=100, cache=20), examples["dapo.openrlhf_capped_at_110"])


def test_overlong_penalty_equals_the_definition():
    lengths, size, cache = np.arange(40), 30, 7

    def loop(n):
        if n <= size - cache:
            return 0.0
        return (size - cache - n) / cache if n <= size else -1.0

    penalty = overlong_penalty(lengths, max_length=size, cache=cache, scale=2.0)
    close(penalty, [2 * loop(n) for n in lengths])
    close(jax.jit(lambda n: overlong_penalty(n, max_length=size, cache=cache, scale=2.0))(lengths), penalty)
    assert overlong_penalty(jnp.ones(3, jnp.bfloat16), max_length=2, cache=1).dtype == jnp.float32


def test_mask_after_last():
    mask = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], bool)
    expected = [[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]
    np.testing.assert_array_equal(mask_after_last(mask), np.array(expected, bool))
    # In a packed row, a full sequence has no room before the next one.
    packed, ids = np.array([1, 1, 1, 0, 0, 1], bool), np.array([0, 0, 1, 1, 1, 2])
    expected = np.array([1, 1, 1, 1, 0, 1], bool)
    np.testing.assert_array_equal(mask_after_last(packed, segment_ids=ids), expected)
    packed[2] = False
    expected = np.array([1, 1, 0, 0, 0, 1], bool)
    np.testing.assert_array_equal(mask_after_last(packed, segment_ids=ids), expected)


def test_errors(tok):
    args, logprobs = (tok.scores, tok.mask), {"old_logprobs": tok.old, "ref_logprobs": tok.ref}
    with pytest.raises(ValueError, match=r"kl_coef is 0.05, but there are no ref_logprobs: pass them, or kl_coef=0"):
        shape_rewards(*args, old_logprobs=tok.old)
    with pytest.raises(
        ValueError, match="unknown KL estimator in the reward 'k3-ratio': choose one of k1, k2, k3, abs"
    ):
        shape_rewards(*args, **logprobs, kl_estimator="k3-ratio")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown score_position 'first': choose one of last, after_last"):
        shape_rewards(*args, **logprobs, score_position="first")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"missing_eos_penalty is 1\.0, but there is no finished: pass it"):
        shape_rewards(*args, **logprobs, missing_eos_penalty=1.0)
    with pytest.raises(
        ValueError, match=r"scores has shape \(3,\), but the tokens have shape \(2, 4\): pass one for each token"
    ):
        shape_rewards(np.zeros(3), tok.mask, **logprobs)
    with pytest.raises(ValueError, match="with segment_ids a row holds several sequences"):
        shape_rewards(*args, **logprobs, segment_ids=np.zeros((2, 4), int))
    with pytest.raises(
        ValueError, match=r"scores has shape \(2, 4\), but mask has shape \(2, 4\): pass one a sequence"
    ):
        rlhf_reward(tok.mask * 1.0, tok.old, tok.ref, tok.mask)
    with pytest.raises(ValueError, match="cache is 0 and max_length 10"):
        overlong_penalty(3, max_length=10, cache=0)
    with pytest.raises(ValueError, match="cache is 11 and max_length 10"):
        overlong_penalty(3, max_length=10, cache=11)


def test_packed_rows_need_one_end_for_each_sequence(tok):
    ids = np.zeros((2, 4), int)
    with pytest.raises(ValueError, match=r"finished has shape \(2,\), .* with segment_ids"):
        shape_rewards(
            tok.values, tok.mask, kl_coef=0, missing_eos_penalty=1.0, finished=np.ones(2, bool), segment_ids=ids
        )


def test_limits_may_be_traced():
    lengths = np.array([3.0, 7.0, 9.0])
    value = jax.jit(lambda limit, cache: overlong_penalty(lengths, max_length=limit, cache=cache))(8, 4)
    np.testing.assert_allclose(value, overlong_penalty(lengths, max_length=8, cache=4))
