from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.process_reward import prm_loss, step_labels, step_probability


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


Z = np.array([2.0, -1.0, 0.5])
CLASSES = np.array([[1.5, -0.5], [0.2, 1.2], [0.0, -0.5]])[:, ::-1]  # as (wrong, correct)
ALL = np.ones(3, bool)


def test_golden_numbers(examples):
    labels = np.array([1, 0, 1])
    close(prm_loss(Z, labels, ALL)[0], examples["prm.bce"])
    close(prm_loss(CLASSES, labels, ALL)[0], examples["prm.token_ce"])
    close(step_probability(Z[:, None]), examples["prm.step_probs"])
    close(step_probability(CLASSES), examples["prm.step_probs"])
    close(prm_loss(Z, np.array([0.75, 0.25, 0.5]), ALL)[0], examples["prm.soft_bce"])


@pytest.fixture
def steps(ragged_rows):
    """Solutions with labels at the ends of their steps, NaN elsewhere."""
    mask = ragged_rows("mask")["mask"] & (np.arange(6) % 3 != 1)
    rng = np.random.default_rng(0)
    arrays = {"logits": rng.normal(size=mask.shape), "labels": rng.uniform(size=mask.shape)}
    return {name: np.where(mask, x, np.nan) for name, x in arrays.items()} | {"mask": mask}


def prm_loop(logits, labels, mask, by_solution=False):
    solutions = []
    for b in range(len(mask)):
        losses = []
        for t in np.flatnonzero(mask[b]):
            p = 1 / (1 + np.exp(-logits[b, t]))
            losses.append(-labels[b, t] * np.log(p) - (1 - labels[b, t]) * np.log(1 - p))
        solutions.append(losses)
    return np.mean([np.mean(x) for x in solutions if x] if by_solution else np.concatenate(solutions))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("hard", [False, True])
def test_it_equals_the_definition(check_token_loss, steps, mode, hard):
    if hard:
        steps["labels"] = np.where(steps["mask"], steps["labels"] > 0.5, np.nan)

    def loss(**arrays):
        return prm_loss(**arrays, aggregation=mode)

    close(loss(**steps)[0], prm_loop(**steps, by_solution=mode != "token-mean"))
    check_token_loss(loss, steps, mode=mode, trained="logits")


def test_metrics_equal_the_definition(steps):
    _, metrics = prm_loss(**steps)
    z, y = steps["logits"][steps["mask"]], steps["labels"][steps["mask"]]
    close(metrics["accuracy"].value(), ((z > 0) == (y > 0.5)).mean())
    close(metrics["step/prob_mean"].value(), (1 / (1 + np.exp(-z))).mean())


def test_labels_are_constants(steps):
    labels = jnp.float32(steps["labels"])
    assert not np.any(jax.grad(lambda y: prm_loss(steps["logits"], y, steps["mask"])[0])(labels))


@pytest.mark.parametrize("classes", [2, 3])
def test_classes_are_a_softmax(steps, classes):
    rng = np.random.default_rng(0)
    mask = steps["mask"]
    logits = np.where(mask[..., None], rng.normal(size=(*mask.shape, classes)), np.nan)
    labels = np.where(mask, rng.integers(0, classes, mask.shape), 7)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.mean([-np.log(p[b, t, labels[b, t]]) for b, t in zip(*np.nonzero(mask), strict=True)])
    term = jax.jit(jax.value_and_grad(lambda x: prm_loss(x, labels, mask), has_aux=True))
    (loss, metrics), grad = term(jnp.float32(logits))
    close(loss, expected)
    close(metrics["accuracy"].value(), (p.argmax(-1) == labels)[mask].mean())
    one_hot = labels[..., None] == np.arange(classes)
    close(grad, np.where(mask[..., None], (p - one_hot) / mask.sum(), 0))
    correct = p[..., 1] if classes == 2 else p[..., 1] + p[..., 2]
    close(metrics["step/prob_mean"].value(), correct[mask].mean())
    close(step_probability(logits)[mask], correct[mask])
    if classes == 3:
        close(step_probability(logits, neutral="ignore")[mask], (p[..., 2] / (p[..., 0] + p[..., 2]))[mask])


def test_neutral_ratings_are_correct_or_left_out():
    ratings = np.array([1, 0, -1, 0, np.nan])
    mask = np.array([True, True, True, True, False])
    labels, kept = step_labels(ratings, mask)
    close(labels, [1, 1, 0, 1, 0])
    np.testing.assert_array_equal(kept, mask)
    labels, kept = step_labels(ratings, mask, neutral="ignore")
    np.testing.assert_array_equal(kept, [True, False, True, False, False])
    close(labels[kept], [1, 0])


def test_one_step_and_none_are_finite():
    for mask in (np.zeros((2, 3), bool), np.eye(2, 3, dtype=bool)[:1]):
        x = jnp.where(mask, 1.0, jnp.nan)
        value, grad = jax.value_and_grad(lambda z, x=x, mask=mask: prm_loss(z, x, mask)[0])(x)
        assert np.isfinite(value) and np.isfinite(grad).all()
        assert np.count_nonzero(grad) == mask.sum()


def test_half_precision_is_widened(steps):
    half = jnp.bfloat16(np.where(steps["mask"], steps["logits"], 0))
    labels = np.where(steps["mask"], 1.0, 0.0)
    loss, _ = prm_loss(half, labels, steps["mask"])
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, prm_loss(jnp.float32(half), labels, steps["mask"])[0])


def test_errors():
    with pytest.raises(ValueError, match=r"logits has shape \(3, 4\), but mask has shape \(3,\): pass one logit"):
        prm_loss(np.zeros((3, 4)), Z, ALL)
    with pytest.raises(ValueError, match=r"labels has shape \(2,\)"):
        prm_loss(Z, np.zeros(2), ALL)
    with pytest.raises(ValueError, match="mask must be bool"):
        prm_loss(Z, Z, np.ones(3))
    with pytest.raises(ValueError, match=r"logits has shape \(3, 4\): the last axis must hold one, two or three"):
        step_probability(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="unknown neutral 'negative': choose one of positive, ignore"):
        step_labels(Z, ALL, neutral="negative")  # type: ignore[arg-type]
