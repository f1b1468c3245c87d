"""A policy that teaches itself beside the plain way: whole sequences behind either prompt, all logits of both."""

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
from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.algorithms.distillation.presets import sdft, sdpo
from jaxrl_llm.algorithms.distillation.self_teacher import SelfTeacher
from jaxrl_llm.algorithms.distillation.step import make_distillation_step
from jaxrl_llm.algorithms.interfaces import Feedback, HintedPrompts
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.losses import aggregate, generalized_jsd
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh, replicated

RATE = 0.25
LENGTHS = np.array([[9, 1], [0, 4], [7, 7], [3, 0]], np.int32)
"""Of the prompts with hints: two samples are told nothing."""


@pytest.fixture(scope="module")
def rollout(make_rollout):
    return make_rollout(prompts=4, group=2)


@pytest.fixture(scope="module")
def hinted() -> HintedPrompts:
    tokens = np.random.default_rng(1).integers(0, 64, (4, 2, 9)).astype(np.int32)
    return HintedPrompts(tokens, LENGTHS, LENGTHS == 0)


@pytest.fixture(scope="module")
def model(tiny_config) -> Transformer:
    return Transformer(tiny_config())


def teaching(policy: Any, **settings: Any) -> Distillation:
    return Distillation(itself=SelfTeacher(policy=policy, rate=RATE if policy == "average" else 0.05), **settings)


CASES = {
    "average": teaching("average", beta=0.5),
    "current": teaching("current", divergence="sampled"),
    "start": teaching("start", beta=0.0, aggregation="seq-mean-token-mean"),
}


@pytest.fixture(scope="module")
def run(model, rollout, hinted, lively_params):
    """The change under SGD with rate 1, the state and the metrics; average and start are other parameters."""

    def run(algorithm: Distillation, mesh: MeshConfig | None = None, **plan: int) -> Any:
        optimizer, params, other = optax.sgd(1.0), lively_params(model), lively_params(model, seed=1)
        step = make_distillation_step(model, optimizer, algorithm, {}, UpdateConfig(**plan))
        devices = 1 if mesh is None else 8
        placed = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
        with jax.set_mesh(placed):
            state = make_train_state(params, optimizer, 0, algorithm=algorithm)
            state = state.replace(average=other) if algorithm.averages_policy else state
            state = jax.device_put(state, replicated(placed))
            given = {"itself": other} if algorithm.needs_reference else None
            after, metrics = jax.jit(step)(state, rollout, Feedback(None, hinted=hinted), given)
        change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, after.params)
        chex.assert_tree_all_finite(change)
        return change, after, {name: float(value) for name, value in metrics.items()}

    return run


@pytest.fixture(scope="module")
def plain(model, rollout, hinted, repeated_logits, lively_params):
    """The same from the definition: P·G groups of one behind the prompts with hints."""

    def behind_hints(params: Any) -> jax.Array:
        flat = {name: x.reshape(8, 1, *x.shape[2:]) for name, x in rollout.of_samples.items()}
        alone = rollout.replace(
            prompt=hinted.tokens.reshape(8, -1), prompt_lengths=np.maximum(LENGTHS, 1).reshape(8), **flat
        )
        return repeated_logits(model, params, alone).reshape(4, 2, rollout.completion.shape[-1], -1)

    def plain(algorithm: Distillation) -> Any:
        params = lively_params(model)
        theirs = behind_hints(params if algorithm.itself.policy == "current" else lively_params(model, seed=1))
        mask = np.asarray(rollout.mask) & (LENGTHS > 0)[..., None]

        def loss(params: Any) -> jax.Array:
            own = repeated_logits(model, params, rollout)
            if algorithm.divergence == "exact":
                found = generalized_jsd(own, theirs, beta=algorithm.beta)
            else:
                lp, other = (
                    jnp.take_along_axis(jax.nn.log_softmax(x), rollout.completion[..., None], axis=-1)[..., 0]
                    for x in (own, theirs)
                )
                found = jax.lax.stop_gradient(lp - other) * (1 + lp - jax.lax.stop_gradient(lp))
            return aggregate(found, mask, mode=algorithm.aggregation)

        value, change = jax.jit(jax.value_and_grad(loss))(params)
        return jax.tree.map(np.asarray, change), float(value)

    return plain


@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(of, id=name, marks=[pytest.mark.slow] * (name == "start")) for name, of in CASES.items()],
)
def test_the_step_is_that_of_the_definition(algorithm, run, plain, model, lively_params):
    expected, value = plain(algorithm)
    change, after, metrics = run(algorithm)
    chex.assert_trees_all_close(change, expected, rtol=1e-4, atol=5e-6)
    assert metrics["loss"] == pytest.approx(value, rel=1e-5)
    assert metrics["distillation/itself"] == metrics["distillation/divergence"] != 0
    assert metrics["distillation/frac_taught"] == 0.75
    assert metrics["distillation/frac_too_long"] == 0.25
    assert not any("reward" in name for name in metrics)
    if not algorithm.averages_policy:
        assert after.average is None
        return
    mean = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, lively_params(model, seed=1), after.params)
    chex.assert_trees_all_close(after.average, mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(fsdp=8), pytest.param(MeshConfig(fsdp=2, context=2, tensor=2), marks=pytest.mark.slow)],
    ids=["fsdp8", "context"],
)
def test_devices_and_pieces_change_nothing(mesh, run, plain):
    expected, value = plain(CASES["average"])
    change, _, metrics = run(CASES["average"], mesh, micro_batches=8 // mesh.fsdp // 2 or 1)
    chex.assert_trees_all_close(change, expected, rtol=1e-4, atol=5e-6)
    assert metrics["loss"] == pytest.approx(value, rel=1e-5)


def test_where_nothing_is_told_nothing_is_learned(model, rollout, lively_params):
    nothing = HintedPrompts(np.zeros((4, 2, 1), np.int32), np.zeros((4, 2), np.int32), np.zeros((4, 2), bool))
    optimizer, algorithm, params = optax.sgd(1.0), sdpo(), lively_params(model)
    step = make_distillation_step(model, optimizer, algorithm, {})
    state = make_train_state(params, optimizer, 0, algorithm=algorithm)
    after, metrics = jax.jit(step)(state, rollout, Feedback(np.ones((4, 2), np.float32), hinted=nothing))
    chex.assert_trees_all_equal(after.params, params)
    assert float(metrics["loss"]) == 0
    assert float(metrics["reward"]) == 1


def test_what_does_not_fit_is_told(model, rollout, lively_params):
    for settings, message in (
        ({"policy": "ema"}, "algorithm.itself.policy='ema' must be one of"),
        ({"rate": 0.0}, "algorithm.itself.rate=0.0 must be above 0 and at most 1"),
        ({"hints": ()}, r"algorithm.itself.hints=\(\) must be at least one text"),
    ):
        with pytest.raises(ValueError, match=message):
            SelfTeacher(**settings)
    optimizer = optax.sgd(1.0)
    with pytest.raises(ValueError, match=r"update.tokens_per_micro_batch=64 packs completions .* --update.micro_batc"):
        make_distillation_step(model, optimizer, sdft(), {}, UpdateConfig(tokens_per_micro_batch=64))
    state = make_train_state(lively_params(model), optimizer, 0, algorithm=sdft())
    with pytest.raises(ValueError, match="Distillation reads what its own teacher is told: pass Feedback with hinted"):
        make_distillation_step(model, optimizer, sdft(), {})(state, rollout)
    with pytest.raises(ValueError, match=r"algorithm.weights=\(1.0, 2.0\) are 2 for 1 teachers"):
        dataclasses.replace(sdft(), weights=(1.0, 2.0)).weights_of(0)
    assert set(SelfTeacher(policy="current", hints=("{answer}",)).without_effect) == {"rate", "solved"}
