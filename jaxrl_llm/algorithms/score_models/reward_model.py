"""Reward models: trained on comparisons of answers, then a reward for reinforcement learning."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.algorithms.batching import MicroBatches, cut
from jaxrl_llm.algorithms.offline import Objective
from jaxrl_llm.checks import check_fields, finite, not_negative
from jaxrl_llm.losses.reward import bradley_terry_loss, last_token_score, normalize_scores, ranking_loss
from jaxrl_llm.masking import count_true
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel, one_output
from jaxrl_llm.records import Metrics, Moments


class Comparisons(NamedTuple):
    """Prompts, each with G answers, of which earlier ones are better unless `ranks` says otherwise."""

    prompt: jax.Array
    """`[P, Tp]` int32, right-padded."""
    prompt_lengths: jax.Array
    """`[P]` int32."""
    completion: jax.Array
    """`[P, G, Tc]` int32, right-padded, the end-of-sequence token included; of a pair 0 is chosen, 1 rejected."""
    mask: jax.Array
    """`[P, G, Tc]` bool: real tokens. An answer without any does not count, nor does the pair that it is in."""
    margin: jax.Array | None = None
    """`[P]`: by how much the scores of a pair shall differ, where that is known."""
    ranks: jax.Array | None = None
    """`[P, G]`: lower is better, equal ones are not compared. `None`: 0, 1, …, G − 1."""
    layout: Any = None
    """Where the texts lie in rows of tokens, if these were laid out ahead (`jaxrl_llm.data.trees`); then prompts are
    not read."""


class Answers(NamedTuple):
    """Prompts and completions to be scored."""

    prompt: jax.Array
    """`[P, Tp]` int32, right-padded."""
    prompt_lengths: jax.Array
    """`[P]` int32."""
    completion: jax.Array
    """`[P, G, Tc]` int32, right-padded."""
    mask: jax.Array
    """`[P, G, Tc]` bool: real tokens."""
    layout: Any = None
    """As of `Comparisons`."""

    @classmethod
    def of(cls, rows: Any) -> Answers:
        """Those of any record with the first four fields, comparisons or a rollout; with its layout, if it has one."""
        layout = getattr(rows, "layout", None)
        return cls(rows.prompt, rows.prompt_lengths, rows.completion, rows.mask, layout)


@dataclasses.dataclass(frozen=True)
class RewardModelObjective(Objective):
    """Scores of better answers above those of worse ones: an `Objective` for a `ScoreModel` of one output.

    Pairs are trained on `bradley_terry_loss`, more than two answers to a prompt on `ranking_loss`, each prompt's mean
    over all pairs of them. Rows have the fields of `Comparisons`; `margin` and `ranks` may be missing.

    Metrics: `accuracy`, `margin` (over pairs), `score/mean`, `score/std` (over answers).
    """

    margin: float = 0.0
    """By how much the scores of a pair shall differ at least, where rows do not say it."""
    center_coef: float = 0.0
    """Weight of the square of a pair's summed scores, which centres scores at 0; 0.01 is usual."""

    def __post_init__(self) -> None:
        """Rejects a weight that would drive scores apart."""
        check_fields("objective", self, margin=finite(self.margin), center_coef=not_negative(self.center_coef))

    @property
    def needs_reference(self) -> bool:
        """Never."""
        return False

    @property
    def whole_groups(self) -> bool:
        """The answers to a prompt are compared with each other."""
        return True

    @property
    def whole_batch(self) -> bool:
        """False."""
        return False

    def normalizer(self, rows: Any) -> jax.Array:
        """How many prompts have answers to compare."""
        return count_true(jnp.any(_comparable(rows), axis=(-2, -1)))

    def scores(self, model: ScoreModel, params: Params, texts: Any) -> jax.Array:
        """What the model makes of each token, `[P, G, Tc, 1]`."""
        return model.token_scores(params, texts)

    def loss(self, scores: jax.Array, rows: Any, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
        """The rows' part of the loss, and its metrics.

        Raises:
            ValueError: an option for pairs where answers are ranked.
        """
        valid = jnp.any(rows.mask, axis=-1)
        margin, ranks = getattr(rows, "margin", None), getattr(rows, "ranks", None)
        is_pair = valid.shape[1] == 2 and ranks is None
        if not is_pair and (margin is not None or self.margin or self.center_coef):
            raise ValueError(f"margin and center_coef are for pairs, but here {valid.shape[1]} answers are ranked")
        of_answers = last_token_score(one_output(scores), rows.mask)
        if not is_pair:
            return ranking_loss(of_answers, _ranks(rows), mask=valid, normalizer=normalizer)
        return bradley_terry_loss(
            of_answers[:, 0],
            of_answers[:, 1],
            margin=self.margin if margin is None else margin,
            center_coef=self.center_coef,
            mask=jnp.all(valid, axis=1),
            normalizer=normalizer,
        )


def _ranks(rows: Any) -> jax.Array:
    ranks, shape = getattr(rows, "ranks", None), rows.mask.shape[:2]
    return jnp.broadcast_to(jnp.arange(shape[1]), shape) if ranks is None else ranks


def _comparable(rows: Any) -> jax.Array:
    """`[P, G, G]`: answer i is to be above answer j."""
    if rows.mask.shape[1] < 2:
        raise ValueError(f"mask has shape {rows.mask.shape}: a comparison needs at least two answers to each prompt")
    ranks, valid = _ranks(rows), jnp.any(rows.mask, axis=-1)
    return (ranks[:, :, None] < ranks[:, None, :]) & valid[:, :, None] & valid[:, None, :]


# ---- Scores and rewards --------------------------------------------------------------------------


def in_pieces(
    read: Callable[[Params, Answers, Any], jax.Array], plan: MicroBatches | None
) -> Callable[[Params, Any], jax.Array]:
    """The function `(params, rows) -> [P, G, …]` that reads completions in pieces, to save memory.

    Args:
        read: `(params, answers, texts) -> [P, G, …]`, which looks at each completion by itself.
        plan: the pieces.

    Returns:
        A function of parameters and any record with the fields of `Answers`, such as a `Rollout`.
    """
    plan = plan or MicroBatches()

    def all_pieces(params: Params, rows: Any) -> jax.Array:
        return cut(Answers.of(rows), plan).map(functools.partial(read, params))

    return all_pieces


def make_score_pass(model: ScoreModel, *, plan: MicroBatches | None = None) -> Callable[[Params, Any], jax.Array]:
    """The pure function `(params, rows) -> [P, G]` that scores completions; see `in_pieces`."""
    return in_pieces(lambda params, answers, texts: model.scores(params, texts, answers.mask), plan)


def make_score_statistics(model: ScoreModel, *, plan: MicroBatches | None = None) -> Callable[[Params, Any], Moments]:
    """The pure function `(params, rows) -> Moments` of the scores of a reference set; batches join by `merge`.

    Rows as for `make_score_pass`; completions without tokens do not count.
    """
    score_pass = make_score_pass(model, plan=plan)
    return lambda params, rows: Moments.of(score_pass(params, rows), jnp.any(rows.mask, axis=-1))


def make_reward(
    model: ScoreModel, *, statistics: Moments | None = None, clip: float | None = None, plan: MicroBatches | None = None
) -> Callable[[Params, Any], jax.Array]:
    """The pure function `(params, rollout) -> [P, G]`: a reward model as the reward of a policy.

    It may be compiled into one program with sampling and the update.

    Args:
        model: the reward model.
        statistics: `Moments` of its scores on a reference set, for rewards in units of their spread; see
            `normalize_scores`. `None`: the scores as they are.
        clip: bound on normalized rewards; `None`: no bound.
        plan: the pieces in which completions are scored, to save memory.

    Raises:
        ValueError: a bound without statistics.
    """
    if clip is not None and statistics is None:
        raise ValueError(f"clip={clip} is in units of the scores' spread: pass statistics, too")
    score_pass = make_score_pass(model, plan=plan)

    def reward(params: Params, rollout: Any) -> jax.Array:
        scores = score_pass(params, rollout)
        return scores if statistics is None else normalize_scores(scores, statistics, clip=clip)

    return reward
