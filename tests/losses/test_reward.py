from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.losses.reward import bradley_terry_loss, bt_prob, last_token_score, normalize_scores, ranking_loss
from jaxrl_llm.masking import length_mask
from jaxrl_llm.records import Moments


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_golden_numbers(examples):
    chosen, rejected = np.array([1.2, 0.3]), np.array([0.4, 0.9])
    close(-jnp.log(bt_prob(chosen, rejected)), examples["rm.bt_per_pair"])
    close(bradley_terry_loss(chosen, rejected)[0], examples["rm.bt"])
    close(bradley_terry_loss(chosen, rejected, margin=np.array([1.0, 0.0]))[0], examples["rm.bt_margin"])
    close(bradley_terry_loss(chosen, rejected, center_coef=0.01)[0], examples["rm.bt_centered_0p01"])


@pytest.fixture
def pairs():
    """Twelve pairs, three of which are not to count and hold NaN."""
    rng = np.random.default_rng(0)
    mask = np.arange(12) % 4 != 2
    arrays = {name: np.where(mask, rng.normal(size=12), np.nan) for name in ("chosen_scores", "rejected_scores")}
    return arrays | {"margin": np.where(mask, rng.uniform(size=12), np.nan), "mask": mask}


def bt_loop(chosen_scores, rejected_scores, margin, mask, center_coef):
    losses = []
    for i in np.flatnonzero(mask):
        gap = chosen_scores[i] - rejected_scores[i] - margin[i]
        losses.append(np.log(1 + np.exp(-gap)) + center_coef * (chosen_scores[i] + rejected_scores[i]) ** 2)
    return np.mean(losses)


@pytest.mark.parametrize("center_coef", [0.0, 0.1])
def test_the_pair_loss_equals_the_definition(check_token_loss, pairs, center_coef):
    """Pairs are to it what tokens are to a loss of tokens."""

    def loss(**arrays):
        return bradley_terry_loss(**arrays, center_coef=center_coef)

    close(loss(**pairs)[0], bt_loop(**pairs, center_coef=center_coef))
    close(loss(**pairs | {"margin": 0.5})[0], bt_loop(**pairs | {"margin": np.full(12, 0.5)}, center_coef=center_coef))
    rows = {name: x.reshape(6, 2) for name, x in pairs.items()}
    for trained in ("chosen_scores", "rejected_scores"):
        check_token_loss(loss, rows, mode="token-mean", trained=trained, packs=False)
    assert not np.any(jax.grad(lambda margin: loss(**pairs | {"margin": margin})[0])(jnp.float32(pairs["margin"])))


def test_the_metrics_of_pairs_equal_the_definition(pairs):
    chosen, rejected = pairs["chosen_scores"], pairs["rejected_scores"]
    valid = pairs["mask"]
    both = np.concatenate([chosen[valid], rejected[valid]])
    _, metrics = bradley_terry_loss(**pairs)
    expected = {
        "accuracy": (chosen > rejected)[valid].mean(),
        "margin": (chosen - rejected)[valid].mean(),
        "score/mean": both.mean(),
        "score/std": both.std(ddof=1),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        close(metrics[name].value(), value)
    halves = [bradley_terry_loss(**{n: x[half] for n, x in pairs.items()})[1] for half in (slice(5), slice(5, 12))]
    for name, value in expected.items():
        close(halves[0][name].merge(halves[1][name]).value(), value)


def test_far_scores_are_finite():
    term = jax.value_and_grad(lambda x: bradley_terry_loss(x, -x)[0])
    for score in (-1e4, 1e4):
        value, grad = term(jnp.array([score]))
        assert np.isfinite(value) and np.isfinite(grad).all()


def ranking_loop(scores, ranks, mask):
    """All pairs of each prompt; prompts without one do not count."""
    means = []
    for p in np.ndindex(scores.shape[:-1]):
        terms = [
            np.log(1 + np.exp(-(scores[p][i] - scores[p][j])))
            for i in np.flatnonzero(mask[p])
            for j in np.flatnonzero(mask[p])
            if ranks[p][i] < ranks[p][j]
        ]
        if terms:
            means.append(np.mean(terms))
    return np.mean(means)


@pytest.fixture
def ranked():
    """Six prompts with up to five answers, ties among the ranks; one prompt has one answer, and one has none."""
    rng = np.random.default_rng(0)
    mask = np.arange(5) < np.array([5, 3, 1, 4, 0, 2])[:, None]
    scores = np.where(mask, rng.normal(size=(6, 5)), np.nan)
    return {"scores": scores, "ranks": np.where(mask, rng.integers(0, 4, (6, 5)), np.nan), "mask": mask}


def test_the_ranking_loss_equals_the_definition(ranked):
    loss = jax.jit(ranking_loss)
    close(loss(**ranked)[0], ranking_loop(**ranked))
    close(loss(**{name: x.reshape(2, 3, 5) for name, x in ranked.items()})[0], ranking_loop(**ranked))
    for padding in (0.0, np.inf):
        dirty = {name: np.where(ranked["mask"], x, padding) for name, x in ranked.items() if name != "mask"}
        np.testing.assert_array_equal(loss(**dirty, mask=ranked["mask"])[0], loss(**ranked)[0])

    def of(scores):
        return ranking_loss(jnp.where(ranked["mask"], scores, jnp.nan), ranked["ranks"], mask=ranked["mask"])[0]

    clean = np.where(ranked["mask"], ranked["scores"], 0.0)
    grad = jax.grad(of)(jnp.float32(clean))
    assert np.isfinite(grad).all() and np.any(grad) and not np.any(np.asarray(grad)[~ranked["mask"]])
    singles = jax.vmap(lambda s, r, m: ranking_loss(s, r, mask=m)[0])(*(jnp.asarray(x) for x in ranked.values()))
    close(jnp.sum(singles) / np.count_nonzero(singles), ranking_loop(**ranked))
    with jax.enable_x64(True):
        check_grads(jax.jit(of), (jnp.asarray(clean),), order=1, modes=["rev"])


def test_the_ranking_loss_of_parts_adds_up(ranked):
    whole, metrics = ranking_loss(**ranked)
    prompts = sum(len(set(ranks[valid])) > 1 for ranks, valid in zip(ranked["ranks"], ranked["mask"], strict=True))
    parts = [
        ranking_loss(**{n: x[part] for n, x in ranked.items()}, normalizer=prompts) for part in (slice(2), slice(2, 6))
    ]
    close(parts[0][0] + parts[1][0], whole)
    for name, record in metrics.items():
        close(parts[0][1][name].merge(parts[1][1][name]).value(), record.value())


def test_two_answers_are_a_pair(pairs):
    chosen, rejected = (pairs[name][pairs["mask"]] for name in ("chosen_scores", "rejected_scores"))
    scores, ranks = np.stack([rejected, chosen], axis=1), np.tile([1, 0], (len(chosen), 1))
    loss, metrics = ranking_loss(scores, ranks)
    expected, of_pairs = bradley_terry_loss(chosen, rejected)
    close(loss, expected)
    for name, record in of_pairs.items():
        close(metrics[name].value(), record.value())


@pytest.mark.parametrize("loss", ["pairs", "ranking"])
def test_nothing_that_counts_is_zero(loss):
    nothing = np.zeros((2, 3), bool)
    x = jnp.full((2, 3), jnp.nan)
    term = bradley_terry_loss if loss == "pairs" else ranking_loss
    (value, metrics), grad = jax.value_and_grad(lambda s: term(s, x, mask=nothing), has_aux=True)(x)
    assert value == 0 and not np.any(grad)
    assert all(record.value() == 0 for record in metrics.values())
    tied, grad = jax.value_and_grad(lambda s: ranking_loss(s, jnp.zeros((2, 3)))[0])(jnp.ones((2, 3)))
    assert tied == 0 and not np.any(grad)


def test_the_score_is_that_of_the_last_valid_token():
    values = np.array([[1.0, 2.0, 3.0], [4.0, np.nan, np.nan], [np.nan, 5.0, np.inf], [np.nan] * 3])
    mask = np.array([[True] * 3, [True, False, False], [False, True, False], [False] * 3])
    close(last_token_score(values, mask), [3, 4, 5, 0])
    close(last_token_score(values[:2], length_mask(np.array([3, 1]), 3)), [3, 4])
    grad = jax.grad(lambda x: jnp.sum(last_token_score(x, mask)))(jnp.asarray(values))
    close(grad, [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]])
    # Also where padding is the end-of-sequence token: ids play no part.
    assert last_token_score(jnp.ones((2, 3, 4), jnp.bfloat16), np.ones((2, 3, 4), bool)).dtype == jnp.float32


def test_normalized_scores():
    reference = np.random.default_rng(0).normal(2, 3, size=100)
    statistics = Moments.of(reference[:40]).merge(Moments.of(reference[40:]))
    scores = np.array([2.0, 50.0, -50.0])
    expected = (scores - reference.mean()) / reference.std(ddof=1)
    close(normalize_scores(scores, statistics), expected)
    close(normalize_scores(scores, statistics, clip=10), np.clip(expected, -10, 10))
    assert np.isfinite(normalize_scores(scores, Moments.of(np.ones(3)))).all()


def test_errors():
    x = np.zeros(3)
    with pytest.raises(ValueError, match=r"rejected_scores has shape \(2,\), but chosen_scores has shape \(3,\)"):
        bradley_terry_loss(x, np.zeros(2))
    with pytest.raises(ValueError, match=r"margin has shape \(2,\)"):
        bradley_terry_loss(x, x, margin=np.zeros(2))
    with pytest.raises(ValueError, match="mask must be bool"):
        bradley_terry_loss(x, x, mask=x)
    with pytest.raises(ValueError, match="center_coef is -1"):
        bradley_terry_loss(x, x, center_coef=-1)
    with pytest.raises(ValueError, match=r"ranks has shape \(2,\)"):
        ranking_loss(x, np.zeros(2))
    with pytest.raises(ValueError, match=r"values has shape \(3,\)"):
        last_token_score(x, np.ones(2, bool))
    with pytest.raises(ValueError, match="clip is 0"):
        normalize_scores(x, Moments.of(x), clip=0)
