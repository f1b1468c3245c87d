import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.gae import bootstrap_truncated, gae
from jaxrl_llm.advantages.shaping import mask_after_last, shape_rewards
from jaxrl_llm.masking import whiten


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def gae_loop(rewards, values, mask, gamma, lam, masked_tokens="carry", final=None):
    """One row: the recursion from the end."""
    A, next_value, out = 0.0, 0.0 if final is None else final, np.zeros(len(mask))
    for t in reversed(range(len(mask))):
        if not mask[t]:
            if masked_tokens == "carry":
                continue
            reward, value = 0.0, 0.0
        else:
            reward, value = rewards[t], values[t]
        A = reward + gamma * next_value - value + gamma * lam * A
        next_value = value
        out[t] = A if mask[t] else 0.0
    return out, np.where(mask, out + values, 0.0)


def rows(ragged):
    width = ragged.mask.shape[-1]
    return {
        "token_rewards": ragged.token_rewards.reshape(-1, width),
        "values": ragged.values.reshape(-1, width),
        "mask": ragged.mask.reshape(-1, width),
    }


@pytest.fixture
def rewards(tok):
    return shape_rewards(tok.scores, tok.mask, old_logprobs=tok.old, ref_logprobs=tok.ref, kl_coef=1.0)


def test_golden_numbers(examples, tok, rewards):
    plain = gae(rewards, tok.values, tok.mask, lam=1.0)
    close(plain.advantages, examples["ppo.adv_seed"])
    close(plain.returns, examples["ppo.return_suffix_seed"])
    default = gae(rewards, tok.values, tok.mask)
    close(default.advantages, examples["ppo.gae_g1_l095_adv"])
    close(default.returns, examples["ppo.gae_g1_l095_ret"])
    close(gae(rewards, tok.values, tok.mask, gamma=0.99).advantages, examples["ppo.gae_g099_l095_adv"])
    close(gae(rewards, tok.values, tok.mask, lam=0.0).returns, examples["ppo.td0_return_seed003"])
    close(whiten(default.advantages, tok.mask), examples["ppo.gae_whitened"])


@pytest.mark.parametrize("masked_tokens", ["carry", "zero"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (1.0, 1.0)])
def test_equals_the_definition(ragged, masked_tokens, gamma, lam):
    arrays = rows(ragged)
    out = gae(**arrays, gamma=gamma, lam=lam, masked_tokens=masked_tokens)
    expected = [
        gae_loop(*row, gamma, lam, masked_tokens)
        for row in zip(arrays["token_rewards"], arrays["values"], arrays["mask"], strict=True)
    ]
    close(out.advantages, [pair[0] for pair in expected])
    close(out.returns, [pair[1] for pair in expected])


def test_an_observation_is_skipped_or_a_step_of_zero():
    mask = np.array([True, False, False, True])
    nan = np.nan
    rewards, values = np.array([0.0, nan, nan, 1.0]), np.array([0.5, nan, nan, 0.25])
    carry = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    close(carry.advantages, [0.5 * 0.25 - 0.5 + 0.25 * 0.75, 0, 0, 0.75])
    zero = gae(rewards, values, mask, gamma=0.5, lam=0.5, masked_tokens="zero")
    close(zero.advantages, [-0.5 + 0.25**2 * (0.5 * 0.25 + 0.25 * 0.75), 0, 0, 0.75])


def test_both_rules_agree_on_right_padding(ragged):
    arrays = rows(ragged)
    arrays["mask"] = np.arange(6) < arrays["mask"].sum(-1, keepdims=True)
    arrays = {n: np.nan_to_num(x) for n, x in arrays.items()}
    for one, other in zip(gae(**arrays), gae(**arrays, masked_tokens="zero"), strict=True):
        close(one, other)


@pytest.mark.parametrize("masked_tokens", ["carry", "zero"])
def test_holds_of_every_estimator(ragged, check_estimator, masked_tokens):
    def estimate(**arrays):
        return gae(**arrays, gamma=0.9, lam=0.8, masked_tokens=masked_tokens)

    check_estimator(estimate, rows(ragged), trained="token_rewards", packs=masked_tokens == "carry")


def test_zero_rule_does_not_cross_packed_sequences(ragged):
    arrays = {n: np.concatenate([x[:6], x[6:]], axis=1) for n, x in rows(ragged).items()}
    ids = np.repeat([[0] * 6 + [1] * 6], 6, axis=0)
    packed = gae(**arrays, gamma=0.9, masked_tokens="zero", segment_ids=ids)
    alone = gae(**rows(ragged), gamma=0.9, masked_tokens="zero")
    close(jnp.concatenate([packed.advantages[:, :6], packed.advantages[:, 6:]]), alone.advantages)


def test_truncated_sequences_continue_with_the_value_of_the_next_state(ragged):
    arrays, finished = rows(ragged), ragged.finished.ravel()
    final = np.random.default_rng(3).normal(size=12)
    expected = [
        gae_loop(*row[:3], 0.9, 0.8, final=None if row[3] else row[4])
        for row in zip(arrays["token_rewards"], arrays["values"], arrays["mask"], finished, final, strict=True)
    ]
    final = np.where(finished, np.nan, final)
    shaped = bootstrap_truncated(arrays.pop("token_rewards"), final, finished, arrays["mask"], gamma=0.9)
    out = gae(shaped, **arrays, gamma=0.9, lam=0.8)
    close(out.advantages, [pair[0] for pair in expected])
    close(out.returns, [pair[1] for pair in expected])


def test_bootstrap_holds_of_every_estimator(ragged, check_estimator):
    def shape(**arrays):
        return bootstrap_truncated(**arrays, gamma=0.9)

    arrays = rows(ragged)
    del arrays["values"]
    arrays |= {"finished": ragged.finished.ravel(), "final_values": ragged.greedy.ravel()}
    check_estimator(shape, arrays, trained="token_rewards", packs=True)


def test_score_after_the_last_token_is_a_state_of_its_own(tok):
    """TRL's PPO: the value at the slot behind the last token is a baseline, too."""
    options = {"old_logprobs": tok.old, "ref_logprobs": tok.ref, "kl_coef": 1.0}
    rewards = shape_rewards(tok.scores, tok.mask, **options, score_position="after_last")
    mask = mask_after_last(tok.mask)
    out = gae(rewards, tok.values, mask, lam=0.0)
    close(out.returns[1], [-0.1 - 0.2, -0.1 + 7.0, -0.5, 0])
    close(out.returns[0], gae(rewards, tok.values, tok.mask, lam=0.0).returns[0])


def test_values_are_constants(tok, rewards):
    grad = jax.grad(lambda values: gae(rewards, values, tok.mask).returns.sum())(jnp.nan_to_num(tok.values))
    assert (grad == 0).all()


def test_errors(tok, rewards):
    with pytest.raises(ValueError, match="unknown masked_tokens 'skip': choose one of carry, zero"):
        gae(rewards, tok.values, tok.mask, masked_tokens="skip")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"values has shape \(2, 3\), but mask has shape \(2, 4\)"):
        gae(rewards, tok.values[:, :3], tok.mask)
    with pytest.raises(
        ValueError, match=r"finished has shape \(3,\), but the tokens have shape \(2, 4\): pass one for each"
    ):
        bootstrap_truncated(rewards, tok.scores, np.ones(3, bool), tok.mask)


def test_packed_rows_need_one_end_for_each_sequence(tok):
    ids, tokens = np.zeros((2, 4), int), tok.values
    with pytest.raises(ValueError, match=r"final_values has shape \(2,\), .* with segment_ids"):
        bootstrap_truncated(tokens, tok.scores, np.ones((2, 4), bool), tok.mask, segment_ids=ids)
    with pytest.raises(ValueError, match=r"finished has shape \(2,\), .* with segment_ids"):
        bootstrap_truncated(tokens, tokens, np.ones(2, bool), tok.mask, segment_ids=ids)
