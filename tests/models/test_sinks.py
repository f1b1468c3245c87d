"""Sinks beside the scores of attention: every way to compute it, its gradients and their gradients."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.attention import SharedPrompt, Visibility, dense_attention, dense_shared_attention
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.kernels.blockwise import blockwise_attention
from jaxrl_llm.models.kernels.sharded import over_mesh
from jaxrl_llm.models.kernels.splash import splash_attention
from jaxrl_llm.models.operands import clamped_swiglu
from jaxrl_llm.sharding import MeshConfig, make_mesh
from tests.models.trees import lay_out, visibility

LENGTH, WINDOW = 32, 9
ROWS = visibility(lay_out([(8, [(12, []), (12, [])])], LENGTH), lay_out([(8, [(12, []), (12, [])])], LENGTH))
SINKS = jnp.array([-1.0, 0.5, 2.0, 6.0])

WAYS: dict[str, Any] = {
    "dense": dense_attention,
    "shared": functools.partial(dense_shared_attention, shared=SharedPrompt(8, 2, 12)),
    "blockwise": functools.partial(blockwise_attention, block_size=8),
    "splash": functools.partial(splash_attention, interpret=True),
}


def normal(seed: int, heads: int, rows: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, LENGTH, heads, 16)), jnp.float32)


GIVEN = (normal(0, 4), normal(1, 2), normal(2, 2), SINKS)
WANTED = normal(3, 4)


def by_hand(query: Any, key: Any, value: Any, sinks: Any, visible: Visibility) -> jax.Array:
    """Softmax over the keys alone, and of that the share σ(log Σ exp s − sink)."""
    key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
    scores = jnp.einsum("bqnh,bknh->bnqk", query, key) / 4
    scores = jnp.where(visible.mask(WINDOW)[:, None], scores, -jnp.inf)
    share = jax.nn.sigmoid(jax.nn.logsumexp(scores, axis=-1) - sinks[:, None])
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores) * share[..., None], value)


def slopes(attention: Any, given: Any, visible: Visibility) -> Any:
    """The output, its gradients, and those of a number that these make."""

    def loss(given: Any) -> tuple[jax.Array, jax.Array]:
        mixed = attention(*given, visible)
        return jnp.sum(mixed * WANTED), mixed

    def of_slopes(given: Any) -> jax.Array:
        found = jax.grad(loss, has_aux=True)(given)[0]
        return jnp.sum(jnp.stack([jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(found)]))

    return jax.jit(lambda given: (*jax.grad(loss, has_aux=True)(given), jax.grad(of_slopes)(given)))(given)


@pytest.mark.parametrize("way", WAYS)
def test_a_sink_takes_its_share(way):
    def attention(query: Any, key: Any, value: Any, sinks: Any, visible: Visibility) -> jax.Array:
        return WAYS[way](query, key, value, visible, sinks=sinks, window=WINDOW)

    expected = slopes(by_hand, GIVEN, ROWS)
    chex.assert_trees_all_close(slopes(attention, GIVEN, ROWS), expected, atol=5e-5, rtol=1e-5)
    assert jnp.min(jnp.abs(expected[0][3])) > 1e-2


def test_sinks_are_dealt_with_their_heads():
    """Rows, time and heads split at once: a sink's gradient is the sum over the first two."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2))
    whole, split = (
        jax.jit(jax.grad(lambda given, way=way: jnp.sum(way(*given[:3], ROWS, sinks=given[3]) * WANTED)))
        for way in (dense_attention, functools.partial(over_mesh, blockwise_attention))
    )
    with jax.set_mesh(mesh):
        found = split(GIVEN)
    chex.assert_trees_all_close(found, whole(GIVEN), atol=2e-5)


def test_clamped_gates_by_hand():
    gate, up = jnp.array([1.0, 9.0, -9.0]), jnp.array([-9.0, 0.5, 9.0])
    expected = [(g * (u + 1)) / (1 + np.exp(-1.702 * g)) for g, u in ((1.0, -7.0), (7.0, 0.5), (-9.0, 7.0))]
    np.testing.assert_allclose(clamped_swiglu(gate, up), expected, rtol=1e-5)


def test_sinks_do_not_go_with_batch_invariance():
    with pytest.raises(ValueError, match="batch_invariant=True with attention_sinks"):
        ModelConfig(32, 16, 32, 1, 2, 2, 8, attention_sinks=True, batch_invariant=True)
