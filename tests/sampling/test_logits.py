"""The distribution after temperature and filters against a loop, and the draws against the distribution."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.sampling.logits import Draw, SamplingConfig, block_size, draw, folded, truncate, uniforms

FILTERS: list[dict[str, Any]] = [
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.2},
]
MORE_FILTERS: list[dict[str, Any]] = [
    *FILTERS,
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.01},
    {"top_k": 6, "top_p": 0.7},
    {"top_p": 0.8, "min_p": 0.5},
]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def filtered(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """Probabilities `[V]`, token by token from the descriptions in the papers; float64."""
    p = softmax(logits.astype(np.float64) / config.temperature)
    if config.top_k is not None:
        kept = sorted(range(len(p)), key=lambda token: -p[token])[: config.top_k]
        p = np.where([token in kept for token in range(len(p))], p, 0)
        p = p / p.sum()
    if config.top_p < 1:
        mass, kept = 0.0, []
        for token in sorted(range(len(p)), key=lambda token: -p[token]):
            if mass < config.top_p:  # the token that reaches it is in
                kept.append(token)
            mass += p[token]
        p = np.where([token in kept for token in range(len(p))], p, 0)
        p = p / p.sum()
    if config.min_p > 0:
        p = np.where(p >= config.min_p * p.max(), p, 0)
    return p / p.sum()


def draws(logits: np.ndarray, config: SamplingConfig, number: int, seed: int = 0) -> Draw:
    keys = jax.random.split(jax.random.key(seed), number)
    return jax.jit(lambda keys: draw(one_each(keys), jnp.asarray(logits, jnp.float32)[None], config))(keys)


def one_each(keys: jax.Array) -> jax.Array:
    """The randomness of each row's first draw."""
    return uniforms(keys, 1)[..., 0, :]


def assert_drawn_from(probabilities: np.ndarray, tokens: np.ndarray) -> None:
    """χ² within six standard deviations of its mean, and nothing outside the support."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts.shape == probabilities.shape
    assert (counts[probabilities == 0] == 0).all()
    expected = probabilities * len(tokens)
    usual = expected >= 5
    statistic = np.sum((counts[usual] - expected[usual]) ** 2 / expected[usual])
    degrees = max(1, usual.sum() - 1)
    assert statistic < degrees + 6 * math.sqrt(2 * degrees), (counts, expected)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, *FILTERS], ids=str)
def test_draws_and_their_logprobs_follow_the_filtered_distribution(settings):
    config = SamplingConfig(**settings)
    logits = np.random.default_rng(1).normal(size=13) * 1.5
    expected = filtered(logits, config)
    drawn = draws(logits, config, 20_000)
    tokens = np.asarray(drawn.token)
    assert_drawn_from(expected, tokens)
    np.testing.assert_allclose(drawn.sampler_logprob, np.log(expected[tokens]), atol=1e-5)
    np.testing.assert_allclose(drawn.logprob, np.log(softmax(logits)[tokens]), atol=1e-5)


@pytest.mark.parametrize("settings", MORE_FILTERS, ids=str)
def test_truncate_keeps_the_reference_set(settings):
    """On many random rows at once, without the temperature, which is applied before."""
    config = SamplingConfig(**{**settings, "temperature": 1.0})
    rows = np.random.default_rng(2).normal(size=(50, 17)) * 2
    logits, ids = jax.jit(lambda x: truncate(x, config))(rows.astype(np.float32))
    kept = np.asarray(jax.nn.softmax(logits, axis=-1))
    if config.top_k is not None:
        assert ids.shape == (50, min(config.top_k, 17))
        for row, some in zip(kept, np.asarray(ids), strict=True):
            in_order = sorted(np.flatnonzero(row), key=lambda token: -row[token])
            np.testing.assert_array_equal(some[: len(in_order)], in_order)
            assert (some[len(in_order) :] == -1).all()
    np.testing.assert_allclose(kept, [filtered(row, config) for row in rows], atol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 5, 33, 100, 257])
def test_every_vocabulary_size(vocabulary):
    """The two levels of the inverse cumulative distribution, with and without a ragged last block."""
    logits = np.random.default_rng(vocabulary).normal(size=vocabulary)
    drawn = draws(logits, SamplingConfig(), 20_000)
    assert_drawn_from(softmax(logits), np.asarray(drawn.token))


@pytest.mark.parametrize("vocabulary", [32, 512, 32_000, 49_152, 128_256, 151_936, 152_064])
def test_blocks_of_usual_vocabularies_lie_within_the_parts_of_eight_devices(vocabulary):
    assert vocabulary // 8 % block_size(vocabulary) == 0


def test_tokens_of_no_probability_are_never_drawn():
    """Impossible tokens at both ends of blocks and whole impossible blocks, among many draws."""
    for kept in ([0], [63], [5, 6], [7, 8], [1, 30, 62]):
        logits = np.full(64, -5.0)
        logits[kept] = np.arange(len(kept)) * 0.1
        tokens = np.asarray(draws(logits, SamplingConfig(top_k=len(kept)), 50_000).token)
        assert set(tokens.tolist()) == set(kept)


def test_extreme_logits():
    for logits in ([0.0, -200.0, -1e4], [1e4, 0.0, -1e4], [-1e5, -1e5 - 300, -1e6]):
        drawn = draws(np.array(logits), SamplingConfig(), 100)
        assert (np.asarray(drawn.token) == 0).all()
        np.testing.assert_array_equal(drawn.sampler_logprob, np.zeros(100))
        cold = draws(np.array(logits), SamplingConfig(temperature=1e-3), 100)
        assert (np.asarray(cold.token) == 0).all()


def test_ties_at_a_threshold():
    """Top-k keeps k of them; the others all."""
    logits = jnp.array([1.0, 1.0, 0.0, 1.0, -1.0])
    for config in (SamplingConfig(top_p=0.5), SamplingConfig(min_p=0.99), SamplingConfig(top_k=3)):
        kept = np.asarray(truncate(logits, config).logits) > -1e20
        np.testing.assert_array_equal(kept, [True, True, False, True, False])
    kept, ids = truncate(logits, SamplingConfig(top_k=2))
    np.testing.assert_array_equal(np.asarray(kept) > -1e20, [True, True, False, False, False])
    np.testing.assert_array_equal(ids, [0, 1])


def test_min_p_is_relative_to_the_most_likely_token_left():
    logits = jnp.log(jnp.array([0.5, 0.24, 0.16, 0.1]))
    kept = np.asarray(truncate(logits, SamplingConfig(min_p=0.3)).logits) > -1e20
    np.testing.assert_array_equal(kept, [True, True, True, False])


def test_greedy_takes_the_most_likely():
    logits = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    drawn = jax.jit(lambda keys: draw(one_each(keys), jnp.asarray(logits), SamplingConfig(temperature=0.0)))(keys)
    np.testing.assert_array_equal(drawn.token, logits.argmax(axis=-1))
    np.testing.assert_allclose(drawn.logprob, [np.log(softmax(row).max()) for row in logits], atol=1e-5)
    np.testing.assert_array_equal(drawn.sampler_logprob, np.zeros(4))


def test_a_row_is_drawn_by_its_own_key():
    """Not by its neighbours', nor by how many there are."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 33)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 6)
    tokens = jax.jit(lambda keys, logits: draw(one_each(keys), logits, SamplingConfig()).token)
    whole = np.asarray(tokens(keys, logits))
    np.testing.assert_array_equal(tokens(keys[2:4], logits[2:4]), whole[2:4])
    same = tokens(jnp.broadcast_to(keys[:1], (6,)), jnp.broadcast_to(logits[:1], (6, 33)))
    assert set(np.asarray(same).tolist()) == {whole[0]}
    assert len(set(whole.tolist())) > 1


def test_randomness_is_that_of_the_row_and_the_draw():
    """Not of how many rows there are, nor of how many draws are made of each."""
    keys = jax.random.split(jax.random.key(0), 6).reshape(2, 3)
    whole = np.asarray(uniforms(keys, 5))
    assert whole.shape == (2, 3, 5, 2)
    assert len(np.unique(whole)) == whole.size
    np.testing.assert_array_equal(uniforms(keys[1, :2], 3), whole[1, :2, :3])


def test_numbers_are_folded_in_one_after_the_other():
    key, fold = jax.random.key(3), jax.random.fold_in
    keys = folded(key, 7, jnp.arange(2)[:, None], jnp.arange(3))
    expected = [[fold(fold(fold(key, 7), prompt), sample) for sample in range(3)] for prompt in range(2)]
    np.testing.assert_array_equal(
        *(jax.random.key_data(jnp.stack(jax.tree.leaves(x))) for x in (list(keys.ravel()), expected))
    )


def test_two_uniform_numbers_are_independent():
    """With equal weights the block and the place in it are uniform together, not only each for itself."""
    tokens = np.asarray(draws(np.zeros(64), SamplingConfig(), 40_000).token)
    assert_drawn_from(np.full(64, 1 / 64), tokens)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("min_p", -0.1),
        ("slots", 0),
        ("attention", "dense"),
    ],
)
def test_settings_out_of_range_raise(field, value):
    with pytest.raises(ValueError, match=rf"sampling\.{field}={value!r}"):
        dataclasses.replace(SamplingConfig(), **{field: value})
