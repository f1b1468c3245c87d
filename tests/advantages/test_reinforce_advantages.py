import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.reinforce import (
    EmaBaseline,
    reinforce_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
)
from jaxrl_llm.advantages.shaping import shape_rewards
from jaxrl_llm.masking import masked_mean, masked_sum, suffix_sum

REWARDS = np.array([[1, 0, 0, 1], [1, 1, 1, 0]])


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def returns_loop(rewards, mask, gamma):
    out = np.zeros(mask.shape)
    for row in np.ndindex(mask.shape[:-1]):
        tokens = np.flatnonzero(mask[row])
        for i, t in enumerate(tokens):
            out[row][t] = sum(gamma**j * rewards[row][k] for j, k in enumerate(tokens[i:]))
    return out


def whiten_loop(x, mask, ddof):
    held = x[mask]
    return np.where(mask, (x - held.mean()) / np.sqrt(held.var(ddof=ddof) + 1e-8), 0)


def test_reinforce_golden_numbers(examples, tok):
    logprobs = np.nan_to_num(tok.logprobs)
    rewards = shape_rewards(tok.scores, tok.mask, old_logprobs=tok.old, ref_logprobs=tok.ref, kl_coef=1.0)
    A = reinforce_advantages(rewards, tok.mask)
    close(masked_mean(-logprobs * A, tok.mask), examples["reinforce.token_return_loss"])
    # The score alone: one number for all tokens of a sequence.
    A = reinforce_advantages(shape_rewards(tok.scores, tok.mask, kl_coef=0), tok.mask)
    close(A, np.where(tok.mask, tok.scores[:, None], 0))
    close(masked_sum(-logprobs * A, tok.mask, -1).mean(), examples["reinforce.loss_seq_sum_mean"])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_equals_the_definition(ragged, gamma):
    expected = returns_loop(ragged.token_rewards, ragged.mask, gamma)
    close(reinforce_advantages(ragged.token_rewards, ragged.mask, gamma=gamma), expected)
    for baseline in (0.5, ragged.scores, ragged.values):
        out = reinforce_advantages(ragged.token_rewards, ragged.mask, gamma=gamma, baseline=baseline)
        subtracted = baseline[..., None] if np.ndim(baseline) == 2 else baseline
        close(out, np.where(ragged.mask, expected - subtracted, 0))


def test_reinforce_holds_of_every_estimator(ragged, check_estimator):
    arrays = {"token_rewards": ragged.token_rewards, "mask": ragged.mask, "baseline": ragged.values}
    arrays = {name: x.reshape(12, 6) for name, x in arrays.items()}
    check_estimator(
        lambda **kwargs: reinforce_advantages(**kwargs, gamma=0.9), arrays, trained="token_rewards", packs=True
    )


def test_baseline_is_a_constant(ragged):
    def total(baseline):
        return reinforce_advantages(ragged.token_rewards, ragged.mask, baseline=baseline).sum()

    assert jax.grad(total)(1.0) == 0


def test_ema_baseline():
    state, batches, decay = EmaBaseline.init(), [np.array([1.0, 3.0]), np.array([0.0]), np.array([5.0, 5.0, 5.0])], 0.8
    assert state.value() == 0
    seen = []
    for rewards in batches:
        state = jax.jit(lambda state, rewards: state.update(rewards, decay=decay))(state, rewards)
        seen.append(rewards.mean())
        weights = decay ** np.arange(len(seen))[::-1]
        close(state.value(), weights @ seen / weights.sum())
    # What could not be scored is not counted; a batch of nothing changes nothing.
    masked = state.update(np.array([2.0, np.nan]), decay=decay, mask=np.array([True, False]))
    close(masked.value(), state.update(2.0, decay=decay).value())
    unscored = state.update(np.array([np.nan]), decay=decay, mask=np.array([False]))
    assert jax.tree.map(float, unscored) == jax.tree.map(float, state)
    assert state.update(jnp.ones(3, jnp.bfloat16), decay=decay).total.dtype == jnp.float32
    with pytest.raises(ValueError, match="decay is 1: it must be in"):
        state.update(1.0, decay=1)


def test_plus_plus_golden_numbers(examples, tok):
    options = {"old_logprobs": tok.old, "ref_logprobs": tok.ref, "kl_coef": 0.05}
    returns = suffix_sum(shape_rewards(tok.scores, tok.mask, **options), tok.mask)
    close(returns, examples["rpp.returns_beta0p05"])
    close(reinforce_plus_plus_advantages(tok.scores, tok.mask, **options), examples["rpp.adv"])


@pytest.mark.parametrize(("gamma", "ddof"), [(1.0, 1), (0.9, 0)])
def test_plus_plus_equals_the_definition(ragged, gamma, ddof):
    rewards = -0.01 * (ragged.old - ragged.ref)
    for row in np.ndindex(ragged.scores.shape):
        for t in np.flatnonzero(ragged.mask[row])[-1:]:
            rewards[row][t] += ragged.scores[row]
    expected = whiten_loop(returns_loop(rewards, ragged.mask, gamma), ragged.mask, ddof)
    logprobs = {"old_logprobs": ragged.old, "ref_logprobs": ragged.ref}
    close(reinforce_plus_plus_advantages(ragged.scores, ragged.mask, **logprobs, gamma=gamma, ddof=ddof), expected)


def test_plus_plus_on_rewards_of_tokens(ragged):
    earned = np.where(ragged.mask, ragged.values, np.nan)
    returns = returns_loop(np.where(ragged.mask, ragged.values, 0) - 0.01 * (ragged.old - ragged.ref), ragged.mask, 0.9)
    logprobs = {"old_logprobs": ragged.old, "ref_logprobs": ragged.ref}
    given = reinforce_plus_plus_advantages(None, ragged.mask, token_rewards=earned, **logprobs, gamma=0.9)
    close(given, whiten_loop(returns, ragged.mask, 1))
    with pytest.raises(ValueError, match="neither scores nor token_rewards"):
        reinforce_plus_plus_advantages(None, ragged.mask, kl_coef=0)


def test_plus_plus_holds_of_every_estimator(ragged, check_estimator):
    arrays = {"mask": ragged.mask, "old_logprobs": ragged.old, "ref_logprobs": ragged.ref}
    arrays = {name: x.reshape(12, 6) for name, x in arrays.items()} | {"scores": ragged.scores.ravel()}
    check_estimator(reinforce_plus_plus_advantages, arrays, trained="scores", packs=True)


def test_plus_plus_baseline_golden_numbers(examples):
    out = reinforce_plus_plus_baseline_advantages(REWARDS, normalize_over="sequences")
    close(out, examples["rppb.adv_seq_unbiased"])
    # Sequences of one token each: both ways of counting are the same.
    close(reinforce_plus_plus_baseline_advantages(REWARDS, lengths=np.ones((2, 4), int)), out)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("labelled", [False, True])
def test_plus_plus_baseline_equals_the_definition(ragged, ddof, labelled):
    """Over tokens: every token of a sequence holds its advantage, and all tokens are whitened together."""
    valid = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 1, 0]], bool)
    rewards = np.where(valid, ragged.scores, np.nan)
    ids = np.repeat([7, 3, 5, 1], 3).reshape(4, 3) if labelled else None
    options = {"ddof": ddof, "mask": valid, "group_ids": ids}
    centred = np.where(valid, rewards - np.nanmean(rewards, -1, keepdims=True), 0)
    out = reinforce_plus_plus_baseline_advantages(rewards, normalize_over="sequences", **options)
    close(out, whiten_loop(centred, valid, ddof))
    tokens = ragged.mask & valid[..., None]
    expected = whiten_loop(np.broadcast_to(centred[..., None], tokens.shape), tokens, ddof)
    out = reinforce_plus_plus_baseline_advantages(rewards, lengths=ragged.lengths, **options)
    close(np.where(tokens, np.asarray(out)[..., None], 0), expected)


@pytest.mark.parametrize("normalize_over", ["tokens", "sequences"])
def test_plus_plus_baseline_holds_of_every_estimator(ragged, check_estimator, normalize_over):
    def estimate(**arrays):
        return reinforce_plus_plus_baseline_advantages(**arrays, normalize_over=normalize_over)

    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 0, 0]], bool)
    arrays = {"rewards": ragged.scores, "lengths": ragged.lengths, "mask": mask}
    check_estimator(estimate, arrays, trained="rewards")


def test_errors(ragged):
    with pytest.raises(ValueError, match="unknown normalize_over 'rows': choose one of tokens, sequences"):
        reinforce_plus_plus_baseline_advantages(REWARDS, normalize_over="rows")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="pass lengths, or 'sequences'"):
        reinforce_plus_plus_baseline_advantages(REWARDS)
    with pytest.raises(ValueError, match=r"lengths has shape \(2, 3\), but mask has shape \(2, 4\)"):
        reinforce_plus_plus_baseline_advantages(REWARDS, lengths=np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"baseline has shape \(4,\), but the tokens have shape \(4, 3, 6\)"):
        reinforce_advantages(ragged.token_rewards, ragged.mask, baseline=np.zeros(4))


def test_packed_rows_need_one_baseline_for_each_sequence(tok):
    with pytest.raises(ValueError, match=r"baseline has shape \(2,\), .* with segment_ids"):
        reinforce_advantages(tok.values, tok.mask, baseline=tok.scores, segment_ids=np.zeros((2, 4), int))
