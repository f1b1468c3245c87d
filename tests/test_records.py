"""Records of metrics: what is merged over parts equals what is computed of the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.records import ExplainedVariance, Max, Mean, Moments


@pytest.fixture
def ragged():
    """Values with NaN and infinities at the padding, and a mask with an empty row."""
    rng = np.random.default_rng(0)
    mask = np.arange(7) < np.array([4, 7, 0, 1, 6])[:, None]
    values = np.where(mask, rng.normal(size=mask.shape), np.nan)
    values[0, 5] = np.inf
    return values, mask


def test_mean_is_divided_once_over_all_parts(ragged):
    values, mask = ragged
    whole = np.nanmean(np.where(mask, values, np.nan))
    parts = [Mean.of(values[rows], mask[rows]) for rows in ([0], [1, 2], [3, 4])]
    np.testing.assert_allclose(parts[0].merge(parts[1]).merge(parts[2]).value(), whole, rtol=1e-6)
    stacked = jax.vmap(Mean.of)(jnp.asarray(values), jnp.asarray(mask))
    np.testing.assert_allclose(stacked.reduce().value(), whole, rtol=1e-6)
    assert Mean.of(values, np.zeros_like(mask)).value() == 0
    assert Mean.of(np.array([True, False, True, True])).value() == 0.75


def test_max_over_parts(ragged):
    values, mask = ragged
    whole = np.float32(values[mask].max())
    assert Max.of(values, mask).value() == whole
    assert jax.vmap(Max.of)(jnp.asarray(values), jnp.asarray(mask)).reduce().value() == whole
    assert Max.of(values[2:3], mask[2:3]).merge(Max.of(-1.0)).value() == -1
    assert Max.of(values[2:3], mask[2:3]).value() == 0


def test_metrics_pass_through_jit():
    merged = jax.jit(lambda x: {"m": Mean.of(x), "x": Max.of(x)})(jnp.arange(4.0))
    assert (merged["m"].value(), merged["x"].value()) == (1.5, 3.0)


def test_moments_of_nothing_and_of_constants():
    assert Moments.of(jnp.array([jnp.nan]), np.array([False])).value() == 0
    empty, one = Moments.of(jnp.zeros(0)), Moments.of(jnp.array([3.0]))
    assert one.value() == empty.value() == 0
    joined = empty.merge(one).merge(Moments.of(jnp.array([5.0])))
    np.testing.assert_allclose(joined, [2, 4, 2])
    np.testing.assert_allclose(joined.value(), np.std([3, 5], ddof=1), rtol=1e-6)
    np.testing.assert_allclose(joined.variance(ddof=0), 1)
    assert ExplainedVariance.of(jnp.array([1.0, 2.0]), jnp.array([3.0, 3.0])).value() == 0
    far = 1e4 + np.random.default_rng(0).normal(size=1000)  # no cancellation of large squares
    np.testing.assert_allclose(
        Moments.of(far[:300]).merge(Moments.of(far[300:])).value(), np.std(far, ddof=1), rtol=1e-5
    )


@pytest.mark.parametrize("size", [7, 100_003])
@pytest.mark.parametrize("constant", [0.1, 0.7, -1e4])
def test_explained_variance_of_equal_returns_is_0(size, constant):
    """Their mean is rounded, so that the sum of squares around it is not 0."""
    values = np.random.default_rng(0).normal(size=size).astype(np.float32)
    assert ExplainedVariance.of(values, jnp.full(size, constant, jnp.float32)).value() == 0
