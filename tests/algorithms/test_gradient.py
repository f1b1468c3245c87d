"""Accumulation over micro-batches, on a loss whose gradient is known by hand."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches, collect, deal
from jaxrl_llm.algorithms.gradient import Loss, make_gradient_step
from jaxrl_llm.algorithms.rounding import widen
from jaxrl_llm.records import Max, Mean, Metrics

ROWS = np.arange(24, dtype=np.float32).reshape(12, 2)


def parameters(params: Any, texts: Any) -> Any:
    """The scores of a loss that is a function of the parameters alone."""
    return params


def loss(params: Any, rows: Any, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
    """Σ (w·x)² / 2N, whose gradient is Σ (w·x)·x / N."""
    products = rows["x"] @ params["w"]["weight"].astype(jnp.float32)
    return 0.5 * jnp.sum(products**2) / normalizer, {"mean": Mean.of(products), "max": Max.of(products)}


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 12])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_micro_batches_add_up(micro_batches, dtype):
    optimizer = optax.sgd(0.5)
    params = {"w": {"weight": jnp.array([0.5, -0.25], dtype)}}
    step = jax.jit(make_gradient_step(Loss(parameters, loss), optimizer, MicroBatches(micro_batches)))
    (after, _), metrics = step((params, optimizer.init(widen(params))), {"x": ROWS}, jnp.float32(12))
    products = ROWS @ np.array([0.5, -0.25])
    gradient = products @ ROWS / 12
    expected = np.array([0.5, -0.25]) - 0.5 * gradient
    weight = after["w"]["weight"]
    assert weight.dtype == dtype
    np.testing.assert_allclose(weight.astype(jnp.float32), expected, rtol=1e-6 if dtype == "float32" else 1e-2)
    values = {name: float(record.value()) for name, record in metrics.items()}
    expected_metrics = {
        "loss": 0.5 * np.sum(products**2) / 12,
        "grad_norm": np.linalg.norm(gradient),
        "mean": products.mean(),
        "max": products.max(),
        "frac_steps_skipped": 0,
    }
    assert values == pytest.approx(expected_metrics, rel=1e-2 if dtype == "bfloat16" else 1e-5)


def test_small_updates_of_bfloat16_parameters_are_computed_in_float32():
    """A gradient that bfloat16 sums would lose: 1 + 256 · 2⁻⁹ is 1.5 in float32, 1 in bfloat16."""

    def linear(params: Any, rows: Any, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
        return jnp.sum(rows["x"]) * params["weight"].astype(jnp.float32), {}

    rows = {"x": np.concatenate([[1.0], np.full(255, 2.0**-9)]).astype(np.float32)}
    params = {"weight": jnp.zeros((), jnp.bfloat16)}
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_gradient_step(Loss(parameters, linear), optimizer, MicroBatches(256)))
    (after, _), _ = step((params, optimizer.init(widen(params))), rows, jnp.float32(1))
    assert float(after["weight"]) == pytest.approx(-(1 + 255 * 2.0**-9), rel=2**-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, micro_batches):
    """Not even the moments or the count of steps; the next step is as if it had not been."""
    optimizer = optax.adam(0.5)
    params = {"w": {"weight": jnp.array([0.5, -0.25], jnp.bfloat16)}}
    step = jax.jit(make_gradient_step(Loss(parameters, loss), optimizer, MicroBatches(micro_batches)))
    before, metrics = step((params, optimizer.init(widen(params))), {"x": ROWS}, jnp.float32(12))
    assert float(metrics["frac_steps_skipped"].value()) == 0
    broken = ROWS.copy()
    broken[7, 1] = bad
    after, metrics = step(before, {"x": broken}, jnp.float32(12))
    chex.assert_trees_all_equal(after, before)
    assert float(metrics["frac_steps_skipped"].value()) == 1
    assert not np.isfinite(float(metrics["grad_norm"].value()))
    again, _ = step(after, {"x": ROWS}, jnp.float32(12))
    assert np.all(np.asarray(again[0]["w"]["weight"]) != np.asarray(before[0]["w"]["weight"]))


def test_deal_is_undone_by_collect():
    dealt = deal({"a": jnp.arange(12), "b": jnp.asarray(ROWS)}, 3)
    np.testing.assert_array_equal(dealt["a"], [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
    np.testing.assert_array_equal(collect(dealt["a"]), np.arange(12))
    np.testing.assert_array_equal(collect(dealt["b"]), ROWS)


def test_widen_touches_half_precision_only():
    tree = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    assert {name: leaf.dtype.name for name, leaf in widen(tree).items()} == {"a": "float32", "b": "float32"}
