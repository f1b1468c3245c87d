"""Updates on meshes that split the time of rows: loss, gradient and metrics are those of one device."""

from __future__ import annotations

import contextlib
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.offline import make_offline_step
from jaxrl_llm.algorithms.policy_gradient.critic import Critic
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.presets import ppo
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.preference.objective import PreferenceBatch
from jaxrl_llm.algorithms.preference.presets import dpo
from jaxrl_llm.algorithms.score_models.reward_model import Comparisons, RewardModelObjective
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig, make_trust_region_step
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh

SGD = optax.sgd(1.0)
PADDED, PACKED = UpdateConfig(), UpdateConfig(tokens_per_micro_batch=23)
ALL = MeshConfig(data=2, fsdp=1, context=2, tensor=2)


@pytest.fixture(scope="module")
def case(tiny_config, lively_params, make_rollout) -> dict[str, Any]:
    """A step of GRPO with a reference, and what one device makes of it."""
    model = Transformer(tiny_config(num_layers=2, attention="blockwise", remat="full"))
    params, reference = lively_params(model), lively_params(model, seed=1)
    rewards = np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32)
    case = {"model": model, "params": params, "inputs": (make_rollout(seed=5), rewards, reference)}
    return case | {"expected": update(case, PADDED)}


def update(case: dict[str, Any], plan: UpdateConfig) -> tuple[Any, dict[str, float]]:
    """The gradient, being the change under SGD with rate 1, and the metrics."""
    step = jax.jit(make_update_step(case["model"], SGD, PolicyGradient(kl_coef=0.1), plan))
    state, metrics = step(make_train_state(case["params"], SGD, 0), *case["inputs"])
    change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), case["params"], state.params)
    return change, {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        (MeshConfig(fsdp=1, context=8), PACKED),
        (MeshConfig(fsdp=2, context=4), PACKED),
        (ALL, PACKED),
        (MeshConfig(fsdp=2, context=4), PADDED),
        pytest.param(MeshConfig(fsdp=1, context=8), PADDED, marks=pytest.mark.slow),
        pytest.param(ALL, PADDED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_eight_devices_make_the_update_of_one(config, plan, case):
    with jax.set_mesh(make_mesh(config)):
        change, metrics = update(case, plan)
    expected, others = case["expected"]
    assert optax.tree.norm(expected) > 1e-2
    chex.assert_trees_all_close(change, expected, rtol=0, atol=1e-5)
    assert metrics == pytest.approx(others, rel=1e-4, abs=1e-5)


def step_of(kind: str, case: dict[str, Any], plan: UpdateConfig, lively_params: Any) -> tuple[Any, dict[str, float]]:
    """The change of an objective's step, and its metrics."""
    model, params, (rollout, rewards, reference) = case["model"], case["params"], case["inputs"]
    scores, pieces = ScoreModel(model), plan.of_minibatch
    state, given = make_train_state(params, SGD, 0), (rollout, rewards)
    pairs = rollout.prompt, rollout.prompt_lengths, rollout.completion[:, :2], np.asarray(rollout.mask)[:, :2]
    match kind:
        case "critic":
            critic, algorithm = Critic(scores, SGD), ppo()
            step = make_update_step(model, SGD, algorithm, plan, critic=critic)
            start = {"algorithm": algorithm, "critic": critic, "critic_params": lively_params(scores, seed=3)}
            state, given = make_train_state(params, SGD, 0, **start), case["inputs"]
        case "trust region":
            region = TrustRegionConfig(cg_iterations=3, max_kl=1e-3)
            step = make_trust_region_step(model, PolicyGradient(), region, plan=pieces)
            state = make_train_state(params, optax.identity(), 0)
        case "pairs":
            step, given = make_offline_step(model, SGD, dpo(), pieces), (PreferenceBatch(*pairs), reference)
        case _:
            step, given = make_offline_step(scores, SGD, RewardModelObjective(), pieces), (Comparisons(*pairs),)
            state = make_train_state(lively_params(scores, seed=3), SGD, 0)
    after, metrics = jax.jit(step)(state, *given)
    both = [(s.params, s.critic and s.critic.params) for s in (state, after)]
    change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), *both)
    return change, {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}


@pytest.mark.parametrize(
    "kind",
    [
        "pairs",
        "answers",
        pytest.param("critic", marks=pytest.mark.slow),
        pytest.param("trust region", marks=pytest.mark.slow),
    ],
)
def test_other_objectives_where_time_is_split(kind, case, lively_params):
    made = []
    for plan, config in ((PADDED, None), (PACKED, MeshConfig(fsdp=2, context=4))):
        with contextlib.nullcontext() if config is None else jax.set_mesh(make_mesh(config)):
            made.append(step_of(kind, case, plan, lively_params))
    (expected, others), (change, metrics) = made
    assert optax.tree.norm(expected) > 1e-3
    chex.assert_trees_all_close(change, expected, rtol=0, atol=1e-5)
    assert metrics == pytest.approx(others, rel=1e-4, abs=1e-5)
