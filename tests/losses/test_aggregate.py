from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.aggregate import (
    AggregationMode,
    aggregate,
    aggregation_normalizer,
    aggregation_weights,
)

MODES = get_args(AggregationMode)
NORM = 8.0


def aggregate_loop(values, mask, mode, count_empty=False):
    """The definitions, for [P, G, T] with a group on axis 1."""
    P, G, _ = mask.shape
    tokens = {(p, g): values[p, g][mask[p, g]] for p in range(P) for g in range(G)}
    used = [key for key in tokens if count_empty or len(tokens[key])]
    everything = np.concatenate(list(tokens.values()))

    def mean(x):
        return sum(x) / len(x) if len(x) else 0.0

    if mode == "token-mean":
        return mean(everything)
    if mode == "token-sum":
        return sum(everything)
    if mode == "seq-mean-token-mean":
        return mean([mean(tokens[key]) for key in used])
    if mode == "seq-mean-token-sum":
        return mean([sum(tokens[key]) for key in used])
    if mode == "seq-mean-token-sum-norm":
        return mean([sum(tokens[key]) for key in used]) / NORM
    groups = [[key for key in used if key[0] == p] for p in range(P)]
    groups = [keys for keys in groups if keys]
    if mode == "group-mean-token-mean":
        return mean([mean(np.concatenate([tokens[key] for key in keys])) for keys in groups])
    assert mode == "group-sum-token-mean"
    return sum(mean([mean(tokens[key]) for key in keys]) for keys in groups)


def test_golden_numbers(examples, tok):
    def agg(mode, **options):
        return aggregate(-tok.logprobs, tok.mask, mode=mode, **options)

    np.testing.assert_allclose(agg("token-mean"), examples["agg.token_mean"], atol=1e-6)
    np.testing.assert_allclose(agg("seq-mean-token-mean"), examples["agg.seq_mean_token_mean"], atol=1e-6)
    np.testing.assert_allclose(agg("seq-mean-token-sum"), examples["agg.seq_mean_token_sum"], atol=1e-6)
    norm8 = agg("seq-mean-token-sum-norm", max_length=8)
    np.testing.assert_allclose(norm8, examples["agg.seq_mean_token_sum_norm8"], atol=1e-6)


@pytest.mark.parametrize("count_empty", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_definition(ragged, mode, count_empty):
    ragged.mask[3] = False  # a group without a token
    expected = aggregate_loop(ragged.logprobs, ragged.mask, mode, count_empty)
    options = {"mode": mode, "max_length": NORM, "count_empty": count_empty}
    value, grad = jax.value_and_grad(lambda x: aggregate(x, ragged.mask, **options))(jnp.float32(ragged.logprobs))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # The loss is linear: its gradient is the loss of each unit vector.
    unit = np.zeros(ragged.mask.shape)
    for index in [(0, 0, 1), (0, 2, 0), (1, 2, 3), (2, 0, 4), (0, 2, 1)]:
        unit[...] = 0
        unit[index] = 1
        np.testing.assert_allclose(grad[index], aggregate_loop(unit, ragged.mask, mode, count_empty), rtol=1e-5)
    assert (np.asarray(grad)[~ragged.mask] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_with_the_global_normalizer_add_up(ragged, mode):
    def loss(x, rows, normalizer):
        return aggregate(x[rows], ragged.mask[rows], mode=mode, max_length=NORM, normalizer=normalizer)

    x = jnp.float32(ragged.logprobs)
    whole = jax.value_and_grad(loss)(x, slice(None), None)
    parts = [slice(0, 1), slice(1, 2), slice(2, 4)]  # whole groups, of unequal token counts
    counts = [aggregation_normalizer(ragged.mask[rows], mode=mode) for rows in parts]
    total = aggregation_normalizer(ragged.mask, mode=mode)
    if mode not in ("token-sum", "group-sum-token-mean"):
        assert sum(counts) == total
    for normalizer in (total, sum(counts)):
        losses, grads = zip(*[jax.value_and_grad(loss)(x, rows, normalizer) for rows in parts], strict=True)
        np.testing.assert_allclose(sum(losses), whole[0], rtol=1e-6)
        np.testing.assert_allclose(sum(grads), whole[1], rtol=1e-6)


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("group-")])
def test_other_than_group_modes_may_split_groups(ragged, mode):
    values, mask = ragged.logprobs.reshape(12, 6), ragged.mask.reshape(12, 6)
    normalizer = aggregation_normalizer(mask, mode=mode)
    parts = [
        aggregate(values[rows], mask[rows], mode=mode, max_length=NORM, normalizer=normalizer)
        for rows in (slice(0, 5), slice(5, 12))
    ]
    whole = aggregate(values, mask, mode=mode, max_length=NORM)
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


@pytest.mark.parametrize("mode", ["group-mean-token-mean", "group-sum-token-mean"])
@pytest.mark.parametrize("count_empty", [False, True])
def test_group_ids_are_labels_in_any_order(ragged, mode, count_empty):
    ragged.mask[3] = False
    order = np.random.default_rng(2).permutation(12)
    ids = np.repeat([7, -1, 3, 1000], 3)[order]
    values, mask = ragged.logprobs.reshape(12, 6)[order], ragged.mask.reshape(12, 6)[order]
    by_id = aggregate(values, mask, mode=mode, group_ids=ids, count_empty=count_empty)
    by_axis = aggregate(ragged.logprobs, ragged.mask, mode=mode, count_empty=count_empty)
    np.testing.assert_allclose(by_id, by_axis, rtol=1e-6)
    as_matrix = aggregate(
        values.reshape(3, 4, 6),
        mask.reshape(3, 4, 6),
        mode=mode,
        group_ids=ids.reshape(3, 4),
        count_empty=count_empty,
    )
    np.testing.assert_allclose(as_matrix, by_axis, rtol=1e-6)


def packed(x, mask):
    """Packs the G rows of each prompt, [P, G, T], one after another into one, [P, G·T], with segment ids."""
    P, G, T = mask.shape
    values = np.full((P, G * T), np.nan)
    ids = np.full((P, G * T), 99)
    valid = np.zeros((P, G * T), bool)
    for p in range(P):
        start = 0
        for g in range(G):
            length = np.flatnonzero(mask[p, g]).max(initial=-1) + 1
            values[p, start : start + length] = x[p, g, :length]
            valid[p, start : start + length] = mask[p, g, :length]
            ids[p, start : start + length] = g
            start += length
    return values, valid, ids


@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_padded(ragged, mode):
    values, valid, ids = packed(ragged.logprobs, ragged.mask)
    expected = aggregate(ragged.logprobs, ragged.mask, mode=mode, max_length=NORM)
    value = aggregate(values, valid, mode=mode, max_length=NORM, segment_ids=ids, group_ids=np.array([5, 2, 0, 9]))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count_empty", [False, True])
def test_nothing_valid_is_zero(mode, count_empty):
    value, grad = jax.value_and_grad(
        lambda x: aggregate(x, jnp.zeros(x.shape, bool), mode=mode, max_length=4, count_empty=count_empty)
    )(jnp.full((2, 3, 4), jnp.nan))
    assert value == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_jit_vmap_and_half_precision(ragged, mode):
    def loss(x, mask):
        return aggregate(x, mask, mode=mode, max_length=NORM)

    x, mask = jnp.float32(ragged.logprobs), jnp.asarray(ragged.mask)
    expected = loss(x, mask)
    np.testing.assert_allclose(jax.jit(loss)(x, mask), expected, rtol=1e-6)
    mapped = jax.jit(jax.vmap(loss))(jnp.stack([x, -x]), jnp.stack([mask, mask]))
    np.testing.assert_allclose(mapped, jnp.stack([expected, -expected]), rtol=1e-6)
    half = x.astype(jnp.bfloat16)
    assert loss(half, mask).dtype == jnp.float32
    np.testing.assert_array_equal(loss(half, mask), loss(half.astype(jnp.float32), mask))


def test_weights_of_a_row():
    mask = np.array([[[True, True], [True, False]]])
    weights = aggregation_weights(mask, mode="group-sum-token-mean")
    np.testing.assert_allclose(weights, [[[0.25, 0.25], [0.5, 0]]])


def test_errors():
    values, mask = np.zeros((3, 4)), np.ones((3, 4), bool)
    with pytest.raises(ValueError, match="unknown aggregation mode 'mean': choose one of token-mean, seq-mean"):
        aggregate(values, mask, mode="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="divides by max_length: pass it"):
        aggregate(values, mask, mode="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match=r"mask of shape \(3, 4\): pass group_ids"):
        aggregate(values, mask, mode="group-mean-token-mean")
    with pytest.raises(ValueError, match=r"group_ids has shape \(4,\), but mask has shape \(3, 4\)"):
        aggregate(values, mask, mode="group-sum-token-mean", group_ids=np.zeros(4, int))
    with pytest.raises(ValueError, match="count_empty with segment_ids"):
        aggregate(values, mask, mode="seq-mean-token-sum", segment_ids=np.zeros((3, 4), int), count_empty=True)
    with pytest.raises(ValueError, match=r"values has shape|x has shape"):
        jax.eval_shape(lambda x: aggregate(x, mask, mode="token-mean"), jnp.zeros((3, 5)))


def test_max_length_must_be_positive():
    with pytest.raises(ValueError, match="max_length is 0: it must be positive"):
        aggregate(np.ones((2, 3)), np.ones((2, 3), bool), mode="seq-mean-token-sum-norm", max_length=0)
