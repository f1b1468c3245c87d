"""The gradient of an embedding as it is added up on TPUs, against JAX's own."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import lookup
from jaxrl_llm.sharding import MeshConfig, make_mesh

VOCABULARY, WIDTH = 24, 8


@pytest.fixture(autouse=True)
def _on_tpu(monkeypatch):
    monkeypatch.setattr(lookup, "platform", lambda: "tpu")
    monkeypatch.setattr(lookup, "_SORTED", 16)


def _case(*shape):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    tokens = rng.integers(-2, VOCABULARY + 2, size=shape).astype(np.int32)  # some beyond the table
    return table, tokens, rng.normal(size=(*shape, WIDTH)).astype(np.float32)


def _plain(table, tokens):
    return jnp.take(table, tokens, axis=0, mode="clip")


def _gradient(look_up, table, tokens, weights):
    return jax.jit(jax.grad(lambda table: jnp.sum(look_up(table, tokens) * weights)))(table)


@pytest.mark.parametrize("shape", [(1, 5), (4, 16), (6, 7), (2, 3, 8), (3, 40)])
@pytest.mark.parametrize("axes", [None, {}, {"fsdp": 2, "data": 2, "tensor": 2}, {"fsdp": 4, "context": 2}])
def test_its_gradient_is_that_of_indexing(shape, axes):
    table, tokens, weights = _case(*shape)
    with contextlib.nullcontext() if axes is None else jax.set_mesh(make_mesh(MeshConfig(**axes))):
        np.testing.assert_array_equal(lookup.look_up(table, tokens), _plain(table, tokens))
        found = _gradient(lookup.look_up, table, tokens, weights)
    np.testing.assert_allclose(found, _gradient(_plain, table, tokens, weights), rtol=1e-6, atol=1e-6)


def test_it_can_be_differentiated_twice():
    table, tokens, weights = _case(4, 16)

    def bent(look_up):
        def value(table):
            return jnp.sum(jnp.sin(look_up(table, tokens)) * weights)

        return jax.jit(jax.grad(lambda table: jnp.sum(jnp.square(jax.grad(value)(table)))))(table)

    np.testing.assert_allclose(bent(lookup.look_up), bent(_plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "length", "rounds"), [(1, 5, 1), (4, 16, 4), (6, 7, 2), (4, 4, 1), (8, 4, 2)])
def test_so_many_tokens_are_sorted_at_a_time(rows, length, rounds):
    assert lookup._rounds(rows, length) == rounds
