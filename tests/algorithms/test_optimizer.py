"""Schedules by their values, AdamW against its equations."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.models.transformer import Transformer


def rates(total: int = 10, **settings: Any) -> list[float]:
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **settings), total)
    return [float(schedule(step)) for step in range(total)]


def test_shapes_without_warmup():
    assert rates() == [2.0] * 10
    assert rates(schedule="linear") == pytest.approx([2 * (1 - i / 10) for i in range(10)])
    assert rates(schedule="cosine") == pytest.approx([1 + math.cos(math.pi * i / 10) for i in range(10)], abs=1e-6)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_warmup_starts_above_zero_and_reaches_the_peak(shape):
    """The first step moves already; the shape after it takes what steps are left."""
    warm = rates(schedule=shape, warmup_steps=4)
    assert warm[:5] == pytest.approx([2 * (i + 1) / 5 for i in range(5)])
    expected = {
        "constant": [2.0] * 6,
        "linear": [2 * (1 - i / 6) for i in range(6)],
        "cosine": [1 + math.cos(math.pi * i / 6) for i in range(6)],
    }
    assert warm[4:] == pytest.approx(expected[shape], abs=1e-6)


def test_the_rate_never_is_negative_beyond_the_end():
    for shape in ("linear", "cosine"):
        schedule = make_schedule(OptimizerConfig(learning_rate=2.0, schedule=shape, warmup_steps=2), 6)
        assert float(schedule(6)) == pytest.approx(0, abs=1e-6)
        assert float(schedule(60)) == pytest.approx(0, abs=1e-6)


def test_adamw_equations_over_several_steps():
    """m̂ / (√v̂ + ε) + λ·w, with the schedule's rate, in float64 by hand."""
    config = OptimizerConfig(
        learning_rate=0.1, schedule="linear", weight_decay=0.3, b1=0.8, b2=0.95, eps=1e-3, max_grad_norm=None
    )
    optimizer = make_optimizer(config, make_schedule(config, 5))
    params = {"layer": {"weight": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5, 3.0])}}
    state = optimizer.init(params)
    hand = {name: np.array(leaf, np.float64) for name, leaf in params["layer"].items()}
    first, second = ({name: np.zeros(2) for name in hand} for _ in range(2))
    rng = np.random.default_rng(0)
    for step in range(4):
        gradient = {name: rng.normal(size=2).astype(np.float32) for name in hand}
        updates, state = optimizer.update({"layer": gradient}, state, params)
        params = optax.apply_updates(params, updates)
        for name in hand:
            first[name] = 0.8 * first[name] + 0.2 * gradient[name]
            second[name] = 0.95 * second[name] + 0.05 * gradient[name].astype(np.float64) ** 2
            direction = first[name] / (1 - 0.8 ** (step + 1))
            direction /= np.sqrt(second[name] / (1 - 0.95 ** (step + 1))) + 1e-3
            decay = 0.3 * hand[name] if name == "weight" else 0.0
            hand[name] = hand[name] - 0.1 * (1 - step / 5) * (direction + decay)
    for name in hand:
        np.testing.assert_allclose(params["layer"][name], hand[name], rtol=1e-5)


def test_only_weights_decay(tiny_config, lively_params):
    """With a zero gradient what changes is what decays: no norm and no bias, though stacked ones are matrices."""
    changes = {"attention_bias": True, "mlp_bias": True, "qk_norm": True, "tie_embeddings": False}
    params = lively_params(Transformer(tiny_config(**changes)))
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(config, make_schedule(config, 10))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(params), params)

    def check(path: Any, update: jax.Array, leaf: jax.Array) -> None:
        expected = -0.05 * np.asarray(leaf) if path[-1].key == "weight" else np.zeros(leaf.shape)
        np.testing.assert_allclose(update, expected, atol=1e-7, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, updates, params)
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)} == {"weight", "bias", "scale"}


def test_the_global_norm_is_clipped():
    """One factor for all leaves; a gradient within the bound is left alone."""

    def moment(gradient: dict[str, Any], bound: float | None) -> np.ndarray:
        config = OptimizerConfig(learning_rate=0.1, max_grad_norm=bound)
        optimizer = make_optimizer(config, make_schedule(config, 10))
        params = jax.tree.map(jnp.ones_like, gradient)
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        (mu,) = (node.mu for node in jax.tree.leaves(state, is_leaf=lambda n: hasattr(n, "mu")) if hasattr(node, "mu"))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(mu)]) / 0.1  # m = (1 − b1)·g

    gradient = {"a": {"weight": jnp.array([3.0, 0.0])}, "b": {"weight": jnp.array([4.0])}}  # norm 5
    np.testing.assert_allclose(moment(gradient, 2.0), np.array([3, 0, 4]) * 2 / 5, rtol=1e-5)
    np.testing.assert_allclose(moment(gradient, 6.0), [3, 0, 4], rtol=1e-5)
    np.testing.assert_allclose(moment(gradient, None), [3, 0, 4], rtol=1e-5)


def test_defaults_are_those_that_users_know():
    config = OptimizerConfig()
    assert (config.learning_rate, config.b1, config.b2, config.eps) == (1e-6, 0.9, 0.999, 1e-8)
    assert (config.weight_decay, config.max_grad_norm, config.schedule, config.warmup_steps) == (0, 1, "constant", 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "step"}, r"optimizer\.schedule='step'"),
        ({"learning_rate": -1e-3}, r"optimizer\.learning_rate=-0\.001"),
        ({"warmup_steps": -1}, r"optimizer\.warmup_steps=-1"),
        ({"weight_decay": -0.1}, r"optimizer\.weight_decay=-0\.1"),
        ({"max_grad_norm": 0.0}, r"optimizer\.max_grad_norm=0\.0"),
        ({"max_grad_norm": math.nan}, r"optimizer\.max_grad_norm=nan must be positive, or None"),
        ({"learning_rate": math.inf}, r"optimizer\.learning_rate=inf"),
        ({"b1": -0.1}, r"optimizer\.b1=-0\.1 must be at least 0 and below 1"),
        ({"b1": 1.0}, r"optimizer\.b1=1\.0"),
        ({"b2": 1.0}, r"optimizer\.b2=1\.0"),
        ({"b2": math.nan}, r"optimizer\.b2=nan"),
        ({"eps": 0.0}, r"optimizer\.eps=0\.0 must be positive"),
    ],
)
def test_impossible_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_warmup_that_leaves_nothing_to_fall_in_raises(shape):
    with pytest.raises(ValueError, match=rf"optimizer\.warmup_steps=10 leaves nothing of 10 .*schedule={shape} to"):
        make_schedule(OptimizerConfig(warmup_steps=10, schedule=shape), 10)


def test_a_constant_rate_may_rise_to_the_end_of_the_run():
    assert rates(2, warmup_steps=4) == pytest.approx([2 / 5, 4 / 5])
    assert rates(10, warmup_steps=10) == pytest.approx([2 * (i + 1) / 11 for i in range(10)])
