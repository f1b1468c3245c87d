import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.selection import aggregate_step_scores, best_of_n, select_beams, weighted_vote

MODES = ["last", "min", "prod", "mean"]


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def test_golden_numbers(examples):
    probs = jax.nn.sigmoid(jnp.array([2, -1, 0.5]))
    close(probs, examples["prm.step_probs"])
    every = [aggregate_step_scores(probs, np.ones(3, bool), mode=mode) for mode in ("min", "prod", "last", "mean")]
    close(every, examples["prm.agg_min_prod_last_mean"])
    candidates = np.array([[0.9, 0.8, 0.7], [0.99, 0.3, 0.95], [0.85, 0.85, 0.85]])
    scores = {mode: aggregate_step_scores(candidates, np.ones((3, 3), bool), mode=mode) for mode in MODES}
    close(scores["min"], examples["prm.bon_scores_min"])
    close(scores["prod"], examples["prm.bon_scores_prod"])
    close(scores["last"], examples["prm.bon_scores_last"])
    close([best_of_n(scores[mode]) for mode in ("min", "prod", "last")], examples["prm.bon_pick_min_prod_last"])
    vote = weighted_vote(scores["last"], np.array([7, 9, 7]))
    close(vote.totals[:2], examples["prm.weighted_vote_answers_7_9_7_last"])
    assert vote.winner == 0


@pytest.fixture
def data():
    mask = np.arange(4) < np.array([4, 0, 1, 3, 2])[:, None]
    mask[0, 1] = False
    return {"step_scores": np.where(mask, np.random.default_rng(0).uniform(size=mask.shape), np.nan), "step_mask": mask}


@pytest.mark.parametrize("mode", MODES)
def test_aggregation_equals_the_definition(data, check_estimator, mode):
    functions = {"last": lambda p: p[-1], "min": np.min, "prod": np.prod, "mean": np.mean}
    expected = [
        functions[mode](p[held]) if held.any() else 0.0
        for p, held in zip(data["step_scores"], data["step_mask"], strict=True)
    ]
    close(aggregate_step_scores(**data, mode=mode), expected)
    check_estimator(
        lambda **kwargs: aggregate_step_scores(**kwargs, mode=mode), data, mask="step_mask", trained="step_scores"
    )


def test_product_with_an_impossible_step_is_zero():
    value, grad = jax.value_and_grad(lambda p: aggregate_step_scores(p, np.ones(2, bool), mode="prod"))(
        jnp.array([0.0, 0.5])
    )
    assert value < 1e-30
    assert np.isfinite(grad).all()


def test_best_of_n_takes_the_first_of_the_best():
    scores = np.array([[1, 3, 3], [np.nan, -5, -5], [-1, 0, 7]])
    mask = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 0]], bool)
    np.testing.assert_array_equal(best_of_n(scores, mask=mask), [1, 1, 1])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x, m: best_of_n(x, mask=m)))(scores, mask), [1, 1, 1])


def test_weighted_vote_equals_the_definition():
    rng = np.random.default_rng(0)
    answers, mask = rng.integers(0, 3, size=(6, 5)), rng.uniform(size=(6, 5)) < 0.8
    scores = np.where(mask, rng.uniform(size=(6, 5)), np.nan)
    vote = jax.jit(lambda x: weighted_vote(x, answers, mask=mask))(scores)
    for row in range(6):
        sums = {a: sum(scores[row, i] for i in np.flatnonzero(mask[row]) if answers[row, i] == a) for a in range(3)}
        close(vote.totals[row], [sums[a] if held else 0 for a, held in zip(answers[row], mask[row], strict=True)])
        assert answers[row, vote.winner[row]] == max(sums, key=lambda a: sums[a])
    majority = weighted_vote(np.ones(5), np.array([4, 2, 2, 4, 2]))
    assert majority.winner == 1
    # One that could not be scored does not win, even if all scores are 0.
    assert weighted_vote(np.zeros(3), np.arange(3), mask=np.array([False, True, True])).winner == 1


def test_errors(data):
    with pytest.raises(ValueError, match="unknown mode 'sum': choose one of last, min, prod, mean"):
        aggregate_step_scores(**data, mode="sum")
    with pytest.raises(ValueError, match=r"answers has shape \(2,\), but scores has shape \(3,\)"):
        weighted_vote(np.zeros(3), np.zeros(2, int))


def test_beams():
    scores = np.array([[0.2, 0.9, np.nan, 0.9], [0.1, 0.2, 0.3, 0.4]])
    mask = np.array([[True, True, False, True], [False, False, False, True]])
    for choose in (select_beams, jax.jit(select_beams, static_argnames="width")):
        np.testing.assert_array_equal(choose(scores, width=2, mask=mask), [[1, 1, 3, 3], [3, 3, 0, 0]])
    np.testing.assert_array_equal(select_beams(scores[1], width=4), [3, 3, 3, 3])
    np.testing.assert_array_equal(select_beams(scores[1], width=1), [3, 2, 1, 0])
    with pytest.raises(ValueError, match=r"width is 3, but scores has shape \(4,\): it must divide"):
        select_beams(scores[1], width=3)
