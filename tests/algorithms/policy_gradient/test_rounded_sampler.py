"""A sampler with rounded weights: the learner's update weighs its tokens by what the two make of them."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.policy_gradient.objective import Correction
from jaxrl_llm.algorithms.policy_gradient.presets import grpo
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh

SGD = optax.sgd(1.0)
W_MAX = 1.02


@pytest.mark.parametrize("dtype", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_an_update_is_that_of_truncated_weights(dtype, tiny_config, lively_params, repeated_logprobs):
    """w = min(exp(log π − log μ), w_max) of each token, with μ the rounded model's; a token adds w·A·∇log π."""
    model = Transformer(tiny_config(embed_dim=64, mlp_dim=64, num_layers=1, head_dim=8))
    params, mesh = lively_params(model), make_mesh(MeshConfig(), jax.devices()[:1])
    config = SamplingConfig(max_tokens=6, weights_dtype=dtype)
    prompt, lengths = np.random.default_rng(0).integers(0, 64, (4, 5)), np.array([1, 5, 3, 4])
    key = np.asarray(jax.random.key_data(jax.random.key(1)))
    sampler = Sampler(model, config, group=4, stop_tokens=(1, 2), mesh=mesh)
    rollout = jax.device_get(sampler(params, prompt, lengths, key, 0))
    rewards = np.random.default_rng(5).normal(size=(4, 4)).astype(np.float32)
    algorithm = dataclasses.replace(grpo(), kl_coef=0.0, correction=Correction("tis", w_max=W_MAX))

    state, metrics = jax.jit(make_update_step(model, SGD, algorithm, UpdateConfig()))(
        make_train_state(params, SGD, 0), rollout, rewards
    )
    change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, state.params)
    mask = np.asarray(rollout.mask)
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    advantages = (advantages / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4))[..., None]
    ratios = np.exp(repeated_logprobs(model, params, rollout)[0] - rollout.sampler_logprobs)
    weights = np.minimum(ratios, W_MAX)

    def loss(params):
        losses = -weights * advantages * repeated_logprobs(model, params, rollout)[0]
        return jnp.mean(jnp.sum(losses, axis=-1, where=mask) / mask.sum(axis=-1))

    expected = jax.jit(jax.grad(loss))(params)
    chex.assert_trees_all_close(change, expected, atol=2e-5)
    gap = np.abs(np.log(ratios))[mask]
    assert gap.mean() > 1e-3 and (ratios[mask] > W_MAX).any() and (ratios[mask] < W_MAX).any()
    assert float(metrics["sampling/logp_gap_mean"]) == pytest.approx(gap.mean(), rel=1e-3)
    assert float(metrics["correction/weight_mean"]) == pytest.approx(weights[mask].mean(), rel=1e-4)
