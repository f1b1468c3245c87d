"""Self-distillation, beside a loop over positions and numbers worked out by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import generalized_jsd, gkd_loss, sdpo_loss, top_k_jsd

CASES = [(0.5, None, True), (0.0, 3, True), (1.0, 3, False), (0.3, 7, True)]


def of_two(p, q, beta):
    """Of two distributions."""
    if beta in (0, 1):
        return np.sum(q * np.log(q / p)) if beta == 0 else np.sum(p * np.log(p / q))
    m = beta * q + (1 - beta) * p
    return beta * np.sum(q * np.log(q / m)) + (1 - beta) * np.sum(p * np.log(p / m))


def loop(logits, teacher_logits, mask, told, beta, k, tail, temperature=1.0):
    """One position at a time; `None` where nothing is learned."""
    found = {}
    for index in zip(*np.nonzero(mask), strict=True):
        if not told[index[:-1]]:
            continue
        p, q = (np.exp(np.float64(x[index]) / temperature) for x in (logits, teacher_logits))
        p, q = p / p.sum(), q / q.sum()
        if k is not None and k < len(p):
            kept = np.argsort(-p)[:k]
            rest = (1 - p[kept].sum(), 1 - q[kept].sum())
            p, q = p[kept], q[kept]
            if tail:
                p, q = np.append(p, rest[0]), np.append(q, rest[1])
            else:
                p, q = p / p.sum(), q / q.sum()
        found[index] = of_two(p, q, beta)
    return found


@pytest.fixture
def rows(ragged_rows):
    """Logits over seven tokens, `[12, 6, 7]`, NaN at the padding; of a third of the rows nothing is told."""
    mask = ragged_rows("mask")["mask"]
    rng = np.random.default_rng(0)
    logits = {name: rng.normal(size=(*mask.shape, 7)) for name in ("logits", "teacher_logits")}
    given = {name: np.where(mask[..., None], x, np.nan) for name, x in logits.items()}
    return given | {"mask": mask, "told": np.arange(len(mask)) % 3 > 0}


@pytest.mark.parametrize(("beta", "k", "tail"), CASES)
def test_it_equals_the_definition(rows, beta, k, tail):
    expected = loop(**rows, beta=beta, k=k, tail=tail, temperature=2.0)
    settings = {"beta": beta, "top_k": k, "tail": tail, "temperature": 2.0}
    loss, metrics = jax.jit(lambda rows: sdpo_loss(**rows, **settings))(rows)
    np.testing.assert_allclose(loss, np.mean([*expected.values()]), rtol=1e-5)
    np.testing.assert_allclose(metrics["jsd"].value(), loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["frac_told"].value(), 2 / 3, rtol=1e-6)
    of_rows = [[value for index, value in expected.items() if index[0] == row] for row in range(len(rows["mask"]))]
    loss, _ = sdpo_loss(**rows, **settings, aggregation="seq-mean-token-mean")
    np.testing.assert_allclose(loss, np.mean([np.mean(values) for values in of_rows if values]), rtol=1e-5)


@pytest.mark.parametrize(("beta", "k", "tail"), CASES)
def test_the_gradient_is_that_of_finite_differences(rows, beta, k, tail):
    clean = {name: np.where(rows["mask"][..., None], rows[name], 0.0) for name in ("logits", "teacher_logits")}
    rest = {"mask": rows["mask"], "told": rows["told"]}

    def loss(logits, teacher_logits):
        return sdpo_loss(logits, teacher_logits, **rest, beta=beta, top_k=k, tail=tail)[0]

    slopes, of_teacher = jax.grad(loss, argnums=(0, 1))(*map(jnp.asarray, clean.values()))
    assert not of_teacher.any() and not slopes[~(rows["mask"] & rows["told"][:, None])].any()
    row, place = next((r, t) for r, t in zip(*np.nonzero(rows["mask"]), strict=True) if rows["told"][r])
    for token in range(7):
        ends = []
        for step in (-1e-5, 1e-5):
            moved = clean["logits"].copy()
            moved[row, place, token] += step
            of_all = loop(moved, clean["teacher_logits"], **rest, beta=beta, k=k, tail=tail)
            ends.append(np.mean([*of_all.values()]))
        np.testing.assert_allclose(slopes[row, place, token], (ends[1] - ends[0]) / 2e-5, rtol=2e-3, atol=2e-6)


def test_by_hand(examples):
    """p = (3/4, 1/8, 1/8), q = (1/4, 5/8, 1/8): with one for the others, (3/4, 1/4) and (1/4, 3/4)."""
    p, q = np.log([[6.0, 1.0, 1.0]]), np.log([[2.0, 5.0, 1.0]])
    golden = {1.0: examples["sdpo.top1_reverse_kl"], 0.5: examples["sdpo.top1_jsd_beta0p5"]}
    for beta, expected in golden.items():
        np.testing.assert_allclose(top_k_jsd(p, q, k=1, beta=beta), [expected], rtol=1e-6)
    np.testing.assert_allclose(top_k_jsd(p, q, k=1, beta=0.5, tail=False), [0], atol=1e-7)
    np.testing.assert_allclose(top_k_jsd(p, q, k=3, beta=0.5), generalized_jsd(p, q, beta=0.5), rtol=1e-6)
    assert top_k_jsd(p, q, k=1, beta=0.5) < generalized_jsd(p, q, beta=0.5)


def test_told_of_everything_it_is_distillation_and_of_nothing_it_is_0(rows):
    rest = {name: rows[name] for name in ("logits", "teacher_logits", "mask")}
    every = np.ones(len(rows["mask"]), bool)
    np.testing.assert_array_equal(sdpo_loss(**rest, told=every, beta=1.0)[0], gkd_loss(**rest, beta=1.0)[0])
    value, slopes = jax.value_and_grad(lambda x: sdpo_loss(**rest | {"logits": x}, told=~every)[0])(
        jnp.asarray(rest["logits"])
    )
    assert value == 0
    chex.assert_trees_all_equal(slopes, jnp.zeros_like(slopes))


def test_what_does_not_fit_is_told(rows):
    with pytest.raises(ValueError, match="k=8 of 7 tokens: pass 1 to all of them"):
        sdpo_loss(**rows, top_k=8)
    with pytest.raises(ValueError, match=r"logits has shape \(12, 6, 7\), mask \(12, 6\) and told \(12, 1\): pass"):
        sdpo_loss(**rows | {"told": rows["told"][:, None]})
