"""Steps and evaluations of any objective: references, micro-batches, meshes, batches that add up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.offline import make_offline_evaluation, make_offline_step, make_reference_pass
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.masking import count_true, masked_sum
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Mean, Metrics
from jaxrl_llm.sharding import make_mesh


class Rows(NamedTuple):
    prompt: Any
    prompt_lengths: Any
    completion: Any
    mask: Any
    ref_logprobs: Any = None


class Counts(NamedTuple):
    rows: jax.Array
    width: int


@dataclasses.dataclass(frozen=True)
class Regression:
    """(Σ logprobs − Σ ref_logprobs)² of each completion, a mean over those that have tokens."""

    needs_reference: bool = True
    whole_groups: bool = False
    whole_batch: bool = False

    def normalizer(self, rows: Rows) -> Counts:
        return Counts(count_true(jnp.any(rows.mask, axis=-1)), rows.mask.shape[0])

    def scores(self, model: Transformer, params: Params, texts: Any) -> jax.Array:
        return Scorer(model)(params, texts).logprobs

    def loss(self, scores: jax.Array, rows: Rows, normalizer: Counts) -> tuple[jax.Array, Metrics]:
        assert isinstance(normalizer.width, int)  # what is static stays so
        logprobs = scores
        gap = masked_sum(logprobs - rows.ref_logprobs - 0.5, rows.mask, axis=-1)
        valid = jnp.any(rows.mask, axis=-1)
        return masked_sum(gap**2, valid) / normalizer.rows, {"gap": Mean.of(jax.lax.stop_gradient(gap), valid)}


@pytest.fixture(scope="module")
def setting(tiny_config: Callable[..., Any], lively_params: Callable[..., Params], make_rollout: Callable[..., Any]):
    model = Transformer(tiny_config())
    rollout = make_rollout(prompts=8, group=2)
    rows = Rows(rollout.prompt, rollout.prompt_lengths, rollout.completion, np.array(rollout.mask))
    params, reference = lively_params(model), lively_params(model, seed=1)
    step = jax.jit(make_offline_step(model, optax.sgd(1.0), Regression()))
    return model, params, reference, rows, changed(step, params, rows, reference)


def changed(step: Any, params: Params, *args: Any) -> tuple[Params, dict[str, float]]:
    """The gradient (the change under SGD with rate 1), and the metrics."""
    state, metrics = step(make_train_state(params, optax.sgd(1.0), 0), *args)
    gradient = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, state.params)
    chex.assert_tree_all_finite(gradient)  # a comparison takes two NaNs for equal
    return gradient, {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}


def test_a_reference_ahead_is_one_in_the_step(setting) -> None:
    model, params, reference, rows, (gradient, metrics) = setting
    ahead = jax.jit(make_reference_pass(model, MicroBatches(2)))(reference, rows)
    np.testing.assert_allclose(ahead, np.where(rows.mask, Scorer(model)(reference, rows).logprobs, 0), atol=1e-5)
    step = jax.jit(make_offline_step(model, optax.sgd(1.0), Regression()))
    again, same = changed(step, params, rows._replace(ref_logprobs=ahead))
    chex.assert_trees_all_close(again, gradient, rtol=0, atol=1e-5)
    assert same == pytest.approx(metrics, rel=1e-5)
    assert metrics["loss"] > 1


def test_micro_batches_and_meshes_change_nothing(setting) -> None:
    model, params, reference, rows, (gradient, metrics) = setting
    with jax.set_mesh(make_mesh()):
        step = jax.jit(make_offline_step(model, optax.sgd(1.0), Regression(), plan=MicroBatches(2)))
        again, same = changed(step, params, rows, reference)
    chex.assert_trees_all_close(again, gradient, rtol=0, atol=1e-4)
    assert same == pytest.approx(metrics, rel=1e-4)


def test_batches_of_an_evaluation_add_up(setting) -> None:
    """Also unequal ones, of which the last is filled up with rows that have an empty mask."""
    model, params, reference, rows, (_, metrics) = setting
    objective, evaluate = Regression(), jax.jit(make_offline_evaluation(model, Regression()))
    whole, records = evaluate(params, rows, reference)
    assert float(whole) == pytest.approx(metrics["loss"], rel=1e-5)

    def part(items: list[int], valid: list[bool]) -> Rows:
        taken = Rows(*(None if x is None else np.asarray(x)[items] for x in rows))
        return taken._replace(mask=taken.mask & np.array(valid)[:, None, None])

    parts = [part([0, 1, 2, 3, 4], [True] * 5), part([5, 6, 7, 0, 1], [True] * 3 + [False] * 2)]
    total = jax.tree.map(lambda *counts: sum(counts), *(objective.normalizer(rows) for rows in parts))
    found = [evaluate(params, rows, reference, total) for rows in parts]
    assert float(sum(loss for loss, _ in found)) == pytest.approx(float(whole), rel=1e-5)
    assert float(found[0][1]["gap"].merge(found[1][1]["gap"]).value()) == pytest.approx(
        float(records["gap"].value()), rel=1e-5
    )


def test_a_missing_reference_raises(setting) -> None:
    model, params, _, rows, _ = setting
    with pytest.raises(ValueError, match="this objective reads a reference: pass its parameters, or rows with ref"):
        make_offline_evaluation(model, Regression())(params, rows)
