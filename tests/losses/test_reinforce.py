import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.reinforce import dro_loss, dro_surrogate, gpg_loss, reinforce_loss, threshold_grpo_loss


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def sequence_loop(data, keep=None, term=lambda lp, lr, A: -A * lp):
    """Mean over the (kept) sequences of a sum over tokens."""
    sums = []
    for row in np.ndindex(data.mask.shape[:-1]):
        valid = np.flatnonzero(data.mask[row])
        if len(valid) and (keep is None or keep[row]):
            lp = data.logprobs[row][valid]
            sums.append(sum(term(lp[i], lp[i] - data.old[row][t], data.advantages[row]) for i, t in enumerate(valid)))
    return np.mean(sums)


def test_golden_numbers(examples, tok):
    args = (tok.logprobs, tok.mask)

    def loss(advantages, **options):
        return reinforce_loss(args[0], advantages, args[1], **options)[0]

    close(loss(np.array([1, -0.5])), examples["reinforce.loss_seq_sum_mean"])
    close(loss(np.array(examples["remax.adv"])), examples["remax.loss"])
    returns = np.array(examples["ppo.return_suffix_seed"])
    close(loss(returns, aggregation="token-mean"), examples["reinforce.token_return_loss"])
    close(gpg_loss(tok.logprobs, tok.advantages, tok.mask)[0], examples["gpg.loss"])
    close(dro_loss(tok.logprobs, tok.old, tok.advantages, tok.mask)[0], examples["dro.loss_beta1"])


def test_threshold_golden_numbers(examples):
    logprobs = np.array([[-2.0], [-3], [-4], [-1], [-2.5]])
    advantages = np.array(examples["seed002.adv"])
    hard, soft = np.array(examples["seed002.hard_keep"]) != 0, np.zeros(5, bool)
    soft[np.array(examples["seed002.soft_T20_keep_index"], int)] = True
    mask = np.ones((5, 1), bool)
    close(threshold_grpo_loss(logprobs, advantages, hard, mask)[0], examples["seed002.hard_loss"])
    close(threshold_grpo_loss(logprobs, advantages, soft, mask)[0], examples["seed002.soft_loss"])


def test_reinforce_equals_the_definition(ragged):
    loss, metrics = reinforce_loss(ragged.logprobs, ragged.advantages, ragged.mask)
    close(loss, sequence_loop(ragged))
    assert metrics == {}
    by_token = (-ragged.token_advantages * ragged.logprobs)[ragged.mask].mean()
    close(gpg_loss(ragged.logprobs, ragged.token_advantages, ragged.mask)[0], by_token)
    # The gradient is the advantage of each token, whatever the length of its sequence.
    grad = jax.grad(lambda x: reinforce_loss(x, ragged.advantages, ragged.mask, aggregation="token-sum")[0])
    close(grad(jnp.float32(ragged.logprobs)), np.where(ragged.mask, -ragged.advantages[..., None], 0))


def test_threshold_equals_the_definition(ragged):
    keep = np.random.default_rng(3).random(ragged.advantages.shape) > 0.4
    assert keep[ragged.mask.any(-1)].sum() < ragged.mask.any(-1).sum()
    loss, _ = threshold_grpo_loss(ragged.logprobs, ragged.advantages, keep, ragged.mask)
    close(loss, sequence_loop(ragged, keep))

    expected = []
    for row in zip(*np.nonzero(keep & ragged.mask.any(-1)), strict=True):
        s = np.exp(np.sum((ragged.logprobs - ragged.old)[row], where=ragged.mask[row]))
        A = ragged.advantages[row]
        expected.append(max(-A * s, -A * np.clip(s, 0.7, 1.3)))
    loss, metrics = threshold_grpo_loss(
        ragged.logprobs, ragged.advantages, keep, ragged.mask, clip=0.3, old_logprobs=ragged.old
    )
    close(loss, np.mean(expected))
    assert metrics["ratio/mean"].count == len(expected)
    nothing = np.zeros_like(keep)
    assert threshold_grpo_loss(ragged.logprobs, ragged.advantages, nothing, ragged.mask)[0] == 0


def test_dro_equals_the_definition(ragged):
    def term(lp, lr, A):
        return -(lp * A - 0.5 * 0.7 * lr**2)

    value, _ = dro_loss(ragged.logprobs, ragged.old, ragged.advantages, ragged.mask, beta=0.7)
    tokens = [
        term(ragged.logprobs[i], (ragged.logprobs - ragged.old)[i], ragged.advantages[i[:-1]])
        for i in zip(*np.nonzero(ragged.mask), strict=True)
    ]
    close(value, np.mean(tokens))
    grad = jax.grad(lambda x, old: dro_surrogate(x, old, 2.0, beta=0.5), argnums=(0, 1))(-1.0, -3.0)
    close(grad, (-(2 - 0.5 * 2), 0))
    close(jax.grad(lambda x: dro_surrogate(x, None, 2.0))(-1.0), -2)


def test_a_weight_of_zero_removes_a_token_whatever_its_loss_is():
    def loss(x):
        return gpg_loss(x, jnp.ones(1), jnp.ones((1, 2), bool), weights=jnp.array([[0.0, 1]]))[0]

    value, grad = jax.value_and_grad(loss)(jnp.array([[-jnp.inf, -1.0]]))
    assert value == 0.5
    assert grad.tolist() == [[0, -0.5]]


@pytest.mark.parametrize("weighted", [False, True])
def test_what_holds_of_every_loss(check_token_loss, ragged_rows, weighted):
    extra = ("weights",) if weighted else ()
    plain = ragged_rows("logprobs", "advantages", "mask", *extra)
    check_token_loss(reinforce_loss, plain, mode="seq-mean-token-sum")
    check_token_loss(gpg_loss, plain, mode="token-mean")
    with_old = ragged_rows("logprobs", "old_logprobs", "advantages", "mask", *extra)
    check_token_loss(dro_loss, with_old, mode="token-mean")


@pytest.mark.parametrize("clip", [None, 0.2])
def test_what_holds_of_every_loss_also_holds_of_the_filtered_one(check_token_loss, ragged_rows, clip):
    def loss(advantages, **arrays):
        # Kept are those with an advantage; the rest does not count as padding, so that all counts are known.
        return threshold_grpo_loss(**arrays, advantages=advantages, keep=advantages > -9, clip=clip)

    check_token_loss(loss, ragged_rows("logprobs", "old_logprobs", "advantages", "mask"), mode="seq-mean-token-sum")


def test_errors(tok):
    with pytest.raises(ValueError, match="keep must be bool, but has dtype float32"):
        threshold_grpo_loss(tok.logprobs, tok.advantages, jnp.ones(2), tok.mask)
    with pytest.raises(ValueError, match=r"keep has shape \(3,\), but the tokens have shape \(2, 4\)"):
        threshold_grpo_loss(tok.logprobs, tok.advantages, np.ones(3, bool), tok.mask)
    with pytest.raises(ValueError, match="beta is -1: it must be finite and not negative"):
        dro_loss(tok.logprobs, tok.old, tok.advantages, tok.mask, beta=-1)
    with pytest.raises(ValueError, match=r"weights has shape \(4,\), but the tokens have shape \(2, 4\)"):
        reinforce_loss(tok.logprobs, tok.advantages, tok.mask, weights=np.ones(4))
    with pytest.raises(ValueError, match=r"weights has shape .* pass one for each token"):
        gpg_loss(tok.logprobs, tok.mask * 1.0, tok.mask, weights=np.ones(2), segment_ids=tok.mask * 1)
