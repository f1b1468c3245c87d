"""Attention against a loop over queries, and the two-part softmax against one over the concatenated keys."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.attention import KeyValue, attend, attend_shared, causal_mask


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def loop(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray, softcap: float | None) -> np.ndarray:
    """softmax(q·k/√H)·v of one row, one query and head at a time, over the visible keys only."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    length, heads, head_dim = query.shape
    share = heads // key.shape[1]
    out = np.zeros(query.shape)
    for t, n in np.ndindex(length, heads):
        visible = np.flatnonzero(mask[t])
        scores = key[visible, n // share] @ query[t, n] / math.sqrt(head_dim)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[t, n] = weights @ value[visible, n // share] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_causal_mask(window):
    queries, keys = np.array([[3, 0, 7], [1, 2, 5]]), np.array([[0, 1, 2, 3, 9], [5, 4, 1, 0, 2]])
    mask = np.asarray(causal_mask(jnp.asarray(queries), jnp.asarray(keys), window))
    for row, i, j in np.ndindex(2, 3, 5):
        distance = queries[row, i] - keys[row, j]
        assert mask[row, i, j] == (distance >= 0 and (window is None or distance < window))


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attend_equals_a_loop(kv_heads, softcap):
    query, key, value = normal(0, 2, 4, 6, 8), normal(1, 2, 5, kv_heads, 8), normal(2, 2, 5, kv_heads, 8)
    mask = np.random.default_rng(3).random((2, 4, 5)) < 0.5
    mask[..., 0] |= ~mask.any(axis=-1)
    ours = jax.jit(
        lambda q: attend(q, KeyValue.of(jnp.asarray(key), jnp.asarray(value)), jnp.asarray(mask), softcap=softcap)
    )(query)
    for row in range(2):
        expected = loop(query[row], key[row], value[row], mask[row], softcap)
        np.testing.assert_allclose(ours[row], expected, atol=1e-5)


class Shared(NamedTuple):
    """P = 2 prompts of 5 and 2 tokens, G = 3, Tq = 4, Tp = 5, Tk = 4, N = 4, K = 2, H = 8; time before heads."""

    query: np.ndarray
    prompt: tuple[np.ndarray, np.ndarray]
    own: tuple[np.ndarray, np.ndarray]
    prompt_mask: np.ndarray
    own_mask: np.ndarray

    def attend(self, softcap: float | None = None) -> jax.Array:
        """The function under test."""
        prompt, own = (KeyValue.of(*map(jnp.asarray, x)) for x in (self.prompt, self.own))
        masks = jnp.asarray(self.prompt_mask), jnp.asarray(self.own_mask)
        return attend_shared(jnp.asarray(self.query), prompt, own, *masks, softcap=softcap)

    def expected(self, p: int, g: int, softcap: float | None = None) -> np.ndarray:
        """The loop over the concatenated keys of one completion."""
        key, value = (np.concatenate([a[p], b[p, g]]) for a, b in zip(self.prompt, self.own, strict=True))
        masks = (np.broadcast_to(m, (2, 3, *m.shape[2:]))[p, g] for m in (self.prompt_mask, self.own_mask))
        return loop(self.query[p, g], key, value, np.concatenate(list(masks), axis=1), softcap)


def make_shared(scale: float = 1.0) -> Shared:
    return Shared(
        normal(0, 2, 3, 4, 4, 8) * scale,
        (normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8)),
        (normal(3, 2, 3, 4, 2, 8), normal(4, 2, 3, 4, 2, 8)),
        np.broadcast_to((np.arange(5) < np.array([[5], [2]]))[:, None, None], (2, 1, 4, 5)),
        np.tril(np.ones((4, 4), bool))[None, None],
    )


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_shared_equals_a_loop_over_concatenated_keys(scale, softcap):
    """With scores in the hundreds, too: nothing may overflow, whichever part holds the largest."""
    given = make_shared(scale)
    ours = jax.jit(lambda: given.attend(softcap))()
    assert ours.shape == given.query.shape
    for p, g in np.ndindex(2, 3):
        np.testing.assert_allclose(ours[p, g], given.expected(p, g, softcap), atol=1e-4)


def test_shared_masks_may_differ_between_samples():
    rng = np.random.default_rng(5)
    own_mask = (rng.random((2, 3, 4, 4)) < 0.5) | np.eye(4, dtype=bool)
    given = make_shared()._replace(prompt_mask=rng.random((2, 3, 4, 5)) < 0.5, own_mask=own_mask)
    ours = jax.jit(given.attend)()
    for p, g in np.ndindex(2, 3):
        np.testing.assert_allclose(ours[p, g], given.expected(p, g), atol=1e-5)


def test_gradients_of_shared_equal_those_of_one_softmax():
    given = make_shared(3.0)
    weights = normal(7, *given.query.shape)
    inputs = (given.query, given.prompt, given.own)

    def two_parts(*inputs: Any) -> jax.Array:
        query, prompt, own = inputs
        return jnp.sum(weights * given._replace(query=query, prompt=prompt, own=own).attend())

    def one_part(*inputs: Any) -> jax.Array:
        query, prompt, own = inputs
        joined = [
            jnp.concatenate([jnp.repeat(a, 3, axis=0), b.reshape(6, *b.shape[2:])], axis=1)
            for a, b in zip(prompt, own, strict=True)
        ]
        masks = (np.repeat(given.prompt_mask[:, 0], 3, axis=0), np.broadcast_to(given.own_mask[0], (6, 4, 4)))
        mask = jnp.asarray(np.concatenate(masks, axis=2))
        return jnp.sum(
            weights.reshape(6, 4, 4, 8) * attend(query.reshape(6, 4, 4, 8), KeyValue.of(*joined), mask, softcap=None)
        )

    ours, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*inputs) for f in (two_parts, one_part))
    chex.assert_trees_all_close(ours, expected, rtol=1e-7, atol=2e-5)


def test_a_query_without_any_key_is_finite():
    given = make_shared()
    given = given._replace(prompt_mask=given.prompt_mask & False, own_mask=given.own_mask & False)

    def total(query: jax.Array, prompt: Any, own: Any) -> jax.Array:
        shared = given._replace(query=query, prompt=prompt, own=own).attend()
        plain = attend(query[:, 0], KeyValue.of(*prompt), jnp.asarray(given.prompt_mask[:, 0]), softcap=None)
        return jnp.sum(shared**2) + jnp.sum(plain**2)

    differentiated = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    value, gradient = differentiated(given.query, given.prompt, given.own)
    chex.assert_tree_all_finite((value, gradient))


def test_what_is_masked_does_not_matter():
    given = make_shared()
    is_padding = (np.arange(5) >= np.array([[5], [2]]))[..., None, None]
    key, value = (np.where(is_padding, np.float32(1e4), x) for x in given.prompt)
    assert not np.array_equal(key, given.prompt[0])
    attended = jax.jit(lambda prompt: given._replace(prompt=prompt).attend())
    np.testing.assert_array_equal(attended(given.prompt), attended((key, value)))


def test_softmax_is_float32_for_bfloat16_inputs():
    """A thousand equal keys: weights summed in bfloat16 would be off by far more than one rounding."""

    @jax.jit
    def mix() -> tuple[jax.Array, jax.Array]:
        zeros = jnp.zeros((1, 1024, 1, 8), jnp.bfloat16)
        thousand, one = KeyValue.of(zeros, zeros + 3), KeyValue.of(zeros[None, :, :1], zeros[None, :, :1] + 3)
        query, mask = jnp.zeros((1, 1, 1, 1, 8), jnp.bfloat16), jnp.ones((1, 1, 1, 1024), bool)
        shared = attend_shared(query, thousand, one, mask, mask[..., :1], softcap=None)
        return attend(query[0], thousand, mask[0], softcap=None), shared

    for mixed in mix():
        assert mixed.dtype == jnp.bfloat16
        np.testing.assert_allclose(mixed.astype(np.float32), 3.0, rtol=0.01)
