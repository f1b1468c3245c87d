import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.losses.reference_free import cpo_loss, log_odds, orpo_loss, simpo_loss, slic_loss


def log_sigma(x):
    return -np.log(1 + np.exp(-x))


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def of(pairs, *names):
    return {name: pairs[name] for name in ("chosen_logprobs", "rejected_logprobs", "mask", *names)}


def loop(pairs, pair_loss):
    """The values of `pair_loss`(S_w, S_l, n_w, n_l) of the valid pairs."""
    names = ("chosen_logprobs", "rejected_logprobs", "chosen_lengths", "rejected_lengths")
    return [pair_loss(*(pairs[name][i] for name in names)) for i in np.flatnonzero(pairs["mask"])]


def token_nll(pairs):
    valid = pairs["mask"]
    return -pairs["chosen_logprobs"][valid].sum() / pairs["chosen_lengths"][valid].sum()


def test_golden_numbers(examples, pref):
    sums, lengths = (pref.chosen, pref.rejected), (pref.chosen_lengths, pref.rejected_lengths)
    close(simpo_loss(*sums, *lengths, gamma=1)[0], examples["simpo.b2_g1"])
    close(simpo_loss(*sums, *lengths, gamma_beta_ratio=0.5)[0], examples["simpo.b2_g1"])
    close(cpo_loss(*sums, lengths[0])[0], examples["cpo.b0p1_a1"])
    close(slic_loss(*sums)[0], examples["slic.delta1_lambda0p1"])
    loss, metrics = orpo_loss(*sums, *lengths)
    close(loss, examples["orpo.total_lambda0p1"])
    close(-metrics["log_odds_ratio"].value(), examples["orpo.or_loss"])
    averages = [sums[0] / lengths[0], sums[1] / lengths[1]]
    close(averages, examples["orpo.avg_logps_w_l"])
    close(log_odds(averages[0]) - log_odds(averages[1]), examples["orpo.log_odds_ratio"])
    close(metrics["log_odds_chosen"].value(), np.mean(examples["orpo.log_odds_ratio"]))
    summed = orpo_loss(*sums, *lengths, odds_logp="sum")[1]
    close(-summed["log_odds_ratio"].value(), examples["orpo.or_loss_seed_summed"])


def test_simpo_equals_the_definition(ragged_pairs):
    arrays = of(ragged_pairs, "chosen_lengths", "rejected_lengths")

    def pair_loss(w, r, nw, nl):
        return -log_sigma(2.0 * w / nw - 2.0 * r / nl - 0.5)

    loss, metrics = simpo_loss(**arrays)
    close(loss, np.mean(loop(ragged_pairs, pair_loss)))
    rewards = loop(ragged_pairs, lambda w, r, nw, nl: (2 * w / nw, 2 * r / nl))
    close([metrics["rewards/chosen"].value(), metrics["rewards/rejected"].value()], np.mean(rewards, 0))
    close(metrics["rewards/accuracies"].value(), np.mean([w > r for w, r in rewards]))
    close(metrics["logps/chosen"].value(), np.mean(loop(ragged_pairs, lambda w, r, nw, nl: w)))


def test_alpha_po_equals_the_definition(ragged_pairs):
    arrays = of(ragged_pairs, "chosen_lengths", "rejected_lengths")

    def reward(s, n, alpha=0.25, beta=3.0):
        return beta * (1 - np.exp(s / n) ** -alpha) / alpha

    expected = loop(ragged_pairs, lambda w, r, nw, nl: -log_sigma(reward(w, nw) - reward(r, nl) - 0.6))
    close(simpo_loss(**arrays, alpha=0.25, beta=3.0, gamma_beta_ratio=0.2)[0], np.mean(expected))
    close(simpo_loss(**arrays, alpha=1e-4)[0], simpo_loss(**arrays)[0], atol=1e-2)
    # Tokens that the policy rules out, in a large batch with a large beta: finite, where eˣ alone is no guarantee.
    unlikely = (np.full(1000, -1e4), np.zeros(1000), np.ones(1000, int), np.ones(1000, int))
    assert np.isfinite(simpo_loss(*unlikely, alpha=0.25, beta=1e4)[0])


def test_cpo_equals_the_definition(ragged_pairs):
    loss, metrics = cpo_loss(**of(ragged_pairs, "chosen_lengths"), beta=0.2, nll_coef=0.7)
    expected = np.mean(loop(ragged_pairs, lambda w, r, nw, nl: -log_sigma(0.2 * (w - r))))
    close(loss, expected + 0.7 * token_nll(ragged_pairs))
    close(metrics["nll"].value(), token_nll(ragged_pairs))
    close(metrics["rewards/margins"].value(), np.mean(loop(ragged_pairs, lambda w, r, nw, nl: 0.2 * (w - r))))


def test_cpo_with_smoothed_labels(ragged_pairs):
    def smoothed(w, r, nw, nl):
        return -0.8 * log_sigma(0.2 * (w - r)) - 0.2 * log_sigma(0.2 * (r - w))

    arrays = of(ragged_pairs, "chosen_lengths")
    loss, _ = cpo_loss(**arrays, beta=0.2, nll_coef=0.0, label_smoothing=0.2)
    close(loss, np.mean(loop(ragged_pairs, smoothed)))
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.5"):
        cpo_loss(**arrays, label_smoothing=0.5)


@pytest.mark.parametrize("loss", [cpo_loss, orpo_loss])
def test_the_likelihood_of_each_completion_may_count_alike(ragged_pairs, loss):
    names = ("chosen_lengths", "rejected_lengths") if loss is orpo_loss else ("chosen_lengths",)
    arrays = of(ragged_pairs, *names)
    by_token, of_tokens = loss(**arrays)
    by_sequence, of_sequences = loss(**arrays, nll_over="sequences")
    expected = np.mean(loop(ragged_pairs, lambda w, r, nw, nl: -w / nw))
    assert abs(expected - token_nll(ragged_pairs)) > 0.01
    close(of_sequences["nll"].value(), expected)
    close(by_sequence - by_token, expected - of_tokens["nll"].value())
    part = {"normalizer": ragged_pairs["mask"].sum(), "nll_normalizer": 2 * ragged_pairs["mask"].sum()}
    close(loss(**arrays, nll_over="sequences", **part)[0], by_sequence - expected / 2)
    with pytest.raises(ValueError, match="unknown nll_over 'rows'"):
        loss(**arrays, nll_over="rows")


def test_slic_equals_the_definition(ragged_pairs):
    loss, metrics = slic_loss(**of(ragged_pairs), margin=2.0, nll_coef=0.5)
    close(loss, np.mean(loop(ragged_pairs, lambda w, r, nw, nl: max(0, 2 - w + r) - 0.5 * w)))
    close(metrics["nll"].value(), -np.mean(loop(ragged_pairs, lambda w, r, nw, nl: w)))
    targets = np.where(ragged_pairs["mask"], -np.arange(8.0), np.nan)
    loss, _ = slic_loss(**of(ragged_pairs), target_logprobs=targets)
    hinge = np.mean(loop(ragged_pairs, lambda w, r, nw, nl: max(0, 1 - w + r)))
    close(loss, hinge - 0.1 * np.nanmean(targets))


@pytest.mark.parametrize("odds_logp", ["mean", "sum"])
def test_orpo_equals_the_definition(ragged_pairs, odds_logp):
    arrays = of(ragged_pairs, "chosen_lengths", "rejected_lengths")

    def log_odds_ratio(w, r, nw, nl):
        p, q = (np.exp(w / nw), np.exp(r / nl)) if odds_logp == "mean" else (np.exp(w), np.exp(r))
        return np.log(p / (1 - p)) - np.log(q / (1 - q))

    ratios = np.array(loop(ragged_pairs, log_odds_ratio))
    loss, metrics = orpo_loss(**arrays, odds_coef=0.3, odds_logp=odds_logp)
    close(loss, token_nll(ragged_pairs) - 0.3 * np.mean(log_sigma(ratios)))
    close(metrics["log_odds_chosen"].value(), np.mean(ratios))
    close(metrics["log_odds_ratio"].value(), np.mean(log_sigma(ratios)))
    close(metrics["nll"].value(), token_nll(ragged_pairs))


def test_orpo_takes_other_tokens_for_its_likelihood(ragged_pairs):
    """The prompt's tokens too, as the authors' code has it."""
    arrays = of(ragged_pairs, "chosen_lengths", "rejected_lengths")
    more = {"nll_logprobs": ragged_pairs["chosen_logprobs"] - 3, "nll_lengths": ragged_pairs["chosen_lengths"] + 5}
    loss, metrics = orpo_loss(**arrays, **more)
    valid = ragged_pairs["mask"]
    nll = -more["nll_logprobs"][valid].sum() / more["nll_lengths"][valid].sum()
    close(metrics["nll"].value(), nll)
    close(loss - nll, orpo_loss(**arrays)[0] - token_nll(ragged_pairs))


def test_log_odds_keep_their_precision():
    with jax.enable_x64(True):
        expected = jax.jit(log_odds)(-np.logspace(-6.5, 3, 50))
        x = jnp.asarray(-np.logspace(-2, 1, 9))
        check_grads(jax.jit(log_odds), (x,), 1, ["rev"], eps=1e-7)
    probability = np.exp(-np.logspace(-6.5, 3, 50))
    some = probability > 0
    naive = np.log(probability[some] / (1 - probability[some]))
    np.testing.assert_allclose(expected[some], naive, rtol=1e-8)
    np.testing.assert_allclose(log_odds(-np.logspace(-6.5, 3, 50)), expected, rtol=2e-5)
    for certain in (0.0, 1e-3, -1e-8, -1e4):
        value, gradient = jax.value_and_grad(log_odds)(certain)
        assert np.isfinite(value) and np.isfinite(gradient)
        assert (gradient == 0) == (certain > -1e-7)


def test_errors():
    x, n = np.zeros(2), np.ones(2, int)
    for loss in (simpo_loss, orpo_loss):
        with pytest.raises(ValueError, match=r"chosen_lengths has dtype float.*: pass numbers of tokens"):
            loss(x, x, x, x)  # a reference in the place of the lengths
    with pytest.raises(ValueError, match="chosen_lengths has dtype float"):
        cpo_loss(x, x, x)
    with pytest.raises(ValueError, match="nll_lengths has dtype float"):
        orpo_loss(x, x, n, n, nll_logprobs=x, nll_lengths=x)
    with pytest.raises(ValueError, match=r"gamma is 1 and gamma_beta_ratio is 0.5: pass one of them"):
        simpo_loss(x, x, n, n, gamma=1, gamma_beta_ratio=0.5)
    with pytest.raises(ValueError, match="unknown odds_logp 'max': choose one of mean, sum"):
        orpo_loss(x, x, n, n, odds_logp="max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="nll_logprobs and nll_lengths go together, but nll_lengths is None"):
        orpo_loss(x, x, n, n, nll_logprobs=x)
    with pytest.raises(ValueError, match=r"nll_normalizer has shape \(2,\): pass one number"):
        cpo_loss(x, x, n, nll_normalizer=n)
    with pytest.raises(ValueError, match="nll_coef is -1"):
        cpo_loss(x, x, n, nll_coef=-1)
    with pytest.raises(ValueError, match="odds_coef is -1"):
        orpo_loss(x, x, n, n, odds_coef=-1)
