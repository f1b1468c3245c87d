"""Reward models learn whom to prefer, on any number of pieces and devices, and become rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.score_models.reward_model import (
    Comparisons,
    RewardModelObjective,
    make_reward,
    make_score_pass,
    make_score_statistics,
)
from jaxrl_llm.losses.reward import bradley_terry_loss, ranking_loss
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.types import Rollout

EOS, VOCABULARY, WIDTH = 2, 16, 6


@pytest.fixture(scope="module")
def model(tiny_config: Callable[..., Any]) -> ScoreModel:
    return ScoreModel(Transformer(tiny_config()))


@pytest.fixture(scope="module")
def params(model: ScoreModel, lively_params: Callable[..., Params]) -> Params:
    return lively_params(model)


def comparisons(rollout: Rollout, **changes: Any) -> Comparisons:
    return Comparisons(rollout.prompt, rollout.prompt_lengths, rollout.completion, np.array(rollout.mask))._replace(
        **changes
    )


@pytest.fixture(scope="module")
def pairs(make_rollout: Callable[..., Rollout]) -> Comparisons:
    """Eight pairs with margins, of which the last lacks its rejected answer."""
    rows = comparisons(make_rollout(prompts=8, group=2), margin=np.linspace(0, 1, 8, dtype=np.float32))
    rows.mask[-1, 1] = False
    return rows


OBJECTIVE = RewardModelObjective(center_coef=0.1)


@pytest.fixture(scope="module")
def whole(model, params, pairs, step_of_score_model) -> tuple[Params, dict[str, float]]:
    return step_of_score_model(model, params, pairs, OBJECTIVE)


def test_loss_is_that_of_the_scores_of_complete_pairs(model, params, pairs, whole):
    @jax.jit
    def plain(params: Params) -> tuple[tuple[jax.Array, Any], Params]:
        def loss(params: Params) -> tuple[jax.Array, Any]:
            scores = model.scores(params, pairs, pairs.mask)[:-1]
            value, metrics = bradley_terry_loss(*scores.T, margin=pairs.margin[:-1], center_coef=0.1)
            return value, {name: record.value() for name, record in metrics.items()}

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, metrics), gradient = plain(params)
    chex.assert_trees_all_close(whole[0], gradient, rtol=0, atol=1e-5)
    assert whole[1]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics.keys() == {"accuracy", "margin", "score/mean", "score/std"}
    assert {name: whole[1][name] for name in metrics} == pytest.approx(jax.tree.map(float, metrics), rel=1e-4)


def test_micro_batches_do_not_change_the_gradient(model, params, pairs, whole, step_of_score_model):
    gradient, metrics = step_of_score_model(model, params, pairs, OBJECTIVE, micro_batches=4)
    chex.assert_trees_all_close(gradient, whole[0], rtol=0, atol=1e-5)
    assert metrics == pytest.approx(whole[1], rel=1e-4)


def test_mesh_does_not_change_the_gradient(model, params, pairs, whole, step_of_score_model):
    with jax.set_mesh(make_mesh()):
        gradient, metrics = step_of_score_model(model, params, pairs, OBJECTIVE)
    chex.assert_trees_all_close(gradient, whole[0], rtol=0, atol=1e-5)
    assert metrics == pytest.approx(whole[1], rel=1e-4)


def test_pairs_are_never_torn(model, params, pairs, step_of_score_model):
    with pytest.raises(ValueError, match="without cutting groups"):
        step_of_score_model(model, params, pairs, OBJECTIVE, micro_batches=16)


@pytest.mark.parametrize("given", [True, False], ids=["ranks", "in_order"])
def test_more_answers_are_ranked(given, model, params, make_rollout):
    """Ranks count, ties are no pairs, and without ranks the first answer is the best."""
    rows = comparisons(make_rollout(group=3), ranks=np.array([[2, 1, 1], [1, 2, 3], [1, 1, 1], [3, 2, 1]]))
    expected_ranks = rows.ranks if given else np.tile([0, 1, 2], (4, 1))
    rows = rows if given else rows._replace(ranks=None)
    objective = RewardModelObjective()
    normalizer = objective.normalizer(rows)
    assert int(normalizer) == (3 if given else 4)
    value, metrics = jax.jit(lambda p: objective.loss(objective.scores(model, p, rows), rows, normalizer))(params)
    expected, _ = ranking_loss(jax.jit(model.scores)(params, rows, rows.mask), expected_ranks)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert int(metrics["accuracy"].count) == (2 + 3 + 3 if given else 12)


def test_options_that_do_not_fit_raise(model, params, make_rollout):
    three, one = comparisons(make_rollout(group=3)), comparisons(make_rollout(group=1))
    with pytest.raises(ValueError, match="are for pairs, but here 3 answers"):
        jax.eval_shape(lambda p: RewardModelObjective(margin=1.0).loss(model.token_scores(p, three), three, 1), params)
    with pytest.raises(ValueError, match="at least two answers"):
        RewardModelObjective().normalizer(one)
    with pytest.raises(ValueError, match="center_coef=-1"):
        RewardModelObjective(center_coef=-1)
    with pytest.raises(ValueError, match=r"clip=5.0 .* pass statistics"):
        make_reward(model, clip=5.0)


# ---------------------------------------------------------------- scores as rewards


def test_a_reward_is_the_normalized_score_in_one_program(model, params, make_rollout):
    """On pieces and devices as on one; statistics of two halves are those of all."""
    rollout = make_rollout(prompts=4, group=4)
    scores = np.asarray(jax.jit(model.scores)(params, rollout, rollout.mask))
    gather = jax.jit(make_score_statistics(model, plan=MicroBatches(2)))
    halves = jax.tree.map(lambda x: x[:2], rollout), jax.tree.map(lambda x: x[2:], rollout)
    statistics = gather(params, halves[0]).merge(gather(params, halves[1]))
    assert float(statistics.mean) == pytest.approx(scores.mean(), rel=1e-4)
    assert float(statistics.value()) == pytest.approx(scores.std(ddof=1), rel=1e-4)
    reward = jax.jit(make_reward(model, statistics=statistics, clip=1.0))
    expected = np.clip((scores - scores.mean()) / scores.std(ddof=1), -1, 1)
    np.testing.assert_allclose(reward(params, rollout), expected, atol=1e-4)
    with jax.set_mesh(make_mesh()):
        np.testing.assert_allclose(
            jax.jit(make_score_pass(model))(params, rollout), scores, atol=1e-4 * np.abs(scores).max()
        )


# ---------------------------------------------------------------- learning


def preferred(rng: np.random.Generator, size: int) -> Comparisons:
    """Of two answers the one with more 5s is better; all end in EOS, which is also the padding."""
    count = np.array([rng.permutation(4)[:2] for _ in range(size)])
    count = -np.sort(-count, axis=1)  # the chosen one first
    lengths = np.maximum(count, rng.integers(1, WIDTH, (size, 2)))
    completion = np.full((size, 2, WIDTH), EOS)
    for place in np.ndindex(size, 2):
        body = np.r_[np.full(count[place], 5), rng.integers(6, VOCABULARY, lengths[place] - count[place])]
        completion[place][: lengths[place]] = rng.permutation(body)
    mask = np.arange(WIDTH) <= lengths[..., None]
    return Comparisons(rng.integers(0, VOCABULARY, (size, 3)), np.full(size, 3), completion, mask)


def test_a_reward_model_learns_to_tell_unseen_answers_apart(tiny_config, learn_scores):
    """From no better than a coin to nearly all, compiled once."""
    model = ScoreModel(Transformer(tiny_config(vocab_size=VOCABULARY)))
    rng = np.random.default_rng(0)
    held_out = preferred(rng, 256)
    before, after, params = learn_scores(
        model, RewardModelObjective(), preferred, held_out, learning_rate=3e-3, steps=80, rng=rng
    )
    assert before < 0.7, before  # an untrained head may well order them the wrong way round
    assert after > 0.9, (before, after)
    scores = np.asarray(jax.jit(make_score_pass(model))(params, held_out))
    assert jnp.mean(scores[:, 0] > scores[:, 1]) == pytest.approx(after)  # chosen is first


@pytest.mark.slow
def test_flipped_preferences_are_learned_just_as_well(tiny_config, learn_scores):
    """So that the accuracy above comes from what was preferred, and from nothing else."""

    def flipped(rng: np.random.Generator, size: int) -> Comparisons:
        rows = preferred(rng, size)
        return rows._replace(completion=rows.completion[:, ::-1], mask=rows.mask[:, ::-1])

    model = ScoreModel(Transformer(tiny_config(vocab_size=VOCABULARY)))
    rng = np.random.default_rng(0)
    held_out = preferred(rng, 256)
    _, after, _ = learn_scores(model, RewardModelObjective(), flipped, held_out, learning_rate=3e-3, steps=80, rng=rng)
    assert after < 0.1, after
