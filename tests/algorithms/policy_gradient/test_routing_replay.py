"""Routing replay: the learner's experts are the sampler's, token by token, however near the router is to a tie."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.policy_gradient.objective import Correction, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.router import RouterLosses
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.launch.settings import check_step
from jaxrl_llm.models.config import ExpertsConfig, LayerKind, Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.types import Rollout

SGD = optax.sgd(1e-2)
PROMPTS = np.random.default_rng(0).integers(0, 64, (4, 5)), np.array([1, 5, 3, 4])
REWARDS = np.random.default_rng(5).normal(size=(4, 4)).astype(np.float32)
ALGORITHM = PolicyGradient(correction=Correction(w_max=100.0))


@pytest.fixture(scope="module")
def model(tiny_config) -> Transformer:
    kinds = (LayerKind(experts=True), LayerKind(experts=True), LayerKind())
    experts = ExpertsConfig(count=16, per_token=3, width=8)
    return Transformer(dataclasses.replace(tiny_config(num_layers=3), layer_kinds=kinds, experts=experts))


@pytest.fixture(scope="module")
def params(model, lively_params) -> Params:
    return lively_params(model)


def sample(model: Transformer, params: Params, mesh: Mesh | None = None, **settings: Any) -> Rollout:
    sampler = Sampler(
        *(model, SamplingConfig(**{"max_tokens": 12, **settings})),
        group=4,
        stop_tokens=(1, 2),
        mesh=mesh or make_mesh(MeshConfig(), jax.devices()[:1]),
        keep_experts=True,
    )
    return sampler(params, *PROMPTS, np.asarray(jax.random.key_data(jax.random.key(1))), 0)


def update(model: Transformer, params: Params, rollout: Rollout, routing: Any, **settings: Any) -> dict[str, float]:
    algorithm = dataclasses.replace(ALGORITHM, routing=routing, router=settings.pop("router", None))
    step = jax.jit(make_update_step(model, SGD, algorithm, UpdateConfig(**settings)))
    _, metrics = step(make_train_state(params, SGD, 0), rollout, REWARDS)
    return {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def rollout(model, params) -> Rollout:
    return sample(model, params)


@pytest.mark.parametrize("settings", [{"slots": 3, "scan_layers": True}, {"speculate": "prompt"}], ids=str)
def test_every_loop_writes_down_the_same(model, params, rollout, settings):
    """Completions that march together, that take turns in slots, and that are speculated."""
    other = sample(model, params, **settings)
    np.testing.assert_array_equal(other.completion, rollout.completion)
    np.testing.assert_array_equal(np.sort(other.experts), np.sort(rollout.experts))
    real = np.arange(5) < PROMPTS[1][:, None]
    for ours in (rollout, other):
        known = np.arange(12) < ours.completion_lengths[..., None] - 1
        assert (ours.experts[..., :2, :] >= 0).all(axis=(-1, -2)).tolist() == known.tolist()
        assert (ours.experts[..., 2, :] == -1).all() and (ours.prompt_experts[..., 2, :] == -1).all()
        assert (ours.prompt_experts[..., :2, :] >= 0)[real].all()
    np.testing.assert_array_equal(np.sort(other.prompt_experts)[real], np.sort(rollout.prompt_experts)[real])


def with_near_ties(params: Params) -> Params:
    """Half of the experts have the router's rows of the others but for the last bit."""

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-2].key != "router":
            return leaf
        half = np.asarray(leaf)[:, ::2]
        return jax.numpy.asarray(np.stack([half, half * np.float32(1 + 1e-7)], axis=2).reshape(leaf.shape))

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize(
    ("dtype", "plan"), [("float32", {"epochs": 2, "tokens_per_micro_batch": 40}), ("bfloat16", {})], ids=str
)
def test_the_ratio_is_1_with_it_and_not_without(model, params, dtype, plan):
    """Of a router that rounding decides, so that sampler and learner choose otherwise for many tokens."""
    model, params = Transformer(dataclasses.replace(model.config, dtype=dtype)), with_near_ties(params)
    rollout = sample(model, params, slots=4)
    compared, replayed = (update(model, params, rollout, routing, **plan) for routing in ("compared", "replayed"))
    assert compared["sampling/routing_mismatch"] > 0.02 and replayed["sampling/routing_mismatch"] > 0.02
    assert compared["sampling/logp_gap_max"] > 0.1
    if dtype == "float32":
        assert replayed["sampling/logp_gap_max"] < 1e-4
        assert replayed["correction/weight_mean"] == pytest.approx(1, abs=1e-5)
    assert replayed["sampling/logp_gap_mean"] < 0.5 * compared["sampling/logp_gap_mean"]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 2, "tensor": 2}, {"expert": 4, "fsdp": 2}], ids=str)
def test_eight_devices_sample_and_learn_what_one_does(model, params, rollout, sizes):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, model.shardings(mesh))
        ours = sample(model, placed, mesh, slots=2)
        np.testing.assert_array_equal(ours.completion, rollout.completion)
        np.testing.assert_array_equal(np.sort(ours.experts), np.sort(rollout.experts))
        parts = [x.sharding.shard_shape(x.shape)[0] for x in (ours.experts, ours.prompt_experts, ours.completion)]
        own = 1 if "data" in sizes else 4  # 8 row shards do not divide 4 prompts
        assert parts == [own, own, 4]
        made = update(model, placed, ours, "replayed", router=RouterLosses(0.1, 0.1), tokens_per_micro_batch=40)
    one = update(model, params, rollout, "replayed", router=RouterLosses(0.1, 0.1))
    assert made["sampling/logp_gap_max"] < 1e-4
    for name in ("reward", "grad_norm", "router/z_loss", "router/entropy", "entropy"):
        assert made[name] == pytest.approx(one[name], rel=2e-2 if name == "grad_norm" else 1e-4), name


def test_router_losses_reach_the_gradient_and_their_metrics_are_told(model, params, rollout):
    plain = update(model, params, rollout, "own", router=RouterLosses())
    balanced = update(model, params, rollout, "own", router=RouterLosses(1.0, 0.1), tokens_per_micro_batch=400)
    told = {name: value for name, value in balanced.items() if name.startswith("router/")}
    assert told == pytest.approx({name: plain[name] for name in told}, rel=1e-4)
    assert balanced["loss"] == pytest.approx(
        plain["loss"] + told["router/balance_loss"] + 0.1 * told["router/z_loss"], rel=1e-4
    )
    assert balanced["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


def test_what_lacks_experts_is_refused(tiny_config, model, params, rollout):
    dense = Transformer(tiny_config())
    with pytest.raises(ValueError, match="no layer of the model has experts"):
        make_update_step(dense, SGD, PolicyGradient(router=RouterLosses(1.0)))
    with pytest.raises(ValueError, match="has them not"):
        update(model, params, rollout.replace(experts=None), "replayed")


def test_settings_are_taken_before_the_model_is_known(tiny):
    check_step(dataclasses.replace(tiny.CONFIG, algorithm=PolicyGradient(routing="replayed", router=RouterLosses(1.0))))
