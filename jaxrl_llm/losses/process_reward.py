"""Process reward models, which score each step of a solution and learn from labels of the steps."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.masking import as_float, check_choice, check_mask, fill_masked
from jaxrl_llm.records import Mean, Metrics

NeutralSteps = Literal["positive", "ignore"]


def step_labels(ratings: ArrayLike, mask: ArrayLike, *, neutral: NeutralSteps = "positive") -> tuple[Array, Array]:
    """Turns ratings good, neutral and bad into the labels and the mask that `prm_loss` takes.

        1 → 1,  0 → 1 (or masked),  −1 → 0

    Unlike `step_probability`, which leaves it to the head what neutral is, it decides that before training.

    Args:
        ratings: −1, 0 or 1 at the steps, any shape (the ratings of PRM800K).
        mask: Bool, of the same shape, True at the steps that have one.
        neutral: "positive" counts a neutral step as correct, "ignore" leaves it out.

    Returns:
        Labels (float32, 0 or 1) and mask.

    Raises:
        ValueError: On unequal shapes, a mask that is not bool or an unknown option.

    Source: Lightman et al. 2023, "Let's verify step by step" (2305.20050).
    """
    check_choice("neutral", neutral, NeutralSteps)
    mask = check_mask(mask, ratings=ratings)
    ratings = fill_masked(ratings, mask)
    if neutral == "ignore":
        mask = mask & (ratings != 0)
    return jnp.where(mask & (ratings >= 0), 1.0, 0.0), mask


def step_probability(logits: ArrayLike, *, neutral: NeutralSteps = "positive") -> Array:
    """The probability that a step is correct, from the logits of a process reward model.

        σ(z)                     one class
        p₁                       two: wrong, correct
        p₁ + p₂                  three: bad, neutral, good, with neutral steps counted as correct
        p₂ / (p₀ + p₂)           the same, with neutral steps ignored

    Unlike `last_token_score`, it is a number for each step; `jaxrl_llm.advantages` turns them into one score or
    into rewards.

    Args:
        logits: `[..., 1]`, `[..., 2]` or `[..., 3]`, the classes along the last axis.
        neutral: What a neutral step counts as; for three classes.

    Returns:
        `[...]`, in [0, 1].

    Raises:
        ValueError: On another number of classes or an unknown option.

    Source: Lightman et al. 2023, "Let's verify step by step" (2305.20050).
    """
    check_choice("neutral", neutral, NeutralSteps)
    logits = as_float(logits)
    return jax.nn.sigmoid(_correct_against_wrong(logits, neutral))


def prm_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    *,
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """The loss of a process reward model: cross-entropy at the ends of the steps of a solution.

        Agg[ softplus(z) − y z ]        z the logit of "correct" against "wrong", y the label

    It is the cross-entropy of a classifier of tokens with two classes, and that of the two reserved tokens of a
    vocabulary of which only these compete. Labels may be hard (people, or whether any of several completions of
    the step's prefix is right) or soft (the share of them that is right). Unlike `bradley_terry_loss` it learns
    from absolute labels, and unlike a loss of tokens it averages over all *steps* of the batch by default; with
    "seq-mean-token-mean" over solutions of the mean over their steps.

    Args:
        logits: z `[..., T]`; or of classes, `[..., T, 2]` (wrong, correct) or `[..., T, 3]` (bad, neutral, good).
            T are the tokens of solutions, or their steps.
        labels: `[..., T]`: y in [0, 1]; for three classes the number of the class, 0, 1 or 2.
        mask: Bool `[..., T]`, True at the ends of steps that have a label; whatever is elsewhere is ignored.
        aggregation: See `jaxrl_llm.losses.aggregate`, with steps for tokens, also for the arguments that follow.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        max_length: Constant of the aggregation "seq-mean-token-sum-norm".
        segment_ids: Integers `[..., T]` where rows hold several packed solutions.
        group_ids: Labels `[...]` of the rows, for the group modes.
        count_empty: Whether sequences without a valid token count.

    Returns:
        The loss, a float32 scalar, and metrics over the labelled steps: `accuracy` (the likelier side is that of the
        label, or the class is), `step/prob_mean` (`step_probability`, neutral counted as correct).

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: Lightman et al. 2023, "Let's verify step by step" (2305.20050); soft labels: Wang et al. 2023,
        "Math-Shepherd" (2312.08935).
    """
    mask = check_mask(mask, labels=labels, segment_ids=segment_ids)
    labels = jax.lax.stop_gradient(fill_masked(labels, mask))
    logits = as_float(logits)
    if logits.shape == mask.shape:
        logits = logits[..., None]
    if logits.shape[:-1] != mask.shape or logits.shape[-1] > 3:
        raise ValueError(
            f"logits has shape {logits.shape}, but mask has shape {mask.shape}: "
            "pass one logit for each position, or a last axis of two or three classes"
        )
    logits = jnp.where(mask[..., None], logits, 0.0)
    if logits.shape[-1] == 3:
        logprobs = jax.nn.log_softmax(logits)
        losses = -jnp.sum(jnp.where(labels[..., None] == jnp.arange(3), logprobs, 0.0), axis=-1)
        correct = jnp.argmax(logits, axis=-1) == labels
    else:
        z = _correct_against_wrong(logits, "positive")
        losses = jax.nn.softplus(z) - labels * z
        correct = (z > 0) == (labels > 0.5)
    loss = aggregate(
        losses,
        mask,
        mode=aggregation,
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )
    probability = jax.lax.stop_gradient(step_probability(logits))
    return loss, {"accuracy": Mean.of(correct, mask), "step/prob_mean": Mean.of(probability, mask)}


def _correct_against_wrong(logits: Array, neutral: NeutralSteps) -> Array:
    """The log-odds of a correct step, from the logits of one to three classes."""
    match logits.shape[-1:]:
        case (1,):
            return logits[..., 0]
        case (2,):
            return logits[..., 1] - logits[..., 0]
        case (3,):
            correct = logits[..., 2] if neutral == "ignore" else jnp.logaddexp(logits[..., 1], logits[..., 2])
            return correct - logits[..., 0]
    raise ValueError(f"logits has shape {logits.shape}: the last axis must hold one, two or three classes")
