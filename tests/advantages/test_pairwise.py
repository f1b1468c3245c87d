import jax
import numpy as np
import pytest

from jaxrl_llm.advantages.pairwise import brpo_advantages, brpo_skew, draw_reference

MASK = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [0] * 4], bool)


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def test_golden_numbers(examples):
    quality = np.array([5, 7, 4, 6, 5])
    first = np.arange(5) == 0
    A = brpo_advantages(quality > quality[0], first)
    close(A, examples["brpo.adv_ref0"])
    close(brpo_skew(A, group_size=5)[0], examples["brpo.skew"])
    close(brpo_skew(brpo_advantages(quality > quality[2], np.arange(5) == 2)[None])[0], examples["brpo.skew_ref2"])


@pytest.mark.parametrize("inconsistent", ["loss", "tie"])
def test_equals_the_definition(inconsistent):
    rng = np.random.default_rng(0)
    one, two = rng.uniform(size=(2, 4, 4)) < 0.5
    reference = np.array([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0] * 4], bool)
    expected = np.zeros((4, 4))
    for p, i in zip(*np.nonzero(MASK & ~reference), strict=True):
        agreed = {(True, True): 1, (False, False): -1}
        expected[p, i] = agreed.get((bool(one[p, i]), bool(two[p, i])), -1 if inconsistent == "loss" else 0)
    A = brpo_advantages(one, reference, preferred_swapped=two, inconsistent=inconsistent, mask=MASK)
    close(A, expected)
    assert A.dtype == np.float32
    jitted = jax.jit(lambda *x: brpo_advantages(*x, preferred_swapped=two, inconsistent=inconsistent, mask=MASK))
    close(jitted(one, reference), expected)

    counts = MASK.sum(-1)
    skew = np.abs(expected.sum(-1)) / np.maximum(counts, 1)
    close(brpo_skew(A, mask=MASK), skew)
    labels = np.repeat([5, 0, 9, 2], 4).reshape(4, 4)
    close(brpo_skew(A, mask=MASK, group_ids=labels), skew[:, None].repeat(4, 1))
    garbage = np.where(MASK, A, np.nan)
    close(brpo_skew(garbage, mask=MASK), skew)


@pytest.mark.parametrize("labelled", [False, True])
def test_reference_is_drawn_uniformly_among_the_valid(labelled):
    labels = np.array([[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 2, 0], [0, 1, 2, 0]]) if labelled else None
    groups = np.arange(4)[:, None].repeat(4, 1) if labels is None else labels
    keys = jax.random.split(jax.random.key(0), 2000)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: draw_reference(key, MASK, group_ids=labels)))(keys))
    assert draws.dtype == bool
    for label in np.unique(groups):
        valid = MASK & (groups == label)
        if valid.any():
            np.testing.assert_array_equal(draws[:, groups == label].sum(-1), 1)
            np.testing.assert_allclose(draws[:, valid].mean(0), 1 / valid.sum(), atol=0.04)
    assert not draws[:, ~MASK].any()
    same = draw_reference(jax.random.key(3), MASK), draw_reference(jax.random.key(3), MASK)
    np.testing.assert_array_equal(*same)


def test_errors():
    with pytest.raises(ValueError, match="unknown inconsistent 'win': choose one of loss, tie"):
        brpo_advantages(MASK, MASK, inconsistent="win")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"is_reference has shape \(4,\), but preferred has shape \(4, 4\)"):
        brpo_advantages(MASK, MASK[0])
    with pytest.raises(ValueError, match="mask must be bool"):
        draw_reference(jax.random.key(0), np.ones((2, 3)))
