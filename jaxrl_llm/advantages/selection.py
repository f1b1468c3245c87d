"""Choosing among the sampled solutions of a prompt by a reward model's scores: best-of-N, guided search, vote."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.masking import (
    check_choice,
    check_mask,
    check_same_shape,
    fill_masked,
    mask_or_all,
    masked_mean,
    masked_sum,
    segment_last,
)

StepAggregation = Literal["last", "min", "prod", "mean"]


def aggregate_step_scores(step_scores: ArrayLike, step_mask: ArrayLike, *, mode: StepAggregation = "last") -> Array:
    """One score of a solution from the probabilities that its steps are right.

        last: p_K;   min: minₖ pₖ;   prod: exp(Σₖ log pₖ);   mean: Σₖ pₖ / K

    "last" is what reranking and search use; "min" is Math-Shepherd's, "prod" Let's Verify's. "prod" is hard on long
    solutions, "last" blind to early faults. Unlike `dense_step_rewards`, one number for the whole solution.

    Args:
        step_scores: `[..., K]`.
        step_mask: Bool `[..., K]`.
        mode: See above.

    Returns:
        `[...]`; 0 for a solution without a step.

    Raises:
        ValueError: On unequal shapes or an unknown mode.

    Source: Lightman et al. 2023, "Let's verify step by step" (2305.20050); Wang et al. 2023 (2312.08935).
    """
    check_choice("mode", mode, StepAggregation)
    mask = check_mask(step_mask, step_scores=step_scores)
    match mode:
        case "last":
            return masked_sum(step_scores, segment_last(mask), axis=-1)
        case "mean":
            return masked_mean(step_scores, mask, axis=-1)
        case "min":
            score = jnp.min(fill_masked(step_scores, mask, jnp.inf), axis=-1)
        case "prod":
            scores = fill_masked(step_scores, mask, 1.0)
            score = jnp.exp(jnp.sum(jnp.log(jnp.maximum(scores, jnp.finfo(scores.dtype).tiny)), axis=-1))
    return jnp.where(jnp.any(mask, axis=-1), score, 0.0)


def best_of_n(scores: ArrayLike, *, mask: ArrayLike | None = None) -> Array:
    """The index of the solution with the largest score; of equal ones, the first.

        argmaxᵢ scoreᵢ

    Unlike `weighted_vote`, it does not look at the answers.

    Args:
        scores: `[..., N]`.
        mask: Bool `[..., N]`: False for solutions that could not be scored.

    Returns:
        Integers `[...]`.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Cobbe et al. 2021, "Training verifiers to solve math word problems" (2110.14168).
    """
    return jnp.argmax(fill_masked(scores, mask_or_all(mask, scores=scores), -jnp.inf), axis=-1)


def select_beams(scores: ArrayLike, *, width: int, mask: ArrayLike | None = None) -> Array:
    """One step of guided beam search: which beams the next ones continue, the best ones `width` times each.

        the N / width beams with the largest scores, each width times

    A process reward model scores every beam (`aggregate_step_scores`), the beams chosen are continued by one step at
    a positive temperature, so that copies part, and so on until all have ended. Unlike `best_of_n`, bad solutions
    are given up before they are complete.

    Args:
        scores: `[..., N]`; of equal ones, the first is better.
        width: Continuations of a beam; it divides N.
        mask: Bool `[..., N]`: False for beams that have ended, or are copies of another. They are chosen last.

    Returns:
        Integers `[..., N]`, the best beam first.

    Raises:
        ValueError: On unequal shapes, a mask that is not bool, or a width that does not divide N.

    Source: Snell et al. 2024, "Scaling LLM test-time compute optimally" (2408.03314).
    """
    mask = mask_or_all(mask, scores=scores)
    if width < 1 or mask.shape[-1] % width:
        raise ValueError(f"width is {width}, but scores has shape {mask.shape}: it must divide the number of beams")
    order = jnp.lexsort((-fill_masked(scores, mask), ~mask))
    return jnp.repeat(order[..., : mask.shape[-1] // width], width, axis=-1)


class Vote(NamedTuple):
    """What `weighted_vote` returns."""

    totals: Array
    """`[..., N]`: the sum of the scores of all solutions with this one's answer."""
    winner: Array
    """Integers `[...]`: the first solution with the answer of the largest sum."""


def weighted_vote(scores: ArrayLike, answers: ArrayLike, *, mask: ArrayLike | None = None) -> Vote:
    """Weighted best-of-N: the answer whose solutions have the largest sum of scores.

        argmax over answers a of  Σᵢ scoreᵢ [answerᵢ = a]

    With scores of 1 it is the majority vote. Unlike `best_of_n`, many fair solutions beat one good one.

    Args:
        scores: `[..., N]`, not negative.
        answers: Integers `[..., N]`: equal numbers for equal final answers.
        mask: Bool `[..., N]`: False for solutions without a score or an answer.

    Returns:
        The sums, and the winner.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Li et al. 2022, "Making language models better reasoners" (2206.02336); Wang et al. 2022 (2203.11171).
    """
    mask = mask_or_all(mask, scores=scores)
    check_same_shape(scores=scores, answers=answers)
    answers = jnp.asarray(answers)
    same = (answers[..., :, None] == answers[..., None, :]) & mask[..., None, :]
    totals = jnp.sum(jnp.where(same, fill_masked(scores, mask)[..., None, :], 0.0), axis=-1)
    return Vote(jnp.where(mask, totals, 0.0), best_of_n(totals, mask=mask))
