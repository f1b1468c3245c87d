"""On-policy to the bit: sampler and learner give a token the same log-prob, in whatever batch each of them has it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.policy_gradient.objective import Correction, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models import batch_invariant
from jaxrl_llm.models.config import LayerKind, LoraConfig, Params, RopeConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling import flight
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.types import Rollout

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {
        "dtype": "bfloat16",
        "param_dtype": "bfloat16",
        "scale_embeddings": True,
        "norm_offset": 1.0,
        "query_scalar": 7.0,
    },
    "kinds": {
        "tie_embeddings": False,
        "vocab_size": 61,
        "num_layers": 3,
        "attention_softcap": 1.5,
        "logit_softcap": 5.0,
        "known_tokens": 60,
        "layer_kinds": (
            LayerKind(window=9),
            LayerKind(rope=None, norms="sandwich"),
            LayerKind(rope=RopeConfig(1e6, partial=0.5)),
        ),
    },
    "bias_norms_unscanned": {
        "scan_layers": False,
        "qk_norm": True,
        "qk_norm_over_heads": True,
        "attention_bias": True,
        "mlp_bias": True,
        "num_kv_heads": 2,
        "head_dim": 6,
    },
}
OTHERS = ("plain", "kinds", "bias_norms_unscanned")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts have several blocks of keys and pages."""
    monkeypatch.setattr(batch_invariant, "block_keys", lambda: 16)
    monkeypatch.setattr(flight, "page_tokens", lambda: 8)


@pytest.fixture(scope="module")
def long_prompts() -> tuple[np.ndarray, np.ndarray]:
    """Six prompts of 1 to 19 tokens."""
    tokens = np.random.default_rng(3).integers(10, 60, (6, 19)).astype(np.int32)
    return tokens, np.array([3, 16, 1, 19, 8, 9], np.int32)


@pytest.fixture
def model(tiny_config) -> Transformer:
    return Transformer(tiny_config(batch_invariant=True, remat="full"))


@pytest.fixture
def params(model, lively_params) -> Params:
    return lively_params(model)


def sampler(model: Transformer, mesh: Mesh, *, group: int = 3, keep_mask: bool = False, **settings: Any) -> Sampler:
    config = SamplingConfig(**{"max_tokens": 40, **settings})
    return Sampler(model, config, group=group, stop_tokens=(3, 9), mesh=mesh, keep_mask=keep_mask)


def learned(model: Transformer, params: Params, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
    """The learner's log-probs, 0 at padding."""
    scores = jax.jit(lambda params, rollout: Scorer(model, temperature)(params, rollout).logprobs)(params, rollout)
    return np.where(rollout.mask, scores, 0)


def apart(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


@pytest.mark.parametrize("name", ["bfloat16", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_sampler_and_learner_say_the_same_number(name, tiny_config, lively_params, one_device, long_prompts, key):
    """Seven slots decode what the learner reads in rows of a prompt with its completions."""
    model = Transformer(tiny_config(batch_invariant=True, remat="full", **ARCHITECTURES[name]))
    params = lively_params(model)
    rollout = sampler(model, one_device, slots=7, temperature=0.8)(params, *long_prompts, key, 0)
    assert 0.2 < np.mean(rollout.mask) < 1
    assert (np.asarray(rollout.completion_lengths) > 30).any()
    assert apart(learned(model, params, rollout, 0.8), rollout.sampler_logprobs) == 0
    assert apart(learned(model, params, rollout), rollout.logprobs) == 0
    plain = learned(model.plain, params, rollout)
    assert 0 < apart(plain, rollout.logprobs) < (0.3 if name == "bfloat16" else 1e-4)


def test_without_it_they_differ_in_the_last_digits(tiny_config, lively_params, one_device, long_prompts, key):
    model = Transformer(tiny_config())
    params = lively_params(model)
    rollout = sampler(model, one_device, slots=7)(params, *long_prompts, key, 0)
    assert 0 < apart(learned(model, params, rollout), rollout.logprobs) < 1e-5


@pytest.mark.slow
def test_the_batch_changes_nothing(model, params, one_device, long_prompts, key, assert_same):
    """Slots, loops over layers, the other prompts, devices: tokens and log-probs to the bit; and so the learner's."""
    expected = sampler(model, one_device)(params, *long_prompts, key, 2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    placed = jax.device_put(params, model.shardings(mesh))
    assert_same(
        sampler(model, one_device, slots=5, speculate="prompt")(params, *long_prompts, key, 2), expected, atol=0
    )
    twice = [np.concatenate([x, x[:2]]) for x in long_prompts]
    on_mesh = sampler(model, mesh, slots=2)(placed, *twice, key, 2)
    assert_same(
        on_mesh.replace(**{name: x[:6] for name, x in vars(on_mesh).items() if x is not None}), expected, atol=0
    )
    few = sampler(model, one_device, slots=1, scan_layers=True)(params, *(x[:2] for x in long_prompts), key, 2)
    np.testing.assert_array_equal(few.logprobs, expected.logprobs[:2])
    for prompts in ([4], [5, 0, 3]):
        part = jax.tree.map(lambda x, prompts=prompts: np.asarray(x)[prompts], expected)
        np.testing.assert_array_equal(learned(model, params, part), part.logprobs)
    with jax.set_mesh(mesh):  # devices fill up where they do not divide the rows
        ours = learned(model, placed, jax.device_get(expected))
    np.testing.assert_array_equal(ours, expected.logprobs)


PLANS: dict[str, dict[str, int]] = {
    "whole": {},
    "two epochs in pieces": {"epochs": 2, "micro_batches": 3},
    "packed": {"tokens_per_micro_batch": 71, "epochs": 2},
}


@pytest.mark.parametrize(
    ("plan", "truncation"),
    [
        pytest.param("whole", {}, marks=pytest.mark.slow),
        ("packed", {"top_k": 5, "top_p": 0.9}),
        pytest.param("packed", {}, marks=pytest.mark.slow),
        pytest.param("two epochs in pieces", {"top_k": 5, "top_p": 0.9}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_first_update_is_on_policy(plan, truncation, model, params, one_device, long_prompts, key):
    """No gap, and importance weights of 1, exactly; the gradient is that of the usual model to within rounding."""
    keeps_mask, temperature = bool(truncation), 0.8
    settings = {"temperature": temperature, "keep_mask": keeps_mask, "speculate": "prompt" if keeps_mask else "off"}
    ours = sampler(model, one_device, slots=4, **settings, **truncation)
    rollout = ours(params, *long_prompts, key, 0)
    rewards = np.random.default_rng(5).normal(size=(6, 3)).astype(np.float32)
    algorithm = PolicyGradient(correction=Correction(w_max=100.0), keep_sampling_mask=keeps_mask)

    def update(model: Transformer) -> tuple[Params, dict[str, jax.Array]]:
        settings = {"temperature": temperature, "truncated": keeps_mask}
        step = make_update_step(model, optax.sgd(1.0), algorithm, UpdateConfig(**PLANS[plan]), **settings)
        state, metrics = jax.jit(step)(make_train_state(params, optax.sgd(1.0), 0), rollout, rewards)
        return state.params, metrics

    moved, metrics = update(model)
    assert metrics["sampling/logp_gap_max"] == 0
    assert metrics["correction/weight_mean"] == 1
    if "epochs" not in PLANS[plan]:
        assert metrics["ratio/max"] == metrics["ratio/mean"] == 1
        assert metrics["clip_ratio/region_mean"] == 0
    expected, others = update(model.plain)
    assert others["sampling/logp_gap_max"] > 0
    chex.assert_trees_all_close(moved, expected, rtol=0, atol=2e-5)
    assert apart(moved["embed"]["weight"], params["embed"]["weight"]) > 1e-3


def test_what_cannot_be_the_same_is_refused(tiny_config, one_device):
    config = tiny_config(batch_invariant=True, remat="full")
    for change in ({"lora": LoraConfig(rank=2)}, {"remat": "none"}, {"attention": "dense"}):
        with pytest.raises(ValueError, match="batch_invariant"):
            dataclasses.replace(config, **change)
    for axis in ("tensor", "context"):
        with pytest.raises(ValueError, match=rf"does not go with {axis}=2 .* set mesh\.{axis}=1"):
            Transformer(config).shardings(make_mesh(MeshConfig(**{axis: 2}), jax.devices()[:2]))
    ours = {"group": 1, "stop_tokens": (), "mesh": one_device}
    with pytest.raises(ValueError, match=r"sampling\.attention=auto"):
        Sampler(Transformer(config), SamplingConfig(attention="xla"), **ours)
    with pytest.raises(ValueError, match=r"sampling\.cache_dtype='int8'.* leave it out"):
        Sampler(Transformer(config), SamplingConfig(cache_dtype="int8"), **ours)
    with pytest.raises(ValueError, match="the learner's type, float32"):
        Sampler(Transformer(config), SamplingConfig(), dtype="bfloat16", **ours)


@pytest.mark.slow
def test_with_the_compiler_as_users_run_it():
    """These tests switch most of its optimisations off."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-m", "slow or not slow"]
    command += ["-k", "not as_users_run_it"]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
