"""The examples of docs/examples run, learn, and agree with each other: losses in code that knows nothing of ours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples"
NEEDS = {"plain_jax": "jax", "flax_nnx": "flax", "equinox_modules": "equinox"}
FAMILIES = ("policy_gradient", "advantages", "preference", "reward_model", "distillation")
ROWS, TIME, VOCABULARY = 8, 6, 16


@pytest.fixture(scope="module", params=sorted(NEEDS))
def example(request: pytest.FixtureRequest) -> ModuleType:
    pytest.importorskip(NEEDS[request.param])
    spec = importlib.util.spec_from_file_location(request.param, FOLDER / f"{request.param}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Equinox looks a class's module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    """What any of the functions reads, ragged, with NaN at the padding."""
    rng = np.random.default_rng(0)
    mask = np.arange(TIME) < rng.integers(2, TIME + 1, ROWS)[:, None]

    def padded(x: np.ndarray) -> jax.Array:
        return jnp.asarray(np.where(mask, x, np.nan), jnp.float32)

    logprobs = np.full((ROWS, TIME), -np.log(VOCABULARY)) + 0.1 * rng.normal(size=(ROWS, TIME))
    return {
        "tokens": jnp.asarray(rng.integers(0, VOCABULARY, (ROWS, TIME + 1))),
        "mask": jnp.asarray(mask),
        "rewards": jnp.asarray(rng.normal(size=(ROWS // 4, 4)), jnp.float32),
        "scores": jnp.asarray(rng.normal(size=ROWS), jnp.float32),
        "old_logprobs": padded(logprobs),
        "ref_logprobs": padded(logprobs + 0.1 * rng.normal(size=(ROWS, TIME))),
        "old_values": padded(0.1 * rng.normal(size=(ROWS, TIME))),
        "teacher_logits": jnp.asarray(rng.normal(size=(ROWS, TIME, VOCABULARY)), jnp.float32),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_lower_the_loss(example, batch, family):
    step, model = getattr(example, family), example.init(jax.random.key(0))
    losses = []
    for _ in range(30):
        model, metrics = step(model, batch)
        losses.append(float(metrics["loss"]))
        assert all(np.isfinite(value).all() for value in metrics.values())
    assert losses[-1] < losses[0] - 0.02


def test_the_functions_are_those_of_the_page(example):
    """`docs/generate_objectives.py` shows one function for each family."""
    public = [name for name in vars(example) if name in FAMILIES]
    assert public == list(FAMILIES)
