"""Distillation steps beside the plain way: whole sequences, all logits of student and teachers."""

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
from jaxrl_llm.algorithms.distillation.step import make_distillation_step
from jaxrl_llm.algorithms.interfaces import Feedback
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.losses import aggregate, generalized_jsd
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh, replicated

TEMPERATURE = 0.7
KNOWN = 61
"""Tokens of the tokenizer: the student's head has three more, one teacher's none."""


@pytest.fixture(scope="module")
def rollout(make_rollout):
    made = make_rollout(prompts=4, group=2)
    return made.replace(prompt=made.prompt % KNOWN, completion=made.completion % KNOWN)


@pytest.fixture(scope="module")
def model(tiny_config) -> Transformer:
    return Transformer(tiny_config()).with_known_tokens(KNOWN)


@pytest.fixture(scope="module")
def teachers(tiny_config) -> dict[str, Transformer]:
    """One of the student's size, and one that is wider, with a shorter head and a cap on its logits."""
    wide = Transformer(tiny_config(vocab_size=KNOWN, embed_dim=32, mlp_dim=48, logit_softcap=5.0))
    return {"alike": Transformer(tiny_config()).with_known_tokens(KNOWN), "wide": wide}


@pytest.fixture(scope="module")
def given(teachers, lively_params) -> dict[str, Any]:
    return {name: lively_params(teacher, seed=1 + n) for n, (name, teacher) in enumerate(teachers.items())}


@pytest.fixture(scope="module")
def run(model, teachers, given, rollout, lively_params):
    """The change under SGD with rate 1, and the metrics."""

    def run(algorithm: Distillation, *, rewards: Any = None, devices: int = 1, **plan: int) -> Any:
        optimizer, mesh = optax.sgd(1.0), make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
        step = make_distillation_step(
            model, optimizer, algorithm, teachers, UpdateConfig(**plan), temperature=TEMPERATURE
        )
        params = lively_params(model)
        with jax.set_mesh(mesh):
            state = jax.device_put(make_train_state(params, optimizer, 0), replicated(mesh))
            after, metrics = jax.jit(step)(state, rollout, rewards, given)
        change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, after.params)
        chex.assert_tree_all_finite(change)
        return change, {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}

    return run


@pytest.fixture(scope="module")
def plain(model, teachers, given, rollout, repeated_logits, lively_params):
    """The same from the definition."""

    def plain(algorithm: Distillation) -> Any:
        weights, mask = algorithm.weights_of(2), np.asarray(rollout.mask)
        of_teachers = [repeated_logits(t, given[name], rollout)[..., :KNOWN] for name, t in teachers.items()]

        def divergences(params: Any) -> list[jax.Array]:
            own = repeated_logits(model, params, rollout)[..., :KNOWN]
            if algorithm.divergence == "exact":
                return [generalized_jsd(own, x, beta=algorithm.beta, temperature=TEMPERATURE) for x in of_teachers]
            lp, *others = (
                jnp.take_along_axis(jax.nn.log_softmax(x / TEMPERATURE), rollout.completion[..., None], axis=-1)[..., 0]
                for x in (own, *of_teachers)
            )
            gaps = [jax.lax.stop_gradient(lp - other) for other in others]
            return [gap + gap * (lp - jax.lax.stop_gradient(lp)) for gap in gaps]

        def loss(params: Any) -> Any:
            found = divergences(params)
            total = sum(w * d for w, d in zip(weights, found, strict=True))
            value = aggregate(total, mask, mode=algorithm.aggregation, max_length=mask.shape[-1])
            return value, [float_of(d, mask) for d in found]

        (value, means), change = jax.jit(jax.value_and_grad(loss, has_aux=True))(lively_params(model))
        return change, float(value), [float(mean) for mean in means]

    def float_of(divergence: jax.Array, mask: np.ndarray) -> jax.Array:
        return jnp.sum(jnp.where(mask, divergence, 0)) / mask.sum()

    return plain


ALGORITHMS = {
    "reverse": Distillation(),
    "jsd": Distillation(beta=0.4, weights=(0.5, 2.0), aggregation="seq-mean-token-mean"),
    "sampled": Distillation(divergence="sampled", weights=(0.0, 1.0), aggregation="seq-mean-token-sum-norm"),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_the_step_is_that_of_the_definition(algorithm, run, plain, monkeypatch):
    monkeypatch.setattr("jaxrl_llm.algorithms.distillation.step.CHUNK_LOGITS", 2 * KNOWN * 8)  # two positions at a time
    expected, value, means = plain(algorithm)
    change, metrics = run(algorithm)
    chex.assert_trees_all_close(change, jax.tree.map(np.asarray, expected), rtol=1e-4, atol=5e-6)
    assert metrics["loss"] == pytest.approx(value, rel=1e-5)
    assert [metrics[f"distillation/{name}"] for name in ("alike", "wide")] == pytest.approx(means, rel=1e-5)
    assert not any("reward" in name for name in metrics)


def test_pieces_devices_and_packed_rows_change_nothing(run, plain):
    algorithm = ALGORITHMS["jsd"]
    expected, value, _ = plain(algorithm)
    for how in ({"micro_batches": 2, "devices": 2}, {"tokens_per_micro_batch": 24}):
        change, metrics = run(algorithm, **how)
        chex.assert_trees_all_close(change, jax.tree.map(np.asarray, expected), rtol=1e-4, atol=5e-6)
        assert metrics["loss"] == pytest.approx(value, rel=1e-5)


def test_rewards_are_told_and_not_learned_from(run):
    plain_change, plain_metrics = run(Distillation())
    rewards = np.arange(8, dtype=np.float32).reshape(4, 2)
    change, metrics = run(Distillation(), rewards=Feedback(rewards))
    chex.assert_trees_all_equal(change, plain_change)
    assert metrics.items() > plain_metrics.items()
    assert metrics["reward"] == 3.5


def test_a_student_that_is_its_teacher_has_nothing_to_learn(model, rollout, lively_params):
    step = make_distillation_step(model, optax.sgd(1.0), Distillation(), {"self": model})
    params = lively_params(model)
    state, metrics = jax.jit(step)(make_train_state(params, optax.sgd(1.0), 0), rollout, None, {"self": params})
    chex.assert_trees_all_close(state.params, params, rtol=0, atol=1e-6)
    assert float(metrics["distillation/divergence"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["entropy"]) > 0.1


def test_what_does_not_fit_is_told(model, teachers, given, rollout, lively_params):
    for settings, message in (
        ({"beta": 1.5}, r"algorithm.beta=1.5 must be"),
        ({"weights": (0.0, 0.0)}, r"algorithm.weights=\(0.0, 0.0\) must be None, or finite numbers"),
        ({"divergence": "sampled", "beta": 0.5}, "algorithm.beta=0.5 would have no effect: the sampled divergence is"),
    ):
        with pytest.raises(ValueError, match=message):
            Distillation(**settings)
    optimizer, sampled = optax.sgd(1.0), Distillation(divergence="sampled")
    with pytest.raises(ValueError, match=r"update.epochs=2 × update.minibatches=1: from the second optimizer step on"):
        make_distillation_step(model, optimizer, sampled, teachers, UpdateConfig(epochs=2))
    with pytest.raises(ValueError, match="sampled at temperature 0"):
        make_distillation_step(model, optimizer, sampled, teachers, temperature=0)
    state = make_train_state(lively_params(model), optimizer, 0)
    with pytest.raises(ValueError, match=r"algorithm.weights=\(1.0,\) are 1 for 2 teachers: one each"):
        make_distillation_step(model, optimizer, Distillation(weights=(1.0,)), teachers)(state, rollout, None, given)
    with pytest.raises(ValueError, match="Distillation has nobody to learn from: pass teachers"):
        make_distillation_step(model, optimizer, Distillation(), {})(state, rollout)


def test_only_one_aggregation_reads_the_longest_length():
    assert set(Distillation().without_effect) == {"max_length"}
    assert not dataclasses.replace(Distillation(), aggregation="seq-mean-token-sum-norm").without_effect
