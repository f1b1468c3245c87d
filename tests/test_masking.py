from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.masking import (
    as_float,
    check_choice,
    fill_masked,
    group_first,
    group_total,
    length_mask,
    masked_mean,
    masked_sum,
    masked_var,
    next_valid,
    per_token,
    segment_first,
    segment_last,
    segment_total,
    suffix_sum,
    whiten,
)

LENGTHS = np.array([4, 2, 0, 1, 7])
SIZE = 7


@pytest.fixture
def ragged():
    """Values with NaN and infinities at the padding, and a mask with an empty row and a hole."""
    rng = np.random.default_rng(0)
    mask = np.arange(SIZE) < LENGTHS[:, None]
    mask[4, 2:4] = False
    values = rng.normal(size=mask.shape)
    values[~mask] = np.nan
    values[0, 5] = np.inf
    return values, mask


def test_length_mask():
    np.testing.assert_array_equal(length_mask(LENGTHS, SIZE), np.arange(SIZE) < LENGTHS[:, None])
    assert length_mask(jnp.ones((2, 3), jnp.int32), 5).shape == (2, 3, 5)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1)])
@pytest.mark.parametrize("ddof", [0, 1])
def test_moments_equal_numpy(ragged, axis, ddof):
    values, mask = ragged
    held = np.where(mask, values, np.nan)
    counts = mask.sum(axis)
    totals = np.nansum(held, axis)
    means = np.where(counts > 0, totals / np.maximum(counts, 1), 0.0)
    deviations = held - (np.expand_dims(means, axis) if axis is not None else means)
    variances = np.where(counts > ddof, np.nansum(deviations**2, axis) / np.maximum(counts - ddof, 1), 0.0)
    np.testing.assert_allclose(masked_sum(values, mask, axis), totals, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masked_mean(values, mask, axis), means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masked_var(values, mask, axis, ddof=ddof), variances, rtol=1e-5, atol=1e-6)
    kept = masked_var(values, mask, axis, ddof=ddof, keepdims=True)
    assert kept.shape == np.sum(values, axis, keepdims=True).shape


def test_whiten_golden_numbers(examples):
    x = np.array([[1.0, 2, 3, 4], [5, 6, np.nan, 99]])
    mask = length_mask(np.array([4, 2]), 4)
    np.testing.assert_allclose(whiten(x, mask), examples["whiten.unbiased"], atol=1e-6)
    np.testing.assert_allclose(whiten(x, mask, ddof=0), examples["whiten.biased"], atol=1e-6)
    kept = whiten(x, mask, shift_mean=False)
    np.testing.assert_allclose(kept, examples["whiten.unbiased_keepmean"], atol=1e-6)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten_of_less_than_two_elements_is_zero(count, ddof):
    x = np.array([3.0, np.nan])
    mask = np.arange(2) < count
    value, grad = jax.value_and_grad(lambda x: whiten(x, mask, ddof=ddof).sum())(x)
    assert value == 0
    assert np.isfinite(grad).all()


def suffix_sum_loop(x, mask, discount, segment_ids=None):
    out = np.zeros_like(x)
    for b in range(x.shape[0]):
        carry = 0.0
        for t in reversed(range(x.shape[1])):
            if segment_ids is not None and t + 1 < x.shape[1] and segment_ids[b, t] != segment_ids[b, t + 1]:
                carry = 0.0
            if mask[b, t]:
                carry = x[b, t] + discount * carry
                out[b, t] = carry
    return out


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_suffix_sum_skips_masked_tokens_and_carries_across_them(ragged, discount):
    values, mask = ragged
    expected = suffix_sum_loop(values, mask, discount)
    np.testing.assert_allclose(suffix_sum(values, mask, discount=discount), expected, rtol=1e-5, atol=1e-6)


def test_suffix_sum_by_hand():
    mask = np.array([True, False, True, True, False])
    out = suffix_sum(np.array([1.0, np.nan, 2.0, 4.0, np.inf]), mask, discount=0.5)
    np.testing.assert_allclose(out, [1 + 0.5 * (2 + 0.5 * 4), 0, 2 + 0.5 * 4, 4, 0])


SEGMENTS = np.array([[3, 3, 3, 1, 1, 7, 7], [2, 2, 2, 2, 2, 2, 2], [1, 2, 3, 4, 5, 6, 7]])
SEGMENT_MASK = np.array([[1, 0, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1]], bool)


def test_suffix_sum_stops_at_segments():
    x = np.random.default_rng(1).normal(size=SEGMENTS.shape)
    x[~SEGMENT_MASK] = np.nan
    out = suffix_sum(x, SEGMENT_MASK, discount=0.7, segment_ids=SEGMENTS)
    np.testing.assert_allclose(out, suffix_sum_loop(x, SEGMENT_MASK, 0.7, SEGMENTS), rtol=1e-5, atol=1e-6)


def test_segment_total_and_first():
    x = np.random.default_rng(1).normal(size=SEGMENTS.shape)
    x[~SEGMENT_MASK] = np.nan
    total = np.zeros_like(x)
    first = np.zeros_like(SEGMENT_MASK)
    for b, row in enumerate(SEGMENTS):
        for label in set(row):
            inside = row == label
            valid = np.flatnonzero(inside & SEGMENT_MASK[b])
            total[b, inside] = x[b, valid].sum()
            first[b, valid[:1]] = True
    np.testing.assert_allclose(segment_total(x, SEGMENT_MASK, SEGMENTS), total, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(segment_first(SEGMENT_MASK, SEGMENTS), first)
    # Without ids a row is one segment.
    rows = np.broadcast_to(np.nansum(x, 1, keepdims=True), x.shape)
    np.testing.assert_allclose(segment_total(x, SEGMENT_MASK), rows, rtol=1e-5, atol=1e-6)
    assert segment_first(SEGMENT_MASK).sum(1).tolist() == [1, 1, 1]


def test_a_segment_does_not_see_what_is_in_another():
    x = np.array([1.0, np.inf, 2.0, np.nan])
    total = segment_total(x, np.ones(4, bool), np.array([1, 2, 3, 4]))
    np.testing.assert_array_equal(total, x)


def test_group_total_and_first_with_labels_in_any_order():
    ids = np.array([[70, -3, 70], [5, -3, 5]])
    x = np.array([[1.0, 2, np.nan], [8, 16, 32]])
    mask = np.array([[True, True, False], [False, True, True]])
    np.testing.assert_array_equal(group_total(x, mask, ids), [[1, 18, 1], [32, 18, 32]])
    np.testing.assert_array_equal(group_first(mask, ids), [[True, True, False], [False, False, True]])
    np.testing.assert_array_equal(group_total(x, mask), [[3, 3, 3], [48, 48, 48]])
    np.testing.assert_array_equal(group_first(mask), [[True, False, False], [False, True, False]])


HALVES = np.array([[0] * 3 + [1] * 4] * 5)
FUNCTIONS = {
    "masked_mean": lambda x, mask: masked_mean(x, mask, -1),
    "masked_var": lambda x, mask: masked_var(x, mask, -1),
    "whiten": whiten,
    "suffix_sum": lambda x, mask: suffix_sum(x, mask, discount=0.9, segment_ids=np.array([[0] * 3 + [1] * 4] * 5)),
    "segment_total": lambda x, mask: segment_total(x, mask, np.array([[0] * 3 + [1] * 4] * 5)),
    "group_total": lambda x, mask: group_total(x, mask, np.arange(35).reshape(5, 7) % 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_equals_finite_differences_and_is_zero_at_the_padding(ragged, name):
    values, mask = ragged
    with jax.enable_x64(True):

        @jax.jit
        def weighted(inner):  # with distinct weights, so that no gradient cancels
            x = jnp.asarray(values).at[np.nonzero(mask)].set(inner)
            out = FUNCTIONS[name](x, mask)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape))

        check_grads(weighted, (jnp.asarray(values[mask]),), order=1, modes=["rev"], eps=1e-6)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(FUNCTIONS[name](x, mask)))))(jnp.float32(values))
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[~mask] == 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_masked_is_finite(name):
    values, mask = jnp.full((5, 7), jnp.nan), jnp.zeros((5, 7), bool)
    value, grad = jax.jit(jax.value_and_grad(lambda x: jnp.sum(FUNCTIONS[name](x, mask))))(values)
    assert value == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_vmap_and_half_precision(ragged, name):
    values, mask = ragged
    expected = FUNCTIONS[name](values, mask)
    assert expected.dtype == jnp.float32
    function = jax.jit(FUNCTIONS[name])
    np.testing.assert_allclose(function(values, mask), expected, rtol=1e-6, atol=1e-6)
    mapped = jax.jit(jax.vmap(function))(jnp.stack([values, 2 * values]), jnp.stack([mask, mask]))
    np.testing.assert_allclose(mapped[0], expected, rtol=1e-6, atol=1e-6)
    half = jnp.asarray(values, jnp.bfloat16)
    assert function(half, mask).dtype == jnp.float32
    np.testing.assert_array_equal(function(half, mask), function(half.astype(jnp.float32), mask))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), but mask has shape \(2, 4\)"):
        masked_mean(np.zeros((2, 3)), np.ones((2, 4), bool))
    with pytest.raises(ValueError, match="mask must be bool, but has dtype float32"):
        fill_masked(np.zeros(3), np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"segment_ids has shape \(4,\)"):
        jax.eval_shape(lambda x: suffix_sum(x, x > 0, segment_ids=np.zeros(4)), jnp.zeros(3))


def test_segment_last(ragged):
    _, mask = ragged
    expected = np.zeros_like(mask)
    for row in range(len(mask)):
        expected[row, np.flatnonzero(mask[row])[-1:]] = True
    np.testing.assert_array_equal(segment_last(mask), expected)
    packed, ids = np.concatenate([mask[:2], mask[3:]], axis=1), np.repeat([[5] * SIZE + [0] * SIZE], 2, axis=0)
    np.testing.assert_array_equal(segment_last(packed, ids), np.concatenate([expected[:2], expected[3:]], axis=1))


@pytest.mark.parametrize("packed", [False, True])
def test_next_valid(ragged, packed):
    values, mask = ragged
    expected = np.zeros(values.shape)
    for row, t in np.ndindex(values.shape):
        following = [k for k in range(t + 1, SIZE) if mask[row, k]]
        expected[row, t] = values[row, following[0]] if following else 0.0
    if packed:
        values, mask, expected = (np.concatenate([x[:2], x[3:]], axis=1) for x in (values, mask, expected))
    ids = np.repeat([[5] * SIZE + [0] * SIZE], 2, axis=0) if packed else None
    np.testing.assert_allclose(next_valid(values, mask, ids), expected, rtol=1e-6)
    grad = jax.grad(lambda x: next_valid(x, mask, ids).sum())(jnp.asarray(values))
    assert np.isfinite(grad).all()
    with pytest.raises(ValueError, match=r"segment_ids has shape \(3,\)"):
        next_valid(values, mask, np.zeros(3, int))


def test_per_token():
    mask = np.ones((2, 3), bool)
    np.testing.assert_array_equal(per_token(mask, scores=np.array([1, 2])), [[1, 1, 1], [2, 2, 2]])
    x = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(per_token(mask, scores=x), x)
    assert per_token(mask, finished=np.ones(2, bool)).dtype == bool
    with pytest.raises(
        ValueError, match=r"scores has shape \(3,\), but the tokens have shape \(2, 3\): pass one for each token"
    ):
        per_token(mask, scores=np.zeros(3))
    with pytest.raises(ValueError, match=r"finished has shape .* with segment_ids a row holds several sequences"):
        per_token(mask, packed=True, finished=np.ones(2, bool))


def test_check_choice():
    check_choice("scale", "group", Literal["group", "none"])
    with pytest.raises(ValueError, match="unknown scale 'std': choose one of group, none"):
        check_choice("scale", "std", Literal["group", "none"])


def test_as_float_of_a_plain_number_is_narrow():
    with jax.enable_x64(True):
        assert as_float(0.5).dtype == as_float(np.ones(2, np.int64)).dtype == jnp.float32
        assert as_float(np.float64(0.5)).dtype == jnp.float64


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows_or_no_tokens(shape):
    mask, ids = np.ones(shape, bool), np.zeros(shape, int)
    for result in (
        suffix_sum(np.ones(shape), mask, segment_ids=ids),
        segment_total(np.ones(shape), mask, ids),
        next_valid(np.ones(shape), mask, ids),
        group_total(np.ones(shape), mask, ids),
    ):
        assert result.shape == shape
