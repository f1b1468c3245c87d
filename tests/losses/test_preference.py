"""The losses of preference pairs with a reference, against their equations and the golden numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.aot import aot_loss
from jaxrl_llm.losses.dpo import cdpo_loss, dpo_loss, robust_dpo_loss
from jaxrl_llm.losses.preference import discopop_loss, exo_loss, hinge_loss, ipo_loss
from jaxrl_llm.losses.preference_sides import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_loss, sppo_loss
from jaxrl_llm.losses.preference_terms import f_divergence_score
from jaxrl_llm.records import Mean


def sigma(x):
    return 1 / (1 + np.exp(-x))


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def pair_names(*more):
    return ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs", *more)


def mean_loop(pairs, pair_loss):
    """The mean over the valid pairs of `pair_loss`(D_w, D_l, pair), each a number."""
    losses = []
    for i in np.flatnonzero(pairs["mask"]):
        pair = {name: x[i] for name, x in pairs.items()}
        chosen = pair["chosen_logprobs"] - pair["ref_chosen_logprobs"]
        rejected = pair["rejected_logprobs"] - pair["ref_rejected_logprobs"]
        losses.append(pair_loss(chosen, rejected, pair))
    return np.mean(losses)


def log_sigma(x):
    return np.log(sigma(x))


def kl(p, q):
    return sum(x * np.log(x / y) for x, y in zip(p, q, strict=True))


DEFINITIONS = {  # of D_w, D_l and the pair's other numbers
    "dpo": (dpo_loss, {}, (), lambda w, r, p: -log_sigma(0.1 * (w - r))),
    "dpo_weights": (dpo_loss, {}, ("weights",), lambda w, r, p: -p["weights"] * log_sigma(0.1 * (w - r))),
    "dpo_per_token": (
        dpo_loss,
        {"beta": 0.3},
        ("chosen_lengths", "rejected_lengths"),
        lambda w, r, p: -log_sigma(0.3 * (w / p["chosen_lengths"] - r / p["rejected_lengths"])),
    ),
    "dpo_js": (
        dpo_loss,
        {"f_divergence": "js"},
        (),
        lambda w, r, p: -log_sigma(0.1 * np.log(np.exp(w) * (1 + np.exp(r)) / (np.exp(r) * (1 + np.exp(w))))),
    ),
    "dpo_forward_kl": (
        dpo_loss,
        {"f_divergence": "forward_kl"},
        (),
        lambda w, r, p: -log_sigma(0.1 * (np.exp(-r) - np.exp(-w))),
    ),
    "cdpo": (
        cdpo_loss,
        {"label_smoothing": 0.2},
        (),
        lambda w, r, p: -0.8 * log_sigma(0.1 * (w - r)) - 0.2 * log_sigma(0.1 * (r - w)),
    ),
    "robust": (
        robust_dpo_loss,
        {"label_smoothing": 0.2},
        (),
        lambda w, r, p: (-0.8 * log_sigma(0.1 * (w - r)) + 0.2 * log_sigma(0.1 * (r - w))) / 0.6,
    ),
    "ipo": (ipo_loss, {"beta": 0.2}, (), lambda w, r, p: (w - r - 2.5) ** 2),
    "ipo_per_token": (
        ipo_loss,
        {"target": 1.0},
        ("chosen_lengths", "rejected_lengths"),
        lambda w, r, p: (w / p["chosen_lengths"] - r / p["rejected_lengths"] - 1) ** 2,
    ),
    "hinge": (hinge_loss, {"beta": 0.7}, (), lambda w, r, p: max(0, 1 - 0.7 * (w - r))),
    "exo": (
        exo_loss,
        {"label_smoothing": 0.01},
        (),
        lambda w, r, p: kl((sigma(0.1 * (w - r)), sigma(0.1 * (r - w))), (0.99, 0.01)),
    ),
    "discopop": (
        discopop_loss,
        {},
        (),
        lambda w, r, p: -sigma(r - w) * log_sigma(0.05 * (w - r)) + sigma(w - r) * np.exp(0.05 * (r - w)),
    ),
    "nca": (
        nca_loss,
        {},
        (),
        lambda w, r, p: -log_sigma(0.1 * w) - 0.5 * log_sigma(-0.1 * w) - 0.5 * log_sigma(-0.1 * r),
    ),
    "apo_zero": (apo_zero_loss, {}, (), lambda w, r, p: 1 - sigma(0.1 * w) + sigma(0.1 * r)),
    "apo_down": (apo_down_loss, {}, (), lambda w, r, p: sigma(0.1 * w) + 1 - sigma(0.1 * (w - r))),
    "sppo_hard": (sppo_loss, {"beta": 0.1}, (), lambda w, r, p: (w - 5) ** 2 + (r + 5) ** 2),
    "sppo_soft": (
        sppo_loss,
        {"beta": 0.1},
        ("chosen_win_probs", "rejected_win_probs"),
        lambda w, r, p: (w - 10 * (p["chosen_win_probs"] - 0.5)) ** 2 + (r - 10 * (p["rejected_win_probs"] - 0.5)) ** 2,
    ),
    "bco_pair": (
        bco_pair_loss,
        {"reward_shift": 0.3},
        (),
        lambda w, r, p: -log_sigma(0.1 * w - 0.3) - log_sigma(-(0.1 * r - 0.3)),
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_losses_equal_the_definition(name, ragged_pairs):
    loss, options, more, definition = DEFINITIONS[name]
    arrays = {name: ragged_pairs[name] for name in pair_names("mask", *more)}
    close(loss(**arrays, **options)[0], mean_loop(ragged_pairs, definition))


def test_without_a_reference_the_log_ratio_is_the_log_probability(ragged_pairs):
    arrays = {name: ragged_pairs[name] for name in ("chosen_logprobs", "rejected_logprobs", "mask")}
    free = ragged_pairs | {"ref_chosen_logprobs": np.zeros(8), "ref_rejected_logprobs": np.zeros(8)}
    for name in ("dpo", "cdpo", "robust", "ipo", "hinge", "exo", "discopop"):
        loss, options, _, definition = DEFINITIONS[name]
        none = {"ref_chosen_logprobs": None, "ref_rejected_logprobs": None}
        close(loss(**arrays, **none, **options)[0], mean_loop(free, definition))


def test_divergences_work_in_every_loss_of_the_margin(ragged_pairs):
    """The scores of both sides as log-probs, without references."""
    valid = ragged_pairs["mask"]
    arrays = [ragged_pairs[name][valid] for name in pair_names()]
    for divergence in ("forward_kl", "js", "alpha"):
        scores = [f_divergence_score(arrays[i] - arrays[i + 2], f_divergence=divergence) for i in (0, 1)]
        close(dpo_loss(*scores, None, None)[0], dpo_loss(*arrays, f_divergence=divergence)[0])


def test_metrics_equal_the_definition(ragged_pairs):
    for loss in (dpo_loss, nca_loss, aot_loss):
        _, metrics = loss(**{name: ragged_pairs[name] for name in pair_names("mask")}, beta=0.3)
        expected = {
            "rewards/chosen": mean_loop(ragged_pairs, lambda w, r, p: 0.3 * w),
            "rewards/rejected": mean_loop(ragged_pairs, lambda w, r, p: 0.3 * r),
            "rewards/margins": mean_loop(ragged_pairs, lambda w, r, p: 0.3 * (w - r)),
            "rewards/accuracies": mean_loop(ragged_pairs, lambda w, r, p: w > r),
            "logps/chosen": mean_loop(ragged_pairs, lambda w, r, p: p["chosen_logprobs"]),
            "logps/rejected": mean_loop(ragged_pairs, lambda w, r, p: p["rejected_logprobs"]),
        }
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            close(metrics[name].value(), value)
            assert isinstance(metrics[name], Mean)
            assert metrics[name].count == 5


def test_golden_numbers(examples, pref):
    arrays = (pref.chosen, pref.rejected, pref.ref_chosen, pref.ref_rejected)
    lengths = {"chosen_lengths": pref.chosen_lengths, "rejected_lengths": pref.rejected_lengths}
    loss, metrics = dpo_loss(*arrays)
    close(loss, examples["dpo.loss"])
    close(jax.vmap(lambda *pair: dpo_loss(*pair)[0])(*arrays), examples["dpo.per_pair"])
    close(metrics["rewards/chosen"].value(), np.mean(examples["dpo.rewards_w_l"][0]))
    close(metrics["rewards/margins"].value(), 0.1 * np.mean(examples["pref.margin_h"]))
    close(dpo_loss(*arrays[:2], None, None)[0], examples["reffree.seed004"])
    close(dpo_loss(*arrays, **lengths)[0], examples["dpo.sigmoid_norm_b0p1"])
    close(cdpo_loss(*arrays, label_smoothing=0.1)[0], examples["cdpo.e0p1"])
    close(robust_dpo_loss(*arrays, label_smoothing=0.1)[0], examples["robust.e0p1"])
    close(ipo_loss(*arrays)[0], examples["ipo.paper_tau0p1"])
    close(ipo_loss(*arrays, target=10 / 2)[0], examples["ipo.seed_gamma10"])
    close(ipo_loss(*arrays, target=1 / 2)[0], examples["ipo.seed_gamma1"])
    close(ipo_loss(*arrays, **lengths)[0], examples["ipo.length_avg_tau0p1"])
    close(hinge_loss(*arrays)[0], examples["hinge.rso_beta0p1"])
    close(exo_loss(*arrays)[0], examples["exo.e1e-3"])
    close(discopop_loss(*arrays, beta=0.1)[0], examples["discopop.tau0p05"])
    close(nca_loss(*arrays)[0], examples["nca.loss"])
    close(apo_zero_loss(*arrays)[0], examples["apo.zero"])
    close(apo_down_loss(*arrays)[0], examples["apo.down"])
    close(sppo_loss(*arrays, beta=0.1)[0], examples["sppo.hard_beta0p1"])
    wins = {"chosen_win_probs": np.array([0.9, 0.6]), "rejected_win_probs": np.array([0.1, 0.4])}
    close(sppo_loss(*arrays, beta=1 / 10, **wins)[0], examples["sppo.soft_eta10"])
    close(bco_pair_loss(*arrays)[0], examples["bco.trl_pair_no_delta"])
    close(bco_pair_loss(*arrays, reward_shift=0.02)[0], examples["bco.with_running_delta_0p02"])


def test_optimal_transport_golden_numbers(examples, pref):
    third = (-9.0, -10.0, -9.6, -9.9)
    arrays = (pref.chosen, pref.rejected, pref.ref_chosen, pref.ref_rejected)
    arrays = [np.append(x, value) for x, value in zip(arrays, third, strict=True)]
    close(aot_loss(*arrays)[0], examples["aot.paired"])
    close(aot_loss(*arrays, paired=False)[0], examples["aot.unpaired"])
    chosen, rejected, ref_chosen, ref_rejected = arrays
    paired = np.sort(chosen - rejected) - np.sort(ref_chosen - ref_rejected)
    close(paired, examples["aot.paired_sorted_delta"])
    unpaired = np.sort(chosen - ref_chosen) - np.sort(rejected - ref_rejected)
    close(unpaired, examples["aot.unpaired_sorted_delta"])


@pytest.mark.parametrize("paired", [True, False])
def test_optimal_transport_equals_the_definition(ragged_pairs, paired):
    valid = {name: ragged_pairs[name][ragged_pairs["mask"]] for name in pair_names()}
    chosen, rejected, ref_chosen, ref_rejected = valid.values()
    upper, lower = (chosen - rejected, ref_chosen - ref_rejected)
    if not paired:
        upper, lower = (chosen - ref_chosen, rejected - ref_rejected)
    losses = []
    for x, y in zip(sorted(upper), sorted(lower), strict=True):
        losses.append(-0.8 * log_sigma(0.3 * (x - y)) - 0.2 * log_sigma(0.3 * (y - x)))
    arrays = {name: ragged_pairs[name] for name in pair_names("mask")}
    loss, _ = aot_loss(**arrays, beta=0.3, label_smoothing=0.2, paired=paired)
    close(loss, np.mean(losses))


def test_optimal_transport_does_not_see_the_order_of_pairs(ragged_pairs):
    arrays = {name: ragged_pairs[name] for name in pair_names("mask")}
    order = np.random.default_rng(0).permutation(8)
    close(aot_loss(**{name: x[order] for name, x in arrays.items()})[0], aot_loss(**arrays)[0])
    # Unpaired, nor that of one side alone.
    order = np.flatnonzero(ragged_pairs["mask"])
    moved = {name: x[np.roll(order, 2)] if "rejected" in name else x[order] for name, x in arrays.items()}
    close(aot_loss(**moved, paired=False)[0], aot_loss(**arrays, paired=False)[0])


def test_gradients_push_where_they_should():
    """At the reference: up the chosen one and down the rejected one, or as the loss's name says."""

    def gradient(loss):
        return jax.grad(lambda pair: loss(pair[:1], pair[1:], np.zeros(1), np.zeros(1))[0])(jnp.zeros(2))

    for loss in (dpo_loss, ipo_loss, hinge_loss, exo_loss, apo_zero_loss, sppo_loss, aot_loss, nca_loss):
        chosen, rejected = gradient(loss)
        assert chosen < 0 < rejected, loss
    chosen, rejected = gradient(apo_down_loss)
    assert chosen == 0 < rejected
    # The switch of DiscoPOP is a bump: from the reference on, the exponential loss is the larger one.
    chosen, rejected = gradient(discopop_loss)
    assert rejected < 0 < chosen


def test_errors():
    x = np.zeros(2)
    with pytest.raises(ValueError, match="ref_chosen_logprobs and ref_rejected_logprobs go together"):
        dpo_loss(x, x, x, None)
    with pytest.raises(ValueError, match="chosen_lengths and rejected_lengths go together, but chosen_lengths is None"):
        ipo_loss(x, x, x, x, rejected_lengths=x)
    with pytest.raises(ValueError, match="chosen_win_probs and rejected_win_probs go together"):
        sppo_loss(x, x, x, x, chosen_win_probs=x)
    with pytest.raises(ValueError, match=r"label_smoothing is 0.5: it is the share of wrong labels, in \[0, 0.5\)"):
        aot_loss(x, x, x, x, label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"the losses have shape \(2, 2\), but mask has shape \(2,\): a coefficient"):
        dpo_loss(x, x, x, x, beta=np.ones((2, 1)))


def test_beta_of_each_pair():
    """As in β-DPO, whose beta depends on the pair."""
    x, beta = np.arange(3.0), np.array([0.1, 0.2, 0.3])
    expected = [dpo_loss(x[i : i + 1], np.zeros(1), None, None, beta=beta[i])[0] for i in range(3)]
    close(dpo_loss(x, np.zeros(3), None, None, beta=beta)[0], np.mean(expected))
