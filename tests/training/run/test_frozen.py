"""Checkpoints of runs with adapters: the base is not in them, is known again, and a run goes on exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models.config import LoraConfig, Params
from jaxrl_llm.models.lora import add_adapters, without_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh, parameter_shardings
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.on_policy import Trainer
from jaxrl_llm.training.run.checkpoint import Checkpointer
from jaxrl_llm.training.run.frozen import fingerprint, join_state, split_state
from jaxrl_llm.training.run.metrics import comparable_metrics
from jaxrl_llm.types import CriticState

ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def adapted(tiny_config, lively_params) -> tuple[Transformer, Params]:
    model = Transformer(tiny_config(lora=LoraConfig(rank=2)))
    return model, lively_params(model)


def same_arrays(one: Any, other: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: a is b, one, other))


def test_what_is_left_out_is_put_back(adapted, lively_params) -> None:
    model, params = adapted
    state = make_train_state(params, optax.adam(1e-3), 0)
    trained, frozen = split_state(state)
    assert same_arrays(frozen, {"params": without_adapters(params)})
    assert same_arrays(join_state(trained, frozen), state)
    full = make_train_state(lively_params(model.base), optax.adam(1e-3), 0)
    trained, frozen = split_state(full)
    assert frozen == {}
    assert same_arrays(trained, full)
    state = state.replace(critic=CriticState({**params, "score_head": {"weight": jnp.ones(3)}}, ()))
    trained, frozen = split_state(state)
    assert sorted(frozen) == ["critic", "params"]
    assert trained.critic is not None
    assert sorted(trained.critic.params) == ["layers", "score_head"]
    assert same_arrays(join_state(trained, frozen), state)


def test_a_fingerprint_tells_every_bit_and_place(adapted) -> None:
    _, params = adapted
    base = without_adapters(params)
    known = fingerprint(base)
    assert fingerprint(jax.tree.map(jnp.array, base)) == known
    assert fingerprint({}) is None
    weight = np.asarray(base["layers"]["mlp"]["up"]["weight"])
    flipped, moved, rounded = weight.copy(), weight.copy(), weight.astype(jnp.bfloat16)
    flipped.view(np.uint32)[1, 2, 3] ^= 1
    moved[0], moved[1] = weight[1], weight[0]
    seen = {known}
    for other in (flipped, moved, rounded, -weight):
        mlp = {**base["layers"]["mlp"], "up": {"weight": jnp.asarray(other)}}
        seen.add(fingerprint({**base, "layers": {**base["layers"], "mlp": mlp}}))
    assert len(seen) == 5


def test_a_fingerprint_does_not_depend_on_the_mesh(adapted, mesh_config) -> None:
    model, params = adapted
    mesh = make_mesh(mesh_config)
    placed = jax.device_put(params, parameter_shardings(mesh, model.logical_axes(), model.abstract_params()))
    assert fingerprint(without_adapters(placed)) == fingerprint(without_adapters(params))


# ---- Whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def make(tiny: ModuleType, tmp_path: Path):
    """Makes a trainer of adapters, with a reference, on a base from a seed."""

    def make(
        folder: str, *, steps: int, base_seed: int = 0, resume: bool = False, tuned: bool = False, whole: bool = False
    ) -> Trainer:
        config = dataclasses.replace(
            tiny.CONFIG,
            run_dir=str(tmp_path / folder),
            resume=resume,
            algorithm=PolicyGradient(kl_coef=0.1),
            update=UpdateConfig(),
            evaluation=EvaluationConfig(),
            training=dataclasses.replace(tiny.CONFIG.training, steps=steps),
        )
        policy = tiny.make_policy(ONE_DEVICE)
        model = Transformer(dataclasses.replace(policy.model.config, lora=LoraConfig(rank=2)))
        base = jax.jit(model.base.init)(jax.random.key(0 if tuned else base_seed))
        params = base if whole else add_adapters(base, model, jax.random.key(1))
        model = model.base if whole else model
        if tuned:  # its adapters are then the reference's, too
            params = jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf + 0.01 * (1 + base_seed) if path[-1].key == "lora_b" else leaf, params
            )
        policy = dataclasses.replace(policy, model=model, params=params)
        return tiny.make_trainer(config, policy, ONE_DEVICE, train_rows=tiny.TRAIN_ROWS)

    return make


def test_a_run_goes_on_from_a_checkpoint_without_the_base(make) -> None:
    whole = make("whole", steps=4)
    assert whole.reference is None
    base = jax.device_get(without_adapters(whole.state.params))
    whole.run()
    chex.assert_trees_all_equal(without_adapters(whole.state.params), base)
    make("run", steps=2).run()
    resumed = make("run", steps=4, resume=True)
    resumed.run()
    chex.assert_trees_all_equal(resumed.state, whole.state)
    read = [comparable_metrics(trainer.setup.folder / "metrics.jsonl") for trainer in (resumed, whole)]
    assert read[0] == read[1]
    with Checkpointer(resumed.setup.folder / "checkpoints", read_only=True) as checkpoints:
        saved, _ = checkpoints.restore(split_state(resumed.abstract_state)[0])
    assert sorted(saved.params) == ["layers"]
    with pytest.raises(
        ValueError, match=r"cannot go on from step 4: the model that the run began with, .* is another one"
    ):
        make("run", steps=6, base_seed=5, resume=True)


@pytest.mark.parametrize("kind", ["tuned", "whole"])
def test_a_run_does_not_go_on_with_another_reference(make, kind: str) -> None:
    """Adapters that it began with, or a whole model: neither is in its checkpoints."""
    make("run", steps=1, **{kind: True}).run()
    with pytest.raises(ValueError, match=r"cannot go on from step 1: the model that the run began with, its reference"):
        make("run", steps=2, base_seed=1, resume=True, **{kind: True})
    assert make("run", steps=2, resume=True, **{kind: True}).run().step == 2
