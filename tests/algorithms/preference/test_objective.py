"""The objective of preference pairs: the losses of its parts, of the very log-probs of the pairs' tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.offline import make_offline_evaluation, make_offline_step, make_reference_pass
from jaxrl_llm.algorithms.preference.objective import PreferenceBatch, PreferenceObjective
from jaxrl_llm.algorithms.preference.pair_losses import AOT, CPO, DPO, IPO, ORPO, SPPO, BCOPair, Mixture, SimPO
from jaxrl_llm.algorithms.preference.presets import PAIRED
from jaxrl_llm.algorithms.preference.scored_pairs import PairCounts, PairLoss, ReferenceFreeLoss, ScoredPairs
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.losses import aot_loss, cpo_loss, dpo_loss, ipo_loss, orpo_loss
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.types import Rollout

PADDING = 5
"""The row of `pairs` that is none."""
OF_PAIRS = Mixture((DPO(), CPO(), ORPO(nll_over="sequences"), IPO(length_normalized=True)), (1.0, 0.5, 2.0, 0.01))
EVERYTHING = PreferenceObjective(Mixture((*OF_PAIRS.losses, AOT()), (*OF_PAIRS.weights, 3.0)), nll_coef=0.25)


@pytest.fixture(scope="module")
def rollout(make_rollout: Callable[..., Rollout]) -> Rollout:
    return make_rollout(prompts=8, group=2)


@pytest.fixture(scope="module")
def pairs(rollout: Rollout) -> PreferenceBatch:
    """Eight ragged pairs, one of which has a side without tokens, and so is none."""
    mask = np.array(rollout.mask)
    mask[PADDING, 1] = False
    win_probs = np.random.default_rng(1).uniform(size=mask.shape[:2]).astype(np.float32)
    return PreferenceBatch(rollout.prompt, rollout.prompt_lengths, rollout.completion, mask, win_probs=win_probs)


@pytest.fixture(scope="module")
def setting(tiny_config, lively_params) -> dict[str, Any]:
    model = Transformer(tiny_config(logit_softcap=5.0))
    return {"model": model, "params": lively_params(model), "reference": lively_params(model, seed=1)}


def step_once(
    setting: dict[str, Any], objective: PreferenceObjective, rows: PreferenceBatch, **plan: int
) -> tuple[Params, dict[str, float]]:
    """The gradient (the change under SGD with rate 1), and the metrics."""
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_offline_step(setting["model"], optimizer, objective, plan=MicroBatches(**plan)))
    reference = None if rows.ref_logprobs is not None else setting["reference"]
    state, metrics = step(make_train_state(setting["params"], optimizer, 0), rows, reference)
    change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), setting["params"], state.params)
    chex.assert_tree_all_finite(change)  # a comparison takes two NaNs for equal
    return change, {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}


@pytest.fixture(scope="module")
def whole(setting, pairs) -> tuple[Params, dict[str, float]]:
    return step_once(setting, EVERYTHING, pairs)


def test_gradient_is_that_of_the_losses_of_repeated_prompts(whole, setting, pairs, rollout, repeated_logprobs):
    """Log-probs of whole sequences from all their logits, the padded pair cut out of the arrays."""
    kept = np.arange(8) != PADDING
    lengths = pairs.mask[kept].sum(-1).astype(np.int32)
    chosen_tokens = pairs.mask[kept][:, 0]

    def sides(params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        tokens = repeated_logprobs(setting["model"], params, rollout)[0][kept]
        sums = jnp.sum(jnp.where(pairs.mask[kept], tokens, 0.0), -1)
        return sums[:, 0], sums[:, 1], tokens

    @jax.jit
    def plain(params: Params, reference: Params) -> tuple[jax.Array, Params]:
        ref = sides(reference)[:2]

        def loss(params: Params) -> jax.Array:
            chosen, rejected, tokens = sides(params)
            nll = -jnp.sum(jnp.where(chosen_tokens, tokens[:, 0], 0.0)) / chosen_tokens.sum()
            per_token = {"chosen_lengths": lengths[:, 0], "rejected_lengths": lengths[:, 1]}
            return (
                dpo_loss(chosen, rejected, *ref)[0]
                + 0.5 * cpo_loss(chosen, rejected, lengths[:, 0])[0]
                + 2.0 * orpo_loss(chosen, rejected, lengths[:, 0], lengths[:, 1], nll_over="sequences")[0]
                + 0.01 * ipo_loss(chosen, rejected, *ref, **per_token)[0]
                + 3.0 * aot_loss(chosen, rejected, *ref)[0]
                + 0.25 * nll
            )

        return jax.value_and_grad(loss)(params)

    gradient, metrics = whole
    loss, expected = plain(setting["params"], setting["reference"])
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    chex.assert_trees_all_close(gradient, expected, rtol=0, atol=1e-5)

    chosen, rejected, tokens = jax.jit(sides)(setting["params"])
    ref = jax.jit(sides)(setting["reference"])
    rewards = 0.1 * np.stack([chosen - ref[0], rejected - ref[1]])
    assert metrics["rewards/chosen"] == pytest.approx(rewards[0].mean(), rel=1e-4)
    assert metrics["rewards/margins"] == pytest.approx((rewards[0] - rewards[1]).mean(), rel=1e-4)
    assert metrics["rewards/accuracies"] == pytest.approx((rewards[0] > rewards[1]).mean())
    assert metrics["logps/rejected"] == pytest.approx(float(rejected.mean()), rel=1e-4)
    assert metrics["nll"] == pytest.approx(-float(np.asarray(tokens[:, 0])[chosen_tokens].mean()), rel=1e-4)


def test_mesh_does_not_change_the_gradient(whole, setting, pairs):
    """Nor does the sort of AOT, which then is over all devices."""
    with jax.set_mesh(make_mesh()):
        gradient, metrics = step_once(setting, EVERYTHING, pairs)
    chex.assert_trees_all_close(gradient, whole[0], rtol=0, atol=1e-5)
    assert metrics == pytest.approx(whole[1], rel=1e-4)


def test_micro_batches_and_a_reference_ahead_of_time_do_not_change_the_gradient(setting, pairs):
    """Also where what was computed ahead has anything at padding."""
    objective = dataclasses.replace(EVERYTHING, pair_loss=OF_PAIRS, ld_alpha=0.5)
    gradient, metrics = step_once(setting, objective, pairs)
    ahead = np.array(jax.jit(make_reference_pass(setting["model"]))(setting["reference"], pairs))
    ahead[~pairs.mask] = np.nan
    parts = step_once(setting, objective, pairs._replace(ref_logprobs=ahead), micro_batches=4)
    chex.assert_trees_all_close(parts[0], gradient, rtol=0, atol=1e-5)
    assert parts[1] == pytest.approx(metrics, rel=1e-5)


def test_a_loss_that_sorts_the_batch_may_have_micro_batches(whole, setting, pairs):
    """A first pass makes the scores of all of them."""
    gradient, metrics = step_once(setting, EVERYTHING, pairs, micro_batches=2)
    chex.assert_trees_all_close(gradient, whole[0], rtol=0, atol=1e-5)
    assert metrics == pytest.approx(whole[1], rel=1e-4)


def test_a_reference_that_is_missing_raises(setting, pairs):
    with pytest.raises(ValueError, match="reads a reference"):
        step_once(setting | {"reference": None}, PreferenceObjective(), pairs)


def test_rows_that_are_no_pairs_raise(setting, pairs):
    single = pairs._replace(completion=pairs.completion[:, :1], mask=pairs.mask[:, :1])
    with pytest.raises(ValueError, match=r"\[P, 2, Tc\]"):
        PreferenceObjective(CPO()).normalizer(single)


def test_wpo_weights_are_those_of_all_logits(setting, pairs):
    """log Σ π² is taken from the same tokens at temperature ½."""
    model, params = setting["model"], setting["params"]
    objective = PreferenceObjective(DPO(reference_free=True), weighted=True)
    loss, _ = jax.jit(make_offline_evaluation(model, objective))(params, pairs)

    @jax.jit
    def logprobs(params: Params) -> jax.Array:
        hidden = model.hidden(params, pairs)
        return jax.nn.log_softmax(model.head_logits(params, hidden))

    every = np.asarray(logprobs(params), np.float64)
    tokens = np.take_along_axis(every, pairs.completion[..., None], -1)[..., 0]
    aligned = tokens - np.log(np.exp(2 * every).sum(-1))
    total = 0.0
    for row in set(range(8)) - {PADDING}:
        (w_chosen, s_chosen), (w_rejected, s_rejected) = (
            (np.exp(aligned[row, g][mask].mean()), tokens[row, g][mask].sum()) for g, mask in enumerate(pairs.mask[row])
        )
        total += w_chosen * w_rejected * np.log1p(np.exp(-0.1 * (s_chosen - s_rejected)))
    assert float(loss) == pytest.approx(total / 7, rel=1e-4)


def scored(third: bool = False, **changes: Any) -> ScoredPairs:
    """The pairs of the specification's examples, and one more that is padding."""
    logprobs = [[-10.0, -11.0], [-12.0, -11.5], [-9.0, -10.0]]
    reference = [[-10.5, -10.8], [-11.0, -12.2], [-9.6, -9.9]]
    valid = np.array([True, True, third])
    values = {
        "logprobs": np.where(valid[:, None], logprobs, np.nan).astype(np.float32),
        "ref_logprobs": np.where(valid[:, None], reference, np.nan).astype(np.float32),
        "lengths": np.array([[4, 5], [6, 3], [0, 0]], np.int32),
        "mask": valid,
        "weights": None,
        "win_probs": None,
        "counts": PairCounts(jnp.float32(valid.sum()), jnp.float32(10)),
    }
    return ScoredPairs(**(values | changes))


@pytest.mark.parametrize(
    ("preset", "changes", "name"),
    [
        ("dpo", {}, "dpo.loss"),
        ("reference_free_dpo", {}, "reffree.seed004"),
        ("length_normalized_dpo", {"beta": 0.1}, "dpo.sigmoid_norm_b0p1"),
        ("cdpo", {}, "cdpo.e0p1"),
        ("robust_dpo", {}, "robust.e0p1"),
        ("ipo", {}, "ipo.paper_tau0p1"),
        ("ipo", {"length_normalized": True}, "ipo.length_avg_tau0p1"),
        ("hinge", {}, "hinge.rso_beta0p1"),
        ("slic", {}, "slic.delta1_lambda0p1"),
        ("simpo", {"gamma": 1.0}, "simpo.b2_g1"),
        ("cpo", {}, "cpo.b0p1_a1"),
        ("exo", {}, "exo.e1e-3"),
        ("nca", {}, "nca.loss"),
        ("apo_zero", {}, "apo.zero"),
        ("apo_down", {}, "apo.down"),
        ("sppo", {"beta": 0.1}, "sppo.hard_beta0p1"),
        ("discopop", {"beta": 0.1}, "discopop.tau0p05"),
        ("bco_pair", {}, "bco.trl_pair_no_delta"),
        ("bco_pair", {"reward_shift": 0.02}, "bco.with_running_delta_0p02"),
        ("orpo", {}, "orpo.total_lambda0p1"),
    ],
)
def test_each_preset_has_its_loss_and_hyper_parameters(preset, changes, name, examples):
    """Without the changes it has the published settings; the padded pair, NaN throughout, changes nothing."""
    part = dataclasses.replace(PAIRED[preset]().pair_loss, **changes)
    loss, metrics = part(scored())
    assert float(loss) == pytest.approx(examples[name], abs=1e-5)
    assert all(np.isfinite(record.value()) for record in metrics.values())


@pytest.mark.parametrize(("preset", "name"), [("aot", "aot.paired"), ("aot_unpaired", "aot.unpaired")])
def test_aot_sorts_the_valid_pairs(preset, name, examples):
    loss, _ = PAIRED[preset]().pair_loss(scored(third=True))
    assert float(loss) == pytest.approx(examples[name], abs=1e-6)


def test_sppo_reads_the_win_probabilities_of_the_rows(examples):
    wins = np.array([[0.9, 0.1], [0.6, 0.4], [np.nan, np.nan]], np.float32)
    loss, _ = SPPO(beta=0.1)(scored(win_probs=wins))
    assert float(loss) == pytest.approx(examples["sppo.soft_eta10"], rel=1e-5)


def test_weights_are_constant_factors():
    weights = np.array([2.0, 0.5, np.nan], np.float32)
    loss, _ = DPO()(scored(weights=weights))
    per_pair = [float(DPO()(scored(mask=np.arange(3) == row))[0]) * 2 for row in range(2)]
    assert float(loss) == pytest.approx((2.0 * per_pair[0] + 0.5 * per_pair[1]) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="leave WPO out"):
        AOT()(scored(weights=weights))


def test_mixture_is_the_weighted_sum():
    parts = (DPO(), BCOPair())
    loss, metrics = Mixture(parts, (0.8, 0.2))(scored())
    values = [float(part(scored())[0]) for part in parts]
    assert float(loss) == pytest.approx(0.8 * values[0] + 0.2 * values[1], rel=1e-6)
    assert set(metrics) >= {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    with pytest.raises(ValueError, match="one weight for each"):
        Mixture(parts, (1.0,))


def test_a_reference_is_read_where_the_loss_has_one():
    assert not Mixture((CPO(), SimPO()), (1.0, 1.0)).needs_reference
    assert Mixture((CPO(), DPO()), (1.0, 1.0)).needs_reference
    assert not DPO(reference_free=True).needs_reference
    for preset in PAIRED.values():
        part = preset().pair_loss
        if part.needs_reference:
            with pytest.raises(ValueError, match="under a reference"):
                part(scored(ref_logprobs=None))
        else:
            assert np.isfinite(part(scored(ref_logprobs=None))[0])


def test_presets_hold_every_loss():
    def parts(loss: PairLoss) -> set[type]:
        inner = loss.losses if isinstance(loss, Mixture) else ()
        return {type(loss)}.union(*(parts(part) for part in inner))

    every = {*PairLoss.__subclasses__(), *ReferenceFreeLoss.__subclasses__()} - {ReferenceFreeLoss}
    assert set().union(*(parts(preset().pair_loss) for preset in PAIRED.values())) == every
    assert PAIRED["wpo"]().weighted and PAIRED["rpo"]().nll_coef == 1 and PAIRED["ld_dpo"]().ld_alpha == 0.5


@pytest.mark.parametrize("changes", [{"nll_coef": -1.0}, {"ld_alpha": 1.5}])
def test_coefficients_out_of_range_raise(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        PreferenceObjective(**changes)
