"""The kept sampling mask: learner and sampler share one renormalised distribution, however far the policy has moved."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.policy_gradient.given import GivenAdvantages
from jaxrl_llm.algorithms.policy_gradient.objective import Correction, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.presets import grpo
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.types import Rollout

SGD = optax.sgd(1.0)
TRUNCATION: dict[str, Any] = {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.02}
REWARDS = np.random.default_rng(5).normal(size=(4, 4)).astype(np.float32)
PROMPTS = np.random.default_rng(0).integers(0, 64, (4, 5)), np.array([1, 5, 3, 4])


@pytest.fixture(scope="module")
def model(tiny_config) -> Transformer:
    return Transformer(tiny_config(tie_embeddings=False, logit_softcap=6.0))


@pytest.fixture(scope="module")
def params(model, lively_params) -> Params:
    return lively_params(model)


def sampler(model: Transformer, *, keep_mask: bool = True, **settings: Any) -> Sampler:
    config = SamplingConfig(**{"max_tokens": 6, **TRUNCATION, **settings})
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Sampler(model, config, group=4, stop_tokens=(1, 2, 3, 4), mesh=mesh, keep_mask=keep_mask)


@pytest.fixture(scope="module")
def rollout(model, params) -> Rollout:
    return jax.device_get(sampler(model)(params, *PROMPTS, np.asarray(jax.random.key_data(jax.random.key(1))), 0))


def update(
    model: Transformer, params: Params, rollout: Rollout, algorithm: PolicyGradient, **plan: int
) -> tuple[Params, dict[str, float]]:
    """The gradient and the metrics."""
    settings = {"temperature": TRUNCATION["temperature"], "truncated": True}
    step = jax.jit(make_update_step(model, SGD, algorithm, UpdateConfig(**plan), **settings))
    reference = jax.tree.map(lambda x: x * 1.05, params) if algorithm.needs_reference else None
    state, metrics = step(make_train_state(params, SGD, 0), rollout, REWARDS, reference)
    change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, state.params)
    chex.assert_tree_all_finite(change)
    return change, {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}


def test_the_learner_agrees_with_the_sampler_and_only_with_the_mask(model, params, rollout):
    """The importance weight from sampler to learner is 1; without the mask it is the mass that was kept."""
    algorithm = PolicyGradient(correction=Correction(w_max=100.0))
    _, without = update(model, params, rollout, algorithm, epochs=2)
    assert without["correction/weight_mean"] < 0.95
    assert not [name for name in without if name.startswith("sampling/")]
    _, with_mask = update(model, params, rollout, dataclasses.replace(algorithm, keep_sampling_mask=True), epochs=2)
    assert with_mask["correction/weight_mean"] == pytest.approx(1, abs=1e-5)
    assert with_mask["sampling/logp_gap_max"] < 1e-5
    assert with_mask["entropy"] < without["entropy"]


def is_kept(rollout: Rollout, vocabulary: int) -> np.ndarray:
    """Bool `[P, G, Tc, V]`."""
    ids, kept = np.asarray(rollout.kept), np.zeros((*rollout.completion.shape, vocabulary), bool)
    for index in np.ndindex(ids.shape):
        if ids[index] >= 0:
            kept[(*index[:-1], ids[index])] = True
    return kept


def test_what_is_kept_is_what_was_drawn_from(model, params, rollout, repeated_logits):
    """Token by token from the logits of whole sequences; fewer than k where top-p and min-p left fewer."""
    logits = np.asarray(jax.jit(lambda params: repeated_logits(model, params, rollout))(params), np.float64) / 0.8
    kept, mask, counts = is_kept(rollout, 64), np.asarray(rollout.mask), set()
    for index in zip(*np.nonzero(mask), strict=True):
        p = np.exp(logits[index] - logits[index].max())
        order = np.argsort(-p)[:6]
        p = p / p[order].sum()
        above = np.cumsum(p[order]) - p[order]
        order = order[above < 0.9]
        order = order[p[order] >= 0.02 * p[order[0]]]
        assert set(np.flatnonzero(kept[index])) == set(order), index
        expected = np.log(p[rollout.completion[index]] / p[order].sum())
        assert rollout.sampler_logprobs[index] == pytest.approx(expected, abs=1e-5)
        counts.add(len(order))
    assert len(counts) > 2
    assert (np.asarray(rollout.kept)[~mask] == -1).all()


def test_slots_keep_the_same(model, params, rollout):
    ours = sampler(model, slots=2)(params, *PROMPTS, np.asarray(jax.random.key_data(jax.random.key(1))), 0)
    np.testing.assert_array_equal(ours.completion, rollout.completion)
    np.testing.assert_array_equal(ours.kept, rollout.kept)


@pytest.fixture(scope="module")
def by_hand(model, params, rollout, repeated_logits) -> tuple[Params, dict[str, float]]:
    """GRPO with a KL from the logits of whole sequences, of which all but the kept ones are impossible."""
    kept, mask = is_kept(rollout, model.config.vocab_size), np.asarray(rollout.mask)
    advantages = REWARDS - REWARDS.mean(axis=1, keepdims=True)
    advantages = (advantages / (REWARDS.std(axis=1, ddof=1, keepdims=True) + 1e-4))[..., None]

    def scores(params: Params) -> tuple[jax.Array, jax.Array]:
        every = jnp.where(kept, repeated_logits(model, params, rollout) / TRUNCATION["temperature"], -1e30)
        every = jax.nn.log_softmax(every, axis=-1)
        chosen = jnp.take_along_axis(every, rollout.completion[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.where(kept, jnp.exp(every) * every, 0), axis=-1)

    def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        logprobs, entropy = scores(params)
        ref = jax.lax.stop_gradient(scores(jax.tree.map(lambda x: x * 1.05, params))[0])
        ratio = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
        kl = jnp.exp(ref - logprobs) - (ref - logprobs) - 1
        losses = jnp.where(mask, -ratio * advantages + KL * kl, 0)
        means = {"entropy": jnp.mean(entropy, where=mask), "kl": jnp.mean(kl, where=mask)}
        return jnp.mean(jnp.sum(losses, axis=-1) / mask.sum(axis=-1)), means

    (value, means), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return gradient, {"loss": float(value)} | {name: float(mean) for name, mean in means.items()}


KL = 0.5
MASKED = dataclasses.replace(grpo(), keep_sampling_mask=True, kl_coef=KL)


@pytest.mark.parametrize("plan", [{}, {"micro_batches": 8}, {"tokens_per_micro_batch": 23}], ids=str)
def test_gradient_is_that_of_the_renormalised_distribution(plan, model, params, rollout, by_hand):
    gradient, metrics = update(model, params, rollout, MASKED, **plan)
    expected, means = by_hand
    chex.assert_trees_all_close(gradient, expected, rtol=0, atol=2e-5)
    assert metrics["kl"] > 0.01
    assert {name: metrics[name] for name in means} == pytest.approx(means, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_a_mesh_changes_nothing(model, params, rollout, by_hand):
    """Rows and vocabulary are split, and time as well."""
    for config in (MeshConfig(fsdp=2, tensor=4), MeshConfig(fsdp=2, context=4)):
        mesh = make_mesh(config)
        step = make_update_step(model, SGD, MASKED, temperature=TRUNCATION["temperature"], truncated=True)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, model.shardings(mesh))
            reference = jax.tree.map(lambda x: x * 1.05, placed)
            state, _ = jax.jit(step)(make_train_state(placed, SGD, 0), rollout, REWARDS, reference)
        change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, state.params)
        chex.assert_trees_all_close(change, by_hand[0], rtol=0, atol=2e-5)


def test_padding_may_hold_anything(model, params, rollout, by_hand):
    mask = np.asarray(rollout.mask)
    changed = rollout.replace(
        kept=np.where(mask[..., None], rollout.kept, 63),
        completion=np.where(mask, rollout.completion, 7),
    )
    chex.assert_trees_all_close(update(model, params, changed, MASKED)[0], by_hand[0], rtol=0, atol=2e-5)


def test_a_token_stays_in_the_set_as_the_policy_moves(model, params, rollout):
    """Under other parameters the top-k is another; log-probs are still finite, and those of the set of old."""
    other = jax.tree.map(lambda x: -x, params)
    _, metrics = update(model, other, rollout, MASKED, epochs=2)
    assert np.isfinite(list(metrics.values())).all()
    assert 0.1 < metrics["sampling/logp_gap_max"] < 1e3


def test_what_cannot_be(model, params, rollout):
    for settings in ({"top_k": None}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=r"set sampling\.top_k, or leave out algorithm\.keep_sampling_mask"):
            sampler(model, **settings)
    with pytest.raises(ValueError, match="keep_mask=True"):
        update(model, params, rollout.replace(kept=None), MASKED)
    with pytest.raises(ValueError, match="given rows do not say"):
        GivenAdvantages(MASKED)
