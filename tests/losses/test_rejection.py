import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import geometric_filter, mis_weights, rejection_mask

STATISTICS = {
    "ratio": lambda x: x,
    "k1": lambda x: -x,
    "k2": lambda x: x**2 / 2,
    "k3": lambda x: np.exp(x) - 1 - x,
}
REDUCTIONS = {"token": lambda d: d, "sum": np.sum, "mean": np.mean}
BOUNDS = {"ratio": (0.6, 1.8), "k1": (-0.4, 0.3), "k2": (None, 0.1), "k3": (0.001, 0.15)}


def loop(old, sampler, mask, statistic, level, low, high):
    keep = np.zeros(mask.shape, bool)
    low, high = -np.inf if low is None else low, np.inf if high is None else high
    for row in np.ndindex(mask.shape[:-1]):
        tokens = np.flatnonzero(mask[row])
        if not tokens.size:
            continue
        d = STATISTICS[statistic]((old - sampler)[row][tokens])
        value = d if level == "max" else REDUCTIONS[level](d)
        value = np.exp(value) if statistic == "ratio" else value
        within = (low <= value) & (value <= high)
        keep[row][tokens] = np.all(within) if level == "max" else within
    return keep


@pytest.mark.parametrize("level", ["token", "sum", "mean", "max"])
@pytest.mark.parametrize("statistic", list(STATISTICS))
def test_equals_the_definition(ragged, statistic, level):
    low, high = BOUNDS[statistic]
    scale = {"sum": 2.0, "mean": 0.15}.get(level, 1.0)
    high = high**scale if statistic == "ratio" else high * scale
    options = {"statistic": statistic, "level": level, "low": low, "high": high}
    expected = loop(ragged.logprobs, ragged.old, ragged.mask, **options)
    assert 0 < expected.sum() < ragged.mask.sum()
    given = jax.jit(lambda a, b: rejection_mask(a, b, ragged.mask, **options))(ragged.logprobs, ragged.old)
    np.testing.assert_array_equal(given, expected)


def test_it_is_what_other_corrections_keep(ragged):
    arrays = (ragged.logprobs, ragged.old, ragged.mask)
    geometric = geometric_filter(*arrays, w_min=0.9, w_max=1.2)
    np.testing.assert_array_equal(rejection_mask(*arrays, statistic="ratio", low=0.9, high=1.2), geometric)
    by_product = mis_weights(*arrays, level="sequence", w_max=1.5) > 0
    np.testing.assert_array_equal(rejection_mask(*arrays, statistic="ratio", level="sum", high=1.5), by_product)


def test_packed_rows_are_judged_apart():
    mask = np.array([[True, True, True, True, False, True]])
    log_ratio, segments = np.array([[0.1, 0.1, 1.0, 0.1, np.nan, 0.05]]), np.array([[0, 0, 1, 1, 1, 2]])
    for level in ("sum", "mean", "max"):
        keep = rejection_mask(log_ratio, 0 * log_ratio, mask, level=level, high=0.1, segment_ids=segments)
        assert keep.tolist() == [[True, True, False, False, False, True]]


def test_nothing_far_off_overflows_and_nothing_masked_is_kept():
    far = jnp.array([[900.0, -900.0, 0.0]])
    keep = rejection_mask(far, 0 * far, np.ones((1, 3), bool), level="token", high=1.0)
    assert keep.tolist() == [[False, False, True]]
    assert not rejection_mask(np.full((2, 3), np.nan), np.full((2, 3), np.nan), np.zeros((2, 3), bool), high=9.0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "low and high are both None"),
        ({"low": 2.0, "high": 1.0}, r"low is 2\.0 and high is 1\.0: nothing is between them"),
        ({"high": 1.0, "statistic": "k4"}, "unknown statistic 'k4': choose one of ratio, k1, k2, k3"),
        ({"high": 1.0, "level": "product"}, "unknown level 'product': choose one of token, sum, mean, max"),
    ],
)
def test_errors(options, message):
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match=message):
        rejection_mask(x, x, np.ones((2, 3), bool), **options)
