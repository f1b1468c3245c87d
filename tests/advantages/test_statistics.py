import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.statistics import group_rank, group_statistics, rows_total, whiten_by_length
from jaxrl_llm.masking import whiten

LABELS = np.array([[4, 4, 1], [1, 9, 4], [9, 9, 1], [0, 0, 0]])


def rank_loop(x, mask, labels):
    """Sorted by value, the largest first; of equal ones the first; masked ones last."""
    out = np.zeros(x.size, int)
    for label in np.unique(labels):
        members = np.flatnonzero(labels.ravel() == label)
        ordered = sorted(members, key=lambda i: (not mask.flat[i], -x.flat[i] if mask.flat[i] else 0))
        for place, i in enumerate(ordered):
            out[i] = place
    return out.reshape(x.shape)


@pytest.mark.parametrize("labelled", [False, True])
def test_group_rank(labelled):
    rng = np.random.default_rng(0)
    mask = rng.uniform(size=(4, 3)) < 0.7
    x = np.where(mask, rng.integers(0, 3, size=(4, 3)), np.nan)
    labels = LABELS if labelled else None
    expected = rank_loop(x, mask, LABELS if labelled else np.arange(4)[:, None].repeat(3, 1))
    np.testing.assert_array_equal(group_rank(x, mask, labels), expected)
    np.testing.assert_array_equal(jax.jit(group_rank)(x, mask, labels), expected)
    both = jax.vmap(lambda x, mask: group_rank(x, mask, labels))(np.stack([x, x]), np.stack([mask, mask]))
    np.testing.assert_array_equal(both, [expected, expected])
    assert group_rank(np.zeros(0), np.zeros(0, bool), np.zeros(0, int)).shape == (0,)


def test_group_statistics():
    x, mask = (
        np.array([[1.0, 2.0, 6.0], [0.1, 0.1, np.nan], [np.nan] * 3]),
        np.array([[1] * 3, [1, 1, 0], [0] * 3], bool),
    )
    group = group_statistics(x, mask)
    np.testing.assert_array_equal(group.count[:, 0], [3, 2, 0])
    np.testing.assert_allclose(group.mean[:, 0], [3, 0.1, 0], rtol=1e-6)
    np.testing.assert_allclose(group.variance(1)[:, 0], [7, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(group.is_constant[:, 0], [False, True, True])


@pytest.mark.parametrize("labelled", [False, True])
def test_rows_total(ragged, labelled):
    x, mask = ragged.values, ragged.mask
    labels = LABELS if labelled else np.arange(4)[:, None].repeat(3, 1)
    expected = np.zeros(x.shape)
    for row in np.ndindex(4, 3):
        expected[row] = np.where(mask, x, 0)[labels == labels[row]].sum(0)
    np.testing.assert_allclose(rows_total(x, mask, labels if labelled else None), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten_by_length(ragged, ddof):
    tokens = np.broadcast_to(ragged.scores[..., None], ragged.mask.shape)
    expected = whiten(tokens, ragged.mask, ddof=ddof)
    out = whiten_by_length(ragged.scores, ragged.lengths, ragged.lengths > 0, ddof=ddof)
    np.testing.assert_allclose(jnp.where(ragged.mask, out[..., None], 0), expected, rtol=1e-5, atol=1e-6)
    for few in (1, 0):
        mask = (np.arange(12) < few).reshape(4, 3)
        gradient = jax.grad(lambda x, mask: whiten_by_length(x, np.ones((4, 3)), mask, ddof=ddof).sum())
        grad = gradient(ragged.scores, mask)
        assert np.isfinite(grad).all()
