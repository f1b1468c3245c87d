"""TRPO's step against `trpo_step` on functions written out with repeated prompts, and what must not change it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.policy_gradient.estimators import GroupAdvantage
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.presets import ppo
from jaxrl_llm.algorithms.policy_gradient.surrogates import Clipped
from jaxrl_llm.algorithms.rounding import unrounded
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.algorithms.trust_region.natural_gradient import trpo_step
from jaxrl_llm.algorithms.trust_region.parameter_subset import ParameterSubset
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig, make_trust_region_step
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh, parameter_shardings, replicated
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.types import Rollout

TRPO = PolicyGradient(surrogate=Clipped(clip_low=None, clip_high=None))
REGION = TrustRegionConfig(max_kl=0.01, cg_iterations=4)
Result = tuple[Params, dict[str, float]]


@functools.cache
def compiled(model: Transformer, algorithm: PolicyGradient, region: TrustRegionConfig, **settings: Any) -> Callable:
    """One program for all tests that ask for the same."""
    return jax.jit(make_trust_region_step(model, algorithm, region, **settings))


def step_once(
    model: Transformer,
    params: Params,
    rollout: Rollout,
    rewards: np.ndarray,
    algorithm: PolicyGradient = TRPO,
    region: TrustRegionConfig = REGION,
    **settings: Any,
) -> Result:
    """Parameters and metrics after one step."""
    state = make_train_state(params, optax.identity(), 0)
    state, metrics = compiled(model, algorithm, region, **settings)(state, rollout, rewards)
    assert state.step == 1 and not jax.tree.leaves(unrounded(state.params, state.opt_state)[1])
    return jax.device_get(state.params), {
        name: float(value) for name, value in metrics.items() if not name.startswith("perf/")
    }


def make_rewards(seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32)


def change(new: Params, old: Params) -> Params:
    return jax.tree.map(lambda a, b: np.asarray(a, np.float32) - np.asarray(b, np.float32), new, old)


def repeated_distributions(model: Transformer, params: Params, rollout: Rollout, temperature: float) -> jax.Array:
    """Log-probs `[P, G, Tc, V]` of every next token, from the logits of P·G whole sequences."""
    prompts, group, width = rollout.completion.shape
    tokens = np.zeros((prompts, group, rollout.prompt.shape[1] + width), np.int32)
    places = np.zeros((prompts, group, width), np.int32)
    for p, g in np.ndindex(prompts, group):
        start = rollout.prompt_lengths[p]
        tokens[p, g, :start] = rollout.prompt[p, :start]
        tokens[p, g, start : start + width] = rollout.completion[p, g]
        places[p, g] = start + np.arange(width) - 1
    logits = model.logits(params, tokens.reshape(prompts * group, -1)) / temperature
    every = jax.nn.log_softmax(logits, axis=-1).reshape(prompts, group, -1, model.config.vocab_size)
    return jnp.take_along_axis(every, places[..., None], axis=2)


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize(
    ("algorithm", "fisher", "architecture", "temperature"),
    [
        pytest.param(TRPO, "gauss_newton", {}, 1.0, marks=pytest.mark.slow),
        (
            dataclasses.replace(TRPO, aggregation="token-mean", mask_truncated=True),
            "hessian",
            {"tie_embeddings": False, "logit_softcap": 3.0, "scan_layers": False},
            0.7,
        ),
        (TRPO, "gauss_newton", {"known_tokens": 48}, 1.0),  # what is impossible is no part of the divergence
    ],
    ids=["gauss_newton", "hessian", "known_tokens"],
)
def test_the_step_is_that_of_all_logits(
    algorithm, fisher, architecture, temperature, tiny_config, lively_params, make_rollout
):
    model = Transformer(tiny_config(num_layers=1, **architecture))
    params, rollout, rewards = lively_params(model), make_rollout(), make_rewards()
    rollout = rollout.replace(completion=rollout.completion % (model.config.known_tokens or model.config.vocab_size))
    mask = np.asarray(rollout.mask)
    if algorithm.mask_truncated:
        mask = mask & rollout.finished[..., None]
    region = dataclasses.replace(REGION, fisher=fisher, max_kl=0.02)

    centred = rewards - rewards.mean(axis=1, keepdims=True)
    advantages = (centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4))[..., None]
    tokens = mask.sum(axis=-1, keepdims=True)
    weights = mask / np.maximum(tokens, 1) / np.sum(tokens > 0)
    if algorithm.aggregation == "token-mean":
        weights = mask / mask.sum()

    @jax.jit
    def plain(params: Params) -> tuple[Params, Any]:
        old = repeated_distributions(model, params, rollout, temperature)

        def surrogate(params: Params) -> jax.Array:
            new = repeated_distributions(model, params, rollout, temperature)
            gap = jnp.take_along_axis(new - old, rollout.completion[..., None], axis=-1)[..., 0]
            return jnp.sum(jnp.where(mask, weights * jnp.exp(gap) * advantages, 0.0))

        def kl(params: Params) -> jax.Array:
            new = repeated_distributions(model, params, rollout, temperature)
            return jnp.sum(weights * jnp.sum(jnp.exp(old) * (old - new), axis=-1))

        return trpo_step(surrogate, kl, params, max_kl=region.max_kl, iterations=region.cg_iterations)

    expected, found = plain(params)
    ours, metrics = step_once(model, params, rollout, rewards, algorithm, region, temperature=temperature)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(change(expected, params)))
    assert largest > 1e-3
    moved = change(ours, params), change(expected, params)
    chex.assert_tree_all_finite(moved)  # a comparison takes two NaNs for equal
    chex.assert_trees_all_close(*moved, rtol=0, atol=2e-3 * largest)
    assert metrics["trpo/accepted"] == 1
    for name in ("trpo/kl", "trpo/improvement", "trpo/step_scale", "trpo/backtracks", "grad_norm"):
        assert metrics[name] == pytest.approx(float(found[name].value()), rel=2e-3, abs=1e-6), name


@pytest.fixture(scope="module")
def whole(tiny_config, lively_params, make_rollout) -> dict[str, Any]:
    """4 prompts × 4 samples in one piece on one device."""
    model = Transformer(tiny_config())
    params = jax.device_get(lively_params(model))
    case = {"model": model, "params": params, "rollout": make_rollout(), "rewards": make_rewards()}
    params, metrics = step_once(**case)
    assert metrics["trpo/accepted"] == 1 and 0 < metrics["trpo/kl"] <= REGION.max_kl
    return {"case": case, "change": change(params, case["params"]), "metrics": metrics}


def same_as_whole(found: Result, whole: dict[str, Any]) -> None:
    params, metrics = found
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole["change"]))
    moved = change(params, whole["case"]["params"])
    chex.assert_tree_all_finite(moved)
    chex.assert_trees_all_close(moved, whole["change"], rtol=0, atol=2e-3 * largest)
    assert metrics == pytest.approx(whole["metrics"], rel=5e-3, abs=1e-5)


def test_micro_batches_chunks_and_padding_do_not_change_the_step(whole):
    """Four pieces of wider rows, and of the nine positions the logits of four at a time."""
    rollout: Rollout = whole["case"]["rollout"]
    tail = ((0, 0), (0, 0), (0, 3))
    wide = rollout.replace(
        completion=np.pad(np.where(rollout.mask, rollout.completion, 63), tail, constant_values=1),
        logprobs=np.pad(rollout.logprobs, tail, constant_values=np.nan),
        sampler_logprobs=np.pad(np.where(rollout.mask, rollout.sampler_logprobs, np.nan), tail),
    )
    found = step_once(**{**whole["case"], "rollout": wide}, plan=MicroBatches(4), chunk_size=4)
    same_as_whole(found, whole)


def test_a_mesh_does_not_change_the_step(mesh, whole):
    """One program, compiled once, with the state donated and split over eight devices."""
    case = whole["case"]
    shardings = parameter_shardings(mesh, case["model"].logical_axes(), case["params"])
    step = jax.jit(make_trust_region_step(case["model"], TRPO, REGION, plan=MicroBatches(2)), donate_argnums=0)
    with jax.set_mesh(mesh), CompilationCounter() as counter:
        params = jax.device_put(case["params"], shardings)
        state, metrics = step(make_train_state(params, optax.identity(), 0), case["rollout"], case["rewards"])
        found = (
            jax.device_get(state.params),
            {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")},
        )
        assert counter.counts["trust_region_step"] == 1
    same_as_whole(found, whole)


# ---------------------------------------------------------------- the region


@pytest.mark.parametrize("cause", ["equal rewards", "a reward that is not finite"])
def test_a_refused_step_leaves_the_parameters_bit_equal(cause, whole):
    rewards = np.ones((4, 4), np.float32)
    if cause != "equal rewards":
        rewards = make_rewards()
        rewards[1, 2] = np.nan
    params, metrics = step_once(**{**whole["case"], "rewards": rewards})
    assert metrics["trpo/accepted"] == metrics["trpo/kl"] == 0
    assert metrics["frac_steps_skipped"] == (cause != "equal rewards")
    chex.assert_trees_all_equal(params, whole["case"]["params"])


def test_another_reward_moves_the_other_way(whole):
    """With all advantages turned round, nearly the opposite step improves the objective."""
    case = whole["case"]
    params, metrics = step_once(**{**case, "rewards": -case["rewards"]})
    assert metrics["trpo/improvement"] > 0
    moved = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
        for tree in (change(params, case["params"]), whole["change"])
    ]
    assert moved[0] @ moved[1] < -0.9 * np.linalg.norm(moved[0]) * np.linalg.norm(moved[1])


def test_last_layers_in_half_precision_from_some_of_the_prompts(whole, tiny_config):
    """Only the last layer and the last norm move, by a Fisher matrix of half the prompts' sampled tokens."""
    model = Transformer(tiny_config(dtype="bfloat16", param_dtype="bfloat16"))
    case = whole["case"] | {
        "model": model,
        "params": jax.tree.map(lambda x: x.astype("bfloat16"), whole["case"]["params"]),
    }
    region = dataclasses.replace(REGION, trainable="last_layers", fisher_fraction=0.5, fisher="sampled")
    params, metrics = step_once(**case, region=region)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    assert metrics["trpo/accepted"] == 1 and 0 < metrics["trpo/kl"] <= REGION.max_kl
    moved = change(params, case["params"])
    assert not np.any(moved["embed"]["weight"]) and np.any(moved["final_norm"]["scale"])
    for name in ("gate", "up", "down"):
        leaf = moved["layers"]["mlp"][name]["weight"]
        assert not np.any(leaf[0]) and np.any(leaf[1])


def test_a_share_of_the_prompts_that_pieces_do_not_divide(whole):
    """Two of four prompts, with four samples each, are no sixteen pieces: all four are drawn."""
    region = dataclasses.replace(REGION, fisher_fraction=0.3)
    same_as_whole(step_once(**whole["case"], region=region, plan=MicroBatches(16)), whole)


LEARNING_MAX_KL = 0.1


def learned(tiny_config, sign: int) -> tuple[list[float], list[dict[str, float]]]:
    """Rewards and metrics of each step, with advantages of this sign.

    Half a point for a first token that is 5, half for stopping right after it.
    """
    stop, wanted, vocabulary, steps = 0, 5, 16, 24
    model = Transformer(tiny_config(vocab_size=vocabulary, num_layers=1))
    algorithm = dataclasses.replace(TRPO, advantage=GroupAdvantage(scale="batch"), aggregation="token-mean")
    region = TrustRegionConfig(max_kl=LEARNING_MAX_KL, cg_iterations=5)
    sampling, one_device = SamplingConfig(max_tokens=3), make_mesh(devices=jax.devices()[:1])
    sampler = Sampler(model, sampling, group=16, stop_tokens=(stop,), mesh=one_device)
    state = make_train_state(jax.jit(model.init)(jax.random.key(0)), optax.identity(), seed=0)
    state = jax.device_put(state, replicated(one_device))
    update = jax.jit(make_trust_region_step(model, algorithm, region), donate_argnums=0)
    numbers, rewards, found = np.random.default_rng(0), [], []
    with CompilationCounter() as counter:
        for step in range(steps):
            prompts = numbers.integers(1, vocabulary, (16, 3))
            rollout = sampler(state.params, prompts, numbers.integers(1, 4, 16), state.key, step)
            stops = (rollout.completion_lengths == 2) & rollout.finished
            reward = np.float32(0.5) * ((rollout.completion[..., 0] == wanted) + np.float32(stops))
            state, metrics = update(state, rollout, sign * reward)
            rewards.append(float(reward.mean()))
            found.append({name: float(value) for name, value in metrics.items() if not name.startswith("perf/")})
    assert counter.counts["trust_region_step"] == 1
    return rewards, found


def test_it_learns_and_its_divergence_never_exceeds_the_bound(tiny_config):
    rewards, found = learned(tiny_config, 1)
    assert all(0 <= metrics["trpo/kl"] <= LEARNING_MAX_KL for metrics in found)
    assert np.mean([metrics["trpo/accepted"] for metrics in found]) > 0.7
    assert np.mean(rewards[:4]) < 0.15, rewards
    assert np.mean(rewards[-4:]) > 0.5, rewards


@pytest.mark.slow
def test_it_does_not_learn_with_the_sign_flipped(tiny_config):
    """A group's advantages change their sign with its rewards."""
    rewards, _ = learned(tiny_config, -1)
    assert np.mean(rewards[-4:]) < 0.1, rewards


def test_subsets_are_taken_and_put_back(whole):
    params = whole["case"]["params"]
    gates = ParameterSubset(params, moves=lambda path: path.endswith("gate.weight"))
    part = gates.take(params)
    assert list(part) == ["layers.mlp.gate.weight"]
    doubled = gates.put(params, {name: 2 * value for name, value in part.items()})
    np.testing.assert_array_equal(doubled["layers"]["mlp"]["gate"]["weight"], 2 * part["layers.mlp.gate.weight"])
    np.testing.assert_array_equal(doubled["layers"]["mlp"]["up"]["weight"], params["layers"]["mlp"]["up"]["weight"])
    assert len(ParameterSubset(params).take(params)) == len(jax.tree.leaves(params))
    adapter = {"weight": np.ones((2, 3, 3)), "lora_a": np.ones((2, 1, 3)), "lora_b": np.ones((2, 3, 1))}
    adapted = {"layers": {"query": adapter}, "embed": {"weight": np.ones((4, 3))}}
    assert list(ParameterSubset(adapted).take(adapted)) == ["layers.query.lora_a", "layers.query.lora_b"]
    with pytest.raises(ValueError, match="none of the parameters is to move"):
        ParameterSubset(params, moves=lambda path: False)
    with pytest.raises(ValueError, match="last_layers=3 must be between 1 and the 2 there are"):
        ParameterSubset(params, "last_layers", last_layers=3)


def test_what_does_not_fit_raises(whole):
    case = whole["case"]
    for field, value in (
        ("max_kl", 0),
        ("damping", -1),
        ("cg_iterations", 0),
        ("cg_tolerance", -1),
        ("tries", 0),
        ("shrink", 1),
        ("kl_tolerance", 0),
        ("fisher", "diagonal"),
        ("fisher_fraction", 0),
        ("trainable", "some"),
        ("last_layers", 0),
    ):
        with pytest.raises(ValueError, match=rf"trust_region\.{field}="):
            TrustRegionConfig(**{field: value})
    with pytest.raises(ValueError, match="made of a critic's values, which are not trained here"):
        make_trust_region_step(case["model"], ppo())
    with pytest.raises(ValueError, match="greedily"):
        make_trust_region_step(case["model"], TRPO, temperature=0)
    state = make_train_state(case["params"], optax.identity(), 0)
    with_reference = make_trust_region_step(case["model"], dataclasses.replace(TRPO, kl_coef=0.1))
    with pytest.raises(ValueError, match="pass its parameters"):
        jax.eval_shape(with_reference, state, case["rollout"], case["rewards"])
    with pytest.raises(ValueError, match=r"rewards has shape \(4, 3\)"):
        jax.eval_shape(make_trust_region_step(case["model"], TRPO), state, case["rollout"], case["rewards"][:, :3])
