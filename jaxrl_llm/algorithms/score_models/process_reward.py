"""Process reward models: trained on labels of the steps of solutions, then a reward of steps or a score of solutions.

A step of a solution ends at a token: at a separator, or where the solution itself ends. There the model says how
likely the step is correct.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages.process import StepRewardKind, dense_step_rewards, find_step_ends, steps_to_tokens
from jaxrl_llm.advantages.selection import StepAggregation, aggregate_step_scores
from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.offline import Objective
from jaxrl_llm.algorithms.score_models.reward_model import in_pieces
from jaxrl_llm.checks import check_fields, one_of
from jaxrl_llm.losses.aggregate import AggregationMode, aggregation_normalizer
from jaxrl_llm.losses.process_reward import NeutralSteps, prm_loss, step_labels, step_probability
from jaxrl_llm.masking import segment_last
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.records import Metrics


class LabelledSteps(NamedTuple):
    """Prompts, each with G solutions whose steps have labels."""

    prompt: jax.Array | np.ndarray
    """`[P, Tp]` int32, right-padded."""
    prompt_lengths: jax.Array | np.ndarray
    """`[P]` int32."""
    completion: jax.Array | np.ndarray
    """`[P, G, Tc]` int32, right-padded."""
    mask: jax.Array | np.ndarray
    """`[P, G, Tc]` bool: the last tokens of those steps that have a label."""
    labels: jax.Array | np.ndarray
    """`[P, G, Tc]` float32 at these: 0 to 1, the number of a class, or ratings −1, 0, 1; see the objective."""
    layout: Any = None
    """Where the texts lie in rows of tokens, if these were laid out ahead (`jaxrl_llm.data.trees`); then prompts are
    not read."""


@dataclasses.dataclass(frozen=True)
class ProcessRewardObjective(Objective):
    """Which steps are correct, by `prm_loss`: an `Objective` of `LabelledSteps` for a `ScoreModel`.

    A model of one or two outputs learns labels from 0 (wrong) to 1 (correct), hard or soft, one of three outputs the
    classes 0 (bad), 1 (neutral) and 2 (good).

    Metrics over labelled steps: `accuracy`, `step/prob_mean`.
    """

    ratings: bool = False
    """Whether labels are ratings: −1 bad, 0 neutral, 1 good. A model of three outputs learns them as classes."""
    neutral: NeutralSteps = "positive"
    """What a neutral rating is to a model of one or two outputs: correct, or left out."""
    per_solution: bool = False
    """Average over solutions the mean over their steps, in place of over all steps of the batch."""

    def __post_init__(self) -> None:
        """Rejects an unknown reading."""
        check_fields("objective", self, neutral=one_of(self.neutral, NeutralSteps))

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        return {} if self.ratings else {"neutral": "labels are no ratings; set objective.ratings, too"}

    @property
    def needs_reference(self) -> bool:
        """Never."""
        return False

    @property
    def whole_groups(self) -> bool:
        """Solutions do not need each other."""
        return False

    @property
    def whole_batch(self) -> bool:
        """False."""
        return False

    @property
    def _aggregation(self) -> AggregationMode:
        return "seq-mean-token-mean" if self.per_solution else "token-mean"

    def normalizer(self, rows: Any) -> jax.Array:
        """The number of labelled steps, or of solutions that have one."""
        return aggregation_normalizer(self._labels(rows, 1)[1], mode=self._aggregation)

    def scores(self, model: ScoreModel, params: Params, texts: Any) -> jax.Array:
        """The logits of each token, `[P, G, Tc, C]`."""
        return model.token_scores(params, texts)

    def loss(self, scores: jax.Array, rows: Any, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
        """The rows' part of the loss, and its metrics.

        Raises:
            ValueError: the model has another number of outputs.
        """
        outputs = scores.shape[-1]
        if self.ratings and self.neutral == "ignore" and outputs == 3:
            raise ValueError("neutral='ignore' leaves out what a model of three outputs has a class for")
        labels, mask = self._labels(rows, outputs)
        return prm_loss(scores, labels, mask, aggregation=self._aggregation, normalizer=normalizer)

    def _labels(self, rows: Any, outputs: int) -> tuple[jax.Array, jax.Array]:
        if not self.ratings:
            return rows.labels, rows.mask
        if outputs == 3:
            return rows.labels + 1, rows.mask
        return step_labels(rows.labels, rows.mask, neutral=self.neutral)


# ---- Steps of samples, their scores and rewards ---------------------------------------------------


def step_end_tokens(rollout: Any, separators: tuple[int, ...]) -> jax.Array:
    """Which tokens end a step: separators, and the token that ended the solution, unless a separator precedes it.

    A solution that was cut off ends in a step that is not complete, and has no end.

    Args:
        rollout: any record with `completion` and `mask` `[…, Tc]` and `finished` `[…]`.
        separators: token ids, each of which ends a step.

    Returns:
        Bool `[…, Tc]`.
    """
    completion, mask = jnp.asarray(rollout.completion), jnp.asarray(rollout.mask)
    separates = mask & jnp.isin(completion, jnp.array(separators, completion.dtype))
    precedes = jnp.pad(separates, [(0, 0)] * (separates.ndim - 1) + [(1, 0)])[..., :-1]
    return separates | (segment_last(mask) & jnp.asarray(rollout.finished)[..., None] & ~precedes)


class StepScores(NamedTuple):
    """The steps of completions, a padded list of K for each, and what a model makes of them."""

    scores: jax.Array
    """`[P, G, K]` float32: the probability that the step is correct."""
    ends: jax.Array
    """`[P, G, K]`: the index of the step's last token."""
    mask: jax.Array
    """`[P, G, K]` bool: there is such a step."""


def make_step_scores(
    model: ScoreModel,
    *,
    separators: tuple[int, ...],
    max_steps: int,
    neutral: NeutralSteps = "positive",
    plan: MicroBatches | None = None,
) -> Callable[[Params, Any], StepScores]:
    """The pure function `(params, rollout) -> StepScores`.

    Args:
        model: a process reward model.
        separators: token ids, each of which ends a step; see `step_end_tokens`.
        max_steps: K; further steps are left out.
        neutral: what a neutral step counts as, of a model of three outputs.
        plan: the pieces in which solutions are read, to save memory.
    """

    def probabilities(params: Params, _: Any, texts: Any) -> jax.Array:
        return step_probability(model.token_scores(params, texts), neutral=neutral)

    read = in_pieces(probabilities, plan)

    def step_scores(params: Params, rollout: Any) -> StepScores:
        ends, mask = find_step_ends(step_end_tokens(rollout, separators), max_steps=max_steps)
        at_ends = jnp.take_along_axis(read(params, rollout), ends, axis=-1)
        return StepScores(jnp.where(mask, at_ends, 0.0), ends, mask)

    return step_scores


def make_process_reward(
    step_scores: Callable[[Params, Any], StepScores], *, kind: StepRewardKind = "identity", temperature: float = 0.1
) -> Callable[[Params, Any], jax.Array]:
    """The pure function `(params, rollout) -> [P, G, Tc]`: each step's reward at its last token.

    It may be compiled into one program with sampling and the update.

    Args:
        step_scores: from `make_step_scores`.
        kind: what a probability is worth; see `dense_step_rewards`. Sums of "identity" make long answers better.
        temperature: of "min_form".
    """

    def reward(params: Params, rollout: Any) -> jax.Array:
        steps = step_scores(params, rollout)
        rewards = dense_step_rewards(steps.scores, steps.mask, kind=kind, temperature=temperature)
        return steps_to_tokens(rewards, steps.ends, steps.mask, rollout.completion.shape[-1])

    return reward


def make_solution_score(
    step_scores: Callable[[Params, Any], StepScores], *, mode: StepAggregation = "last"
) -> Callable[[Params, Any], jax.Array]:
    """The pure function `(params, rollout) -> [P, G]`: one score of each solution, for best-of-N, votes and search.

    Args:
        step_scores: from `make_step_scores`.
        mode: how the scores of steps become one; see `aggregate_step_scores`.
    """

    def score(params: Params, rollout: Any) -> jax.Array:
        steps = step_scores(params, rollout)
        return aggregate_step_scores(steps.scores, steps.mask, mode=mode)

    return score
