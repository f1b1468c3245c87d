"""An optimizer whose state lies in the host's memory makes the steps that it makes without."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.gradient import Loss, make_gradient_step
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.rounding import Rounding, optimizer_state
from jaxrl_llm.records import Metrics
from jaxrl_llm.sharding import HOST, make_mesh

CONFIG = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, max_grad_norm=0.5)
OPTIMIZER = make_optimizer(CONFIG, make_schedule(CONFIG, 10))
ROWS = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)


def loss(params: Any, rows: Any, normalizer: Any) -> tuple[jax.Array, Metrics]:
    hidden = jnp.tanh(rows @ params["layers"]["weight"].astype(jnp.float32).T + params["layers"]["bias"])
    return jnp.mean((hidden * params["norm"]["scale"]) ** 2) / normalizer, {}


def parameters(dtype: Any) -> Any:
    rng = np.random.default_rng(1)
    layers = {"weight": rng.normal(size=(24, 16)), "bias": rng.normal(size=24)}
    tree = {"layers": layers, "norm": {"scale": rng.normal(size=24)}}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


@pytest.mark.parametrize(
    ("dtype", "rounding", "micro_batches"),
    [("float32", "master", 1), ("bfloat16", "master", 2), ("bfloat16", "stochastic", 1)],
)
def test_steps_are_those_without(dtype: str, rounding: Rounding, micro_batches: int) -> None:
    """On a mesh, with a step that is skipped among them; what lies in the host's memory stays there, and is donated."""
    mesh = make_mesh()
    step = make_gradient_step(Loss(lambda params, texts: params, loss), OPTIMIZER, MicroBatches(micro_batches))
    params = parameters(dtype)
    start = (params, optimizer_state(params, OPTIMIZER, rounding, jax.random.key(3)))

    def three_steps(offload: bool) -> Any:
        def place(leaf: jax.Array, far: bool) -> NamedSharding:
            spec = PartitionSpec("fsdp") if leaf.ndim and leaf.shape[0] == 24 else PartitionSpec()
            return NamedSharding(mesh, spec, memory_kind=HOST if far and leaf.shape[:1] == (24,) else "device")

        places = jax.tree.map(lambda x: place(x, False), params), jax.tree.map(lambda x: place(x, offload), start[1])
        program = jax.jit(step, donate_argnums=0, out_shardings=(places, NamedSharding(mesh, PartitionSpec())))
        carry = jax.device_put(jax.tree.map(jnp.copy, start), places)
        with jax.set_mesh(mesh):
            for rows in (ROWS, ROWS * np.nan, 2 * ROWS):
                before = carry
                carry, metrics = program(carry, rows, np.float32(2.0))
                assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
                assert metrics["frac_steps_skipped"].value() == np.isnan(rows).any()
        kinds = [leaf.sharding.memory_kind for leaf in jax.tree.leaves(carry[1]) if leaf.shape[:1] == (24,)]
        assert len(kinds) == 6 + 3 * (rounding == "master" and dtype == "bfloat16")
        assert set(kinds) == {HOST if offload else "device"}
        return jax.device_get(carry)

    near, far = three_steps(False), three_steps(True)
    chex.assert_trees_all_close(far, near, rtol=1e-6, atol=1e-7)
    chex.assert_tree_all_finite(far)
    moved = jax.tree.map(lambda new, old: np.abs(np.float32(new) - np.float32(old)).max(), far[0], params)
    assert min(jax.tree.leaves(moved)) > 1e-3
