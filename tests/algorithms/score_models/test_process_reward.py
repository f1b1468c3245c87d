"""Process reward models learn which steps are wrong; their scores are found where steps end, and become rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.score_models.process_reward import (
    LabelledSteps,
    ProcessRewardObjective,
    make_process_reward,
    make_solution_score,
    make_step_scores,
    step_end_tokens,
)
from jaxrl_llm.algorithms.score_models.search import Prefixes
from jaxrl_llm.losses.process_reward import prm_loss
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.types import Rollout

SEPARATOR, EOS, VOCABULARY = 3, 2, 16


@pytest.fixture(scope="module")
def trunk(tiny_config: Callable[..., Any]) -> Transformer:
    return Transformer(tiny_config())


@pytest.fixture(scope="module")
def params(trunk: Transformer, lively_params: Callable[..., Params]) -> Params:
    return lively_params(ScoreModel(trunk, outputs=3, bias=True))


@pytest.fixture(scope="module")
def steps(make_rollout: Callable[..., Rollout]) -> LabelledSteps:
    """Random solutions of which about half the tokens end a step; the last one has no label."""
    rollout, rng = make_rollout(group=2), np.random.default_rng(1)
    mask = np.array(rollout.mask) & (rng.random(rollout.mask.shape) < 0.5)
    mask[-1, -1] = False
    labels = rng.integers(-1, 2, mask.shape).astype(np.float32)
    return LabelledSteps(rollout.prompt, rollout.prompt_lengths, rollout.completion, mask, labels)


def of_outputs(params: Params, outputs: int) -> Params:
    head = params["score_head"]
    return params | {"score_head": {"weight": head["weight"][:outputs], "bias": head["bias"][:outputs]}}


RATINGS = ProcessRewardObjective(ratings=True)


@pytest.fixture(scope="module")
def whole(trunk, params, steps, step_of_score_model) -> tuple[Params, dict[str, float]]:
    return step_of_score_model(ScoreModel(trunk, outputs=3, bias=True), params, steps, RATINGS)


def test_micro_batches_and_mesh_do_not_change_the_gradient(trunk, params, steps, whole, step_of_score_model):
    model = ScoreModel(trunk, outputs=3, bias=True)
    in_parts = step_of_score_model(model, params, steps, RATINGS, micro_batches=8)
    with jax.set_mesh(make_mesh()):
        on_devices = step_of_score_model(model, params, steps, RATINGS)
    for gradient, metrics in (in_parts, on_devices):
        chex.assert_trees_all_close(gradient, whole[0], rtol=0, atol=1e-5)
        assert metrics == pytest.approx(whole[1], rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "outputs", "labels", "left_out"),
    [
        (RATINGS, 3, lambda ratings: ratings + 1, None),
        (RATINGS, 2, lambda ratings: (ratings >= 0).astype(np.float32), None),
        (ProcessRewardObjective(ratings=True, neutral="ignore"), 1, lambda ratings: (ratings > 0) * 1.0, 0),
        (ProcessRewardObjective(), 1, lambda ratings: ratings, None),
        (ProcessRewardObjective(per_solution=True), 2, lambda ratings: ratings, None),
    ],
    ids=["classes", "neutral_is_correct", "neutral_is_left_out", "soft", "per_solution"],
)
def test_loss_is_that_of_the_labelled_steps(objective, outputs, labels, left_out, trunk, params, steps):
    """Labels as they are, or what ratings mean to this head; the mean over labelled steps, or over solutions."""
    model = ScoreModel(trunk, outputs=outputs, bias=True)
    soft = np.random.default_rng(2).random(steps.mask.shape).astype(np.float32)
    rows = steps if objective.ratings else steps._replace(labels=soft)
    mask = rows.mask if left_out is None else rows.mask & (rows.labels != left_out)
    own = of_outputs(params, outputs)
    loss, _ = jax.jit(lambda p: objective.loss(objective.scores(model, p, rows), rows, objective.normalizer(rows)))(own)
    logits = jax.jit(model.token_scores)(own, rows)
    aggregation = "seq-mean-token-mean" if objective.per_solution else "token-mean"
    expected, _ = prm_loss(logits, labels(rows.labels), mask, aggregation=aggregation)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    parts = [objective.normalizer(jax.tree.map(lambda x: x[part], rows)) for part in (np.s_[:1], np.s_[1:])]  # noqa: B023
    assert float(sum(parts)) == float(objective.normalizer(rows))  # it adds up over batches


def test_a_class_for_neutral_steps_cannot_be_left_out(trunk, params, steps):
    objective = ProcessRewardObjective(ratings=True, neutral="ignore")
    with pytest.raises(ValueError, match="neutral='ignore' leaves out"):
        objective.loss(jnp.zeros((*steps.mask.shape, 3)), steps, 1)


# ---------------------------------------------------------------- ends of steps, scores, rewards


class Completions(NamedTuple):
    """What of a rollout the ends of steps depend on."""

    completion: np.ndarray
    mask: np.ndarray
    finished: np.ndarray


def test_steps_end_at_separators_and_at_the_end_of_what_is_complete():
    """A cut-off step has no end; an end of sequence behind a separator is no step; ids behind the end are nothing."""
    rows = [
        ([5, 3, 6, 2, 3, 3], 4, True, [1, 3]),
        ([5, 3, 6, 7, 8, 9], 6, False, [1]),
        ([5, 4, 2, 0, 0, 0], 3, True, [1]),
        ([5, 3, 3, 2, 2, 2], 3, False, [1, 2]),
        ([2, 2, 2, 2, 2, 2], 1, True, [0]),
    ]
    completion, lengths, finished, ends = zip(*rows, strict=True)
    mask = np.arange(6) < np.array(lengths)[:, None]
    found = step_end_tokens(Completions(np.array(completion), mask, np.array(finished)), (3, 4))
    assert [np.flatnonzero(row).tolist() for row in found] == list(ends)


def test_scores_and_rewards_sit_at_the_ends_of_steps(trunk, params, make_rollout):
    """By hand, from the logits at those tokens; in pieces and on devices as at once."""
    model = ScoreModel(trunk, outputs=2, bias=True)
    own, rollout = of_outputs(params, 2), make_rollout(prompts=4, group=4)
    completion = np.where(rollout.completion % 3 == 0, SEPARATOR, rollout.completion)
    rollout = rollout.replace(completion=completion)
    logits = np.asarray(jax.jit(model.token_scores)(own, rollout))
    probability = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
    step_scores = make_step_scores(model, separators=(SEPARATOR,), max_steps=6, plan=MicroBatches(2))
    is_end = np.asarray(step_end_tokens(rollout, (SEPARATOR,)))
    assert is_end.any() and not is_end.all()

    @jax.jit
    def compute(params: Params, rollout: Rollout) -> dict[str, jax.Array]:
        return {
            "centered": make_process_reward(step_scores, kind="centered")(params, rollout),
            "progress": make_process_reward(step_scores, kind="progress")(params, rollout),
            "min": make_solution_score(step_scores, mode="min")(params, rollout),
            "last": make_solution_score(step_scores)(params, rollout),
        }

    found = compute(own, rollout)
    np.testing.assert_allclose(found["centered"], np.where(is_end, probability - 0.5, 0), atol=1e-5)
    for place in np.ndindex(4, 4):
        chosen = probability[place][is_end[place]]
        progress = np.diff(chosen, prepend=0) if len(chosen) else chosen
        np.testing.assert_allclose(np.asarray(found["progress"])[place][is_end[place]], progress, atol=1e-5)
        assert float(found["min"][place]) == pytest.approx(chosen.min() if len(chosen) else 0, abs=1e-5)
        assert float(found["last"][place]) == pytest.approx(chosen[-1] if len(chosen) else 0, abs=1e-5)
    with jax.set_mesh(make_mesh()):
        whole = jax.jit(make_step_scores(model, separators=(SEPARATOR,), max_steps=6))(own, rollout)
    np.testing.assert_allclose(jnp.sum(whole.scores, -1), np.where(is_end, probability, 0).sum(-1), atol=1e-4)


# ---------------------------------------------------------------- learning


def counting(rng: np.random.Generator, size: int) -> LabelledSteps:
    """Three steps of two numbers and a separator; a step is right if its first number is small."""
    first, second = rng.integers(4, VOCABULARY, (2, size, 1, 3))
    right = first < (VOCABULARY + 4) // 2
    ends = np.array([SEPARATOR, SEPARATOR, EOS])
    completion = np.stack([first, second, np.broadcast_to(ends, first.shape)], -1).reshape(size, 1, 9)
    labels = np.zeros(completion.shape, np.float32)
    labels[..., 2::3] = right
    mask = np.broadcast_to(np.arange(9) % 3 == 2, completion.shape)
    return LabelledSteps(rng.integers(4, VOCABULARY, (size, 2)), np.full(size, 2), completion, mask, labels)


def test_a_process_reward_model_learns_to_find_wrong_steps(tiny_config, learn_scores):
    """On unseen solutions, from no better than a coin to nearly all; compiled once."""
    model = ScoreModel(Transformer(tiny_config(vocab_size=VOCABULARY)), bias=True)
    rng = np.random.default_rng(0)
    held_out = counting(rng, 128)
    before, after, params = learn_scores(
        model, ProcessRewardObjective(), counting, held_out, learning_rate=5e-3, steps=150, rng=rng
    )
    assert before < 0.7, before
    assert after > 0.9, (before, after)

    # Where the scores of solutions are read is where the labels were, what ends a solution included.
    mask, finished = np.ones(held_out.completion.shape, bool), np.ones((128, 1), bool)
    solutions = Prefixes(held_out.prompt, held_out.prompt_lengths, held_out.completion, mask, finished)
    found = jax.jit(make_step_scores(model, separators=(SEPARATOR,), max_steps=4))(params, solutions)
    assert np.mean((found.scores[:, 0, :3] > 0.5) == held_out.labels[:, 0, 2::3]) == pytest.approx(after)
    assert not found.mask[..., 3].any()


@pytest.mark.slow
def test_flipped_labels_are_learned_just_as_well(tiny_config, learn_scores):
    """So that the accuracy above comes from the labels of the steps, and from nothing else."""

    def flipped(rng: np.random.Generator, size: int) -> LabelledSteps:
        rows = counting(rng, size)
        return rows._replace(labels=np.where(rows.mask, 1 - rows.labels, 0))

    model = ScoreModel(Transformer(tiny_config(vocab_size=VOCABULARY)), bias=True)
    rng = np.random.default_rng(0)
    held_out = counting(rng, 128)
    _, after, _ = learn_scores(
        model, ProcessRewardObjective(), flipped, held_out, learning_rate=5e-3, steps=150, rng=rng
    )
    assert after < 0.1, after
