"""Objectives of single labelled completions: their baselines are of the whole batch, and have no gradient."""

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
from jaxrl_llm.algorithms.offline import BatchObjective, make_offline_evaluation, make_offline_step, make_reference_pass
from jaxrl_llm.algorithms.preference.presets import UNPAIRED, bco, kto
from jaxrl_llm.algorithms.preference.unpaired import BCOObjective, KTOObjective, UnpairedBatch
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.losses import kto_kl, kto_loss
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.types import Rollout

PADDING, SELF_MATCH = 5, 2


@pytest.fixture(scope="module")
def rollout(make_rollout: Callable[..., Rollout]) -> Rollout:
    """At index 1 the completion of the next row."""
    drawn = make_rollout(prompts=8, group=2)
    completion, lengths = np.array(drawn.completion), np.array(drawn.completion_lengths)
    completion[:, 1], lengths[:, 1] = np.roll(completion[:, 0], -1, 0), np.roll(lengths[:, 0], -1, 0)
    return drawn.replace(completion=completion, completion_lengths=lengths)


@pytest.fixture(scope="module")
def samples(rollout: Rollout) -> UnpairedBatch:
    """Eight rows: one is padding, one has no mismatched completion, two of the other seven are desirable."""
    mask = np.array(rollout.mask)
    mask[PADDING] = False
    mask[SELF_MATCH, 1] = False
    labels = np.zeros((8, 2), bool)
    labels[[1, 6, PADDING], 0] = True
    return UnpairedBatch(rollout.prompt, rollout.prompt_lengths, rollout.completion, mask, labels)


@pytest.fixture(scope="module")
def setting(tiny_config, lively_params) -> dict[str, Any]:
    """The policy is a little more likely to write what it is given than its reference: z₀ is not 0."""
    model = Transformer(tiny_config(logit_softcap=5.0))
    reference = lively_params(model)
    params = jax.tree.map(lambda mine, other: 0.9 * mine + 0.1 * other, reference, lively_params(model, seed=4))
    return {"model": model, "params": params, "reference": reference}


def step_once(
    setting: dict[str, Any], objective: KTOObjective | BCOObjective, rows: UnpairedBatch, **plan: int
) -> tuple[Params, dict[str, float]]:
    """The gradient (the change under SGD with rate 1), and the metrics."""
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_offline_step(setting["model"], optimizer, objective, plan=MicroBatches(**plan)))
    reference = None if rows.ref_logprobs is not None else setting["reference"]
    state, metrics = step(make_train_state(setting["params"], optimizer, 0), rows, reference)
    change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), setting["params"], state.params)
    chex.assert_tree_all_finite(change)  # a comparison takes two NaNs for equal
    return change, {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}


KTO = KTOObjective(beta=0.3, lambda_d=2.0, lambda_u=1.5)


@pytest.fixture(scope="module")
def whole(setting, samples) -> tuple[Params, dict[str, float]]:
    return step_once(setting, KTO, samples)


@pytest.fixture(scope="module")
def log_ratios(setting, samples, rollout, repeated_logprobs) -> np.ndarray:
    """log π − log π_ref of all completions, `[P, 2]`."""

    @jax.jit
    def sums(params: Params) -> jax.Array:
        tokens = repeated_logprobs(setting["model"], params, rollout)[0]
        return jnp.sum(jnp.where(samples.mask, tokens, 0.0), -1)

    return np.asarray(sums(setting["params"]) - sums(setting["reference"]))


def test_gradient_is_that_of_kto_of_repeated_prompts(whole, setting, samples, rollout, log_ratios, repeated_logprobs):
    """z₀ is the mean over mismatched completions of rows that count, and constant."""
    kept = np.arange(8) != PADDING
    mismatched = log_ratios[samples.mask[:, 1].any(-1), 1]
    assert len(mismatched) == 6
    z0 = max(0.0, float(mismatched.mean()))
    assert z0 > 0.01

    @jax.jit
    def plain(params: Params, reference: Params) -> tuple[jax.Array, Params]:
        def sums(params: Params) -> jax.Array:
            tokens = repeated_logprobs(setting["model"], params, rollout)[0]
            return jnp.sum(jnp.where(samples.mask, tokens, 0.0), -1)[kept, 0]

        labels = samples.labels[kept, 0]
        ref = sums(reference)
        weights = {"beta": 0.3, "lambda_d": 2.0, "lambda_u": 1.5}
        return jax.value_and_grad(lambda p: kto_loss(sums(p), ref, labels, z0, **weights)[0])(params)

    loss, gradient = plain(setting["params"], setting["reference"])
    assert whole[1]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert whole[1]["kl"] == pytest.approx(z0, rel=1e-4)
    chex.assert_trees_all_close(whole[0], gradient, rtol=0, atol=1e-5)
    own, labels = log_ratios[kept, 0], samples.labels[kept, 0]
    assert whole[1]["rewards/chosen"] == pytest.approx(0.3 * own[labels].mean(), rel=1e-4)
    assert whole[1]["rewards/rejected"] == pytest.approx(0.3 * own[~labels].mean(), rel=1e-4)
    assert whole[1]["rewards/accuracies"] == pytest.approx(((own > z0) == labels).mean())


def test_micro_batches_do_not_change_baseline_nor_gradient(whole, setting, samples):
    """The baseline of a micro-batch would be another number, and each side's count, too."""
    gradient, metrics = step_once(setting, KTO, samples, micro_batches=8)
    chex.assert_trees_all_close(gradient, whole[0], rtol=0, atol=5e-6)
    assert metrics == pytest.approx(whole[1], rel=1e-5)


def test_mesh_does_not_change_the_gradient(whole, setting, samples):
    ahead = jax.jit(make_reference_pass(setting["model"]))(setting["reference"], samples)
    with jax.set_mesh(make_mesh()):
        gradient, metrics = step_once(setting, KTO, samples._replace(ref_logprobs=np.asarray(ahead)))
    chex.assert_trees_all_close(gradient, whole[0], rtol=0, atol=1e-5)
    assert metrics == pytest.approx(whole[1], rel=1e-4)


@pytest.fixture(scope="module")
def evaluated(setting, samples) -> Callable[..., tuple[float, dict[str, float]]]:
    """Loss and metrics of an objective, nothing trained."""
    ahead = jax.jit(make_reference_pass(setting["model"]))
    rows = samples._replace(ref_logprobs=ahead(setting["reference"], samples))

    def evaluate(objective: Any, rows: UnpairedBatch = rows) -> tuple[float, dict[str, float]]:
        loss, records = jax.jit(make_offline_evaluation(setting["model"], objective))(setting["params"], rows)
        return float(loss), {name: float(record.value()) for name, record in records.items()}

    return evaluate


def test_baseline_of_the_other_side(evaluated, log_ratios, samples):
    """Each sample against the mean of the others' label; no mismatched completion is read."""
    kept = np.arange(8) != PADDING
    own, labels = log_ratios[kept, 0], samples.labels[kept, 0]
    desirable, undesirable = (max(0.0, own[side].mean()) for side in (labels, ~labels))
    gain = np.where(labels, own - undesirable, desirable - own)
    loss, metrics = evaluated(KTOObjective(baseline="other_side"))
    assert loss == pytest.approx((1 - 1 / (1 + np.exp(-0.1 * gain))).mean(), rel=1e-5)
    assert metrics["kl"] == pytest.approx(np.where(labels, undesirable, desirable).mean(), rel=1e-4)


def test_bco_compares_with_the_mean_reward_of_the_batch(evaluated, log_ratios, samples):
    kept = np.arange(8) != PADDING
    rewards, labels = 0.1 * log_ratios[kept, 0], samples.labels[kept, 0]
    for average, shift in (
        ("samples", rewards.mean()),
        ("sides", (rewards[labels].mean() + rewards[~labels].mean()) / 2),
    ):
        loss, metrics = evaluated(BCOObjective(average=average))
        losses = np.log1p(np.exp(np.where(labels, shift - rewards, rewards - shift)))
        assert loss == pytest.approx(losses.mean(), rel=1e-5)
        assert metrics["delta"] == pytest.approx(shift, rel=1e-4)
        assert metrics["rewards/accuracies"] == pytest.approx(((rewards > shift) == labels).mean())


def test_each_side_by_itself(evaluated, log_ratios, samples):
    kept = np.arange(8) != PADDING
    own, labels = log_ratios[kept, 0], samples.labels[kept, 0]
    losses = 1 - 1 / (1 + np.exp(-0.1 * np.where(labels, own, -own)))
    loss, _ = evaluated(KTOObjective(variant="apo_zero_unpaired", per_side_mean=True))
    assert loss == pytest.approx((losses[labels].mean() + losses[~labels].mean()) / 2, rel=1e-5)


def test_mismatched_completions_of_padding_do_not_count(samples):
    """Neither does the row's own label: all of it comes from index 0 of rows that are no padding."""
    assert [int(x) for x in (KTO.normalizer(samples).samples, *KTO.normalizer(samples).sides)] == [7, 2, 5]

    def logprobs(rows: UnpairedBatch) -> jax.Array:
        return jnp.ones(rows.mask.shape)

    filled = samples._replace(ref_logprobs=jnp.zeros(samples.mask.shape), mask=samples.mask.copy())
    filled.mask[PADDING, 1] = True  # as a trainer would never leave it
    own = KTO.prepared(filled, logprobs)
    others = filled.mask[np.arange(8) != PADDING, 1].sum(-1)
    assert own.mask.shape == (8, 1, samples.mask.shape[-1])
    np.testing.assert_allclose(own.baseline, others[others > 0].mean(), rtol=1e-6)
    assert kto_kl(jnp.ones(3), jnp.zeros(3)) == 1


def test_kto_without_mismatched_completions_raises(samples):
    single = samples._replace(completion=samples.completion[:, :1], mask=samples.mask[:, :1])
    with pytest.raises(ValueError, match=r"other_side"):
        KTO.prepared(single, lambda rows: jnp.zeros(rows.mask.shape))


def test_balance_follows_the_counts():
    balanced = kto().balanced(100, 900)
    assert (balanced.lambda_d, balanced.lambda_u) == (pytest.approx(9.0), 1.0)
    assert dataclasses.replace(balanced, lambda_d=1.0) == kto()


def test_presets_are_objectives_that_read_the_whole_batch():
    for preset in UNPAIRED.values():
        assert isinstance(preset(), BatchObjective)
        assert preset().needs_reference and not preset().whole_groups
    assert bco().average == "samples"
