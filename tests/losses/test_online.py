import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.dpo import dpo_loss
from jaxrl_llm.losses.online import label_pairs, nash_md_loss, nash_md_mixture_logprobs, xpo_loss


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def test_golden_numbers(examples, tok, pref):
    args = (tok.logprobs, tok.ref, np.array([0.7, 0.4]), tok.mask)
    close(nash_md_loss(*args)[0], examples["nashmd.loss_beta0p1_trl"])
    close(nash_md_loss(*args, kl_level="sequence")[0], examples["nashmd.loss_beta0p1_seq"])
    mixture = nash_md_mixture_logprobs(np.array([2.0, 1, 0]), np.array([0.0, 1, 1]))
    close(mixture, examples["nashmd.mixture_logprobs_c0p5"])
    pairs = (pref.chosen, pref.rejected, pref.ref_chosen, pref.ref_rejected)
    loss, metrics = xpo_loss(*pairs, np.array([-10.5, -12]))
    close(loss, examples["xpo.loss_alpha1e-5"])
    close(metrics["logps/ref_sample"].value(), -11.25)
    close(metrics["rewards/chosen"].value(), np.mean(examples["dpo.rewards_w_l"][0]))


def test_pairs_are_the_best_and_the_worst_and_ties_go_to_the_first():
    rewards = np.array([[1.0, 2], [2, 1], [1, 1], [np.nan, 1]])
    mask = np.array([[True, True], [True, True], [True, True], [False, True]])
    pair = label_pairs(rewards, mask=mask)
    assert pair.chosen[:3].tolist() == [1, 0, 0]
    assert pair.rejected[:3].tolist() == [0, 1, 1]
    assert pair.mask.tolist() == [True, True, True, False]
    groups = np.array([[3.0, 1, 3, 1], [np.inf, 7, 5, -np.inf], [2, 2, 2, 2]])
    mask = np.array([[True] * 4, [False, True, True, False], [True] * 4])
    pair = jax.jit(label_pairs)(groups, mask=mask)
    assert pair.chosen.tolist() == [0, 1, 0]
    assert pair.rejected.tolist() == [3, 2, 3]
    assert pair.mask.all()
    assert label_pairs(groups[0]).chosen == 0
    with pytest.raises(ValueError, match=r"rewards has shape \(3, 4\), but mask has shape \(4,\)"):
        label_pairs(groups, mask=mask[0])


def test_online_dpo_is_dpo_on_the_labelled_pairs():
    """As TRL pairs them: the first completion is the chosen one unless the second has a larger reward."""
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 3, size=(9, 2)).astype(float)
    logprobs, ref = rng.normal(size=(9, 2)) - 8, rng.normal(size=(9, 2)) - 8
    pair = label_pairs(rewards)
    losses = []
    for row in range(9):
        w = 0 if rewards[row, 0] >= rewards[row, 1] else 1
        h = logprobs[row, w] - ref[row, w] - logprobs[row, 1 - w] + ref[row, 1 - w]
        losses.append(np.log1p(np.exp(-0.1 * h)))
    close(dpo_loss(*pair.select(logprobs), *pair.select(ref), mask=pair.mask)[0], np.mean(losses))


@pytest.mark.parametrize("kl", ["token", "sequence"])
def test_nash_md_equals_the_definition(ragged, kl):
    win_probs = np.random.default_rng(0).uniform(size=ragged.mask.shape[:-1])
    values, expected_gradient = [], np.zeros(ragged.mask.shape)
    for row in np.ndindex(win_probs.shape):
        tokens = np.flatnonzero(ragged.mask[row])
        if not len(tokens):
            continue
        lp = ragged.logprobs[row][tokens]
        d = lp - ragged.ref[row][tokens]
        score = np.full(len(tokens), d.sum()) if kl == "sequence" else d
        values.append(-(win_probs[row] - 0.5) * lp.sum() + 0.2 * (score * lp).sum())
        expected_gradient[row][tokens] = -(win_probs[row] - 0.5) + 0.2 * score

    def loss(logprobs):
        return nash_md_loss(logprobs, ragged.ref, win_probs, ragged.mask, kl_coef=0.2, kl_level=kl)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.float32(ragged.logprobs))
    close(value, np.mean(values))
    close(gradient, expected_gradient / len(values))
    close(metrics["kl"].value(), (ragged.logprobs - ragged.ref)[ragged.mask].mean())
    close(metrics["win_prob"].value(), win_probs[ragged.mask.any(-1)].mean())


@pytest.mark.parametrize("kl", ["token", "sequence"])
def test_nash_md_as_every_loss_of_tokens(ragged_rows, check_token_loss, kl):
    arrays = ragged_rows("logprobs", "ref_logprobs", "mask")
    arrays["win_probs"] = np.random.default_rng(0).uniform(size=len(arrays["mask"]))

    def loss(**arrays):
        return nash_md_loss(**arrays, kl_level=kl)

    # The log-ratio that multiplies is a constant: the gradient is tested above.
    check_token_loss(loss, arrays, mode="seq-mean-token-sum", detached=True)


@pytest.mark.parametrize("kl", ["token", "sequence"])
def test_the_expected_gradient_of_nash_md_is_that_of_the_kl(kl):
    """Sequences of two tokens from a Markov policy, all of them: exact for "sequence"; a part of it for "token"."""
    rng = np.random.default_rng(0)
    theta, ref = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)

    def logprobs_of(theta):  # [9, 2]: the first token from state 0, the second from the state after it
        table = jax.nn.log_softmax(theta)
        first, second = np.divmod(np.arange(9), 3)
        return jnp.stack([table[0, first], table[1 + first, second]], -1)

    ref_logprobs = logprobs_of(ref)

    def exact(theta):
        lp = logprobs_of(theta)
        return jnp.sum(jnp.exp(lp.sum(-1)) * (lp - ref_logprobs).sum(-1))

    def estimated(theta):
        lp = logprobs_of(theta)
        weights = jax.lax.stop_gradient(jnp.exp(lp.sum(-1)))

        def one(lp, ref):
            half, every = jnp.full(1, 0.5), jnp.ones((1, 2), bool)
            return nash_md_loss(lp[None], ref[None], half, every, kl_coef=1.0, kl_level=kl)[0]

        return jnp.sum(weights * jax.vmap(one)(lp, ref_logprobs))

    exact_gradient, estimate = jax.grad(exact)(theta), jax.grad(estimated)(theta)
    if kl == "sequence":
        close(estimate, exact_gradient)
    else:
        close(estimate[1:], exact_gradient[1:])
        assert np.abs(estimate[0] - exact_gradient[0]).max() > 1e-2


def test_mixture_has_both_policies_at_its_ends():
    rng = np.random.default_rng(0)
    logits, ref = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 5))
    close(nash_md_mixture_logprobs(logits, ref, mixture_coef=0), jax.nn.log_softmax(logits))
    close(nash_md_mixture_logprobs(logits, ref, mixture_coef=1), jax.nn.log_softmax(ref))
    mixed = np.exp(logits) ** 0.7 * np.exp(ref) ** 0.3
    close(nash_md_mixture_logprobs(logits, ref, mixture_coef=0.3), np.log(mixed / mixed.sum(-1, keepdims=True)))


def test_xpo_equals_the_definition(ragged_pairs):
    names = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs", "mask")
    arrays = {name: ragged_pairs[name] for name in names}
    sample = np.where(arrays["mask"], -np.arange(8.0), np.nan)
    loss, _ = xpo_loss(**arrays, ref_sample_logprobs=sample, alpha=0.3, beta=0.2)
    close(loss, dpo_loss(**arrays, beta=0.2)[0] + 0.3 * np.nanmean(sample))


def test_errors(ragged):
    with pytest.raises(ValueError, match="unknown kl_level 'k1': choose one of token, sequence"):
        nash_md_loss(ragged.logprobs, ragged.ref, ragged.advantages, ragged.mask, kl_level="k1")  # pyright: ignore
    with pytest.raises(ValueError, match="win_probs has shape"):
        nash_md_loss(ragged.logprobs, ragged.ref, np.zeros(2), ragged.mask)
    with pytest.raises(ValueError, match="kl_coef is -1"):
        nash_md_loss(ragged.logprobs, ragged.ref, ragged.advantages, ragged.mask, kl_coef=-1)
    with pytest.raises(ValueError, match="alpha is -1"):
        xpo_loss(*[np.zeros(2)] * 5, alpha=-1)
    with pytest.raises(ValueError, match=r"ref_logits has shape \(3,\), but logits has shape \(2,\)"):
        nash_md_mixture_logprobs(np.zeros(2), np.zeros(3))
