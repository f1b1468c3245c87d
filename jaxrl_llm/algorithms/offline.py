"""Training on given rows: one optimizer step of any objective that samples nothing, and its metrics on held-out rows.

Supervised fine-tuning, reward models and preference optimisation differ in their `Objective` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import chex
import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.algorithms.batching import MicroBatches, cut, spread
from jaxrl_llm.algorithms.gradient import Loss, make_gradient_step
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import reference_of
from jaxrl_llm.records import Metrics
from jaxrl_llm.types import TrainState


class Objective(Protocol):
    """What a model is trained towards on given rows; a frozen record.

    Rows are a named tuple of arrays with at least `prompt` `[P, Tp]`, `prompt_lengths` `[P]`, `completion`
    `[P, G, Tc]` and `mask` `[P, G, Tc]`; an objective that reads a reference has `ref_logprobs` `[P, G, Tc]` or `None`
    among them. A row whose mask is empty counts for nothing.
    """

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probs under a reference."""
        ...

    @property
    def whole_groups(self) -> bool:
        """Whether the G completions of a prompt are compared (a preference pair)."""
        ...

    @property
    def whole_batch(self) -> bool:
        """Whether those of different prompts are."""
        ...

    def normalizer(self, rows: Any) -> Any:
        """The denominators, a tree of scalars, that all micro-batches of one step share."""
        ...

    def scores(self, model: Any, params: Params, texts: Any) -> Any:
        """What the loss reads of a forward pass over texts (see `layout_of`): a tree of arrays `[P, G, Tc, …]`."""
        ...

    def loss(self, scores: Any, rows: Any, normalizer: Any) -> tuple[jax.Array, Metrics]:
        """The rows' part of the loss, and its metrics."""
        ...


@runtime_checkable
class BatchObjective(Objective, Protocol):
    """An objective that reads a constant of the whole batch under the parameters before the step (KTO's baseline)."""

    def prepared(self, rows: Any, logprobs: Callable[[Any], jax.Array]) -> Any:
        """Rows with that constant; `logprobs` gives the log-probs `[P, G, Tc]` of rows, all micro-batches together."""
        ...


OfflineStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_offline_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    plan: MicroBatches | None = None,
) -> OfflineStep:
    """The pure function `(state, rows, reference=None) -> (state, metrics)` that makes one optimizer step.

    Compile and call it under `jax.set_mesh`, where there is a mesh: it splits rows over that.

    Args:
        model: a `Transformer`, or what the objective reads in its place (`ScoreModel`).
        optimizer: an optax transformation.
        objective: what it is trained towards.
        plan: the pieces in which the gradient is accumulated.

    Returns:
        A function of `TrainState`, rows, and the parameters of the reference: read only if the objective needs one and
        the rows do not bring its log-probs; `None`: those of the state without its adapters, if it has any. Rows whose
        arrays do not fit together raise AssertionError when it is traced.
    """
    plan = plan or MicroBatches()
    reference_logprobs = make_reference_pass(model, plan, temperature=_temperature(objective))
    gradient_step = make_gradient_step(loss_of(objective, model), optimizer, plan)

    def offline_step(
        state: TrainState, rows: Any, reference: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        _check_rows(rows)
        rows = with_reference(objective, rows, reference_of(state.params, reference), reference_logprobs)
        rows = _prepared(objective, rows, state.params, reference_logprobs)
        carry = (state.params, state.opt_state)
        (params, opt_state), metrics = gradient_step(carry, rows, objective.normalizer(rows))
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {name: record.value() for name, record in metrics.items()}

    return offline_step


def loss_of(objective: Objective, model: Any) -> Loss:
    """The objective's loss of a model."""
    return Loss(
        functools.partial(objective.scores, model),
        objective.loss,
        whole_groups=objective.whole_groups,
        whole_batch=objective.whole_batch,
    )


def _check_rows(rows: Any) -> None:
    """Asserts that what all rows have fits together, by shapes and types alone."""
    chex.assert_rank([rows.completion, rows.mask], 3)
    chex.assert_equal_shape([rows.completion, rows.mask])
    chex.assert_shape(rows.prompt, (len(rows.mask), None))
    chex.assert_shape(rows.prompt_lengths, (len(rows.mask),))
    chex.assert_type([rows.prompt, rows.prompt_lengths, rows.completion, rows.mask], [int, int, int, bool])


def make_offline_evaluation(model: Any, objective: Objective) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The pure function `(params, rows, reference=None, normalizer=None) -> (loss, records)`: nothing is trained.

    Rows whose mask is empty count for nothing, so that a last batch may be filled up with them. Records of several
    batches join by `merge`. Their losses add up to that of all of them, if each is given the sum of the batches'
    `objective.normalizer`; without it the loss is that of the batch. What in that tree is no array is the batch's own.
    """
    reference_logprobs = make_reference_pass(model, temperature=_temperature(objective))

    def evaluation(
        params: Params, rows: Any, reference: Params | None = None, normalizer: Any = None
    ) -> tuple[jax.Array, Metrics]:
        _check_rows(rows)
        rows = with_reference(objective, rows, reference_of(params, reference), reference_logprobs)
        rows = spread(_prepared(objective, rows, params, reference_logprobs))
        own = objective.normalizer(rows)
        if normalizer is not None:
            own = jax.tree.map(lambda mine, given: given if isinstance(mine, jax.Array) else mine, own, normalizer)
        return objective.loss(objective.scores(model, params, rows), rows, own)

    return evaluation


def _temperature(objective: Objective) -> float:
    """What log-probs are scored with, where an objective says so."""
    return getattr(objective, "temperature", 1.0)


def make_reference_pass(
    model: Any, plan: MicroBatches | None = None, *, temperature: float = 1.0
) -> Callable[[Params, Any], jax.Array]:
    """The pure function from parameters and rows to the log-probs `[P, G, Tc]` of all their tokens.

    To be compiled by itself where a reference is computed once ahead of training; part of the step otherwise.
    """
    scores, plan = Scorer(model, temperature), plan or MicroBatches()

    def logprobs(params: Params, rows: Any) -> jax.Array:
        given = cut(rows, plan).map(lambda _, texts: scores(params, texts).logprobs)
        return jnp.where(rows.mask, given, 0.0)

    return logprobs


def with_reference(
    objective: Objective, rows: Any, reference: Params | None, logprobs: Callable[[Params, Any], jax.Array]
) -> Any:
    """Rows with the log-probs under the reference, where the objective reads them and the rows do not bring them.

    Args:
        objective: what is trained.
        rows: the batch.
        reference: its parameters.
        logprobs: of `make_reference_pass`.

    Raises:
        ValueError: there is no reference, and one is needed.
        AssertionError: log-probs that the rows bring do not have the shape of their mask, or are no floats.
    """
    if not objective.needs_reference:
        return rows
    if rows.ref_logprobs is not None:
        chex.assert_equal_shape([rows.ref_logprobs, rows.mask])
        chex.assert_type(rows.ref_logprobs, float)
        return rows
    if reference is None:
        raise ValueError("this objective reads a reference: pass its parameters, or rows with ref_logprobs")
    return rows._replace(ref_logprobs=logprobs(reference, rows))


def _prepared(objective: Objective, rows: Any, params: Params, logprobs: Callable[[Params, Any], jax.Array]) -> Any:
    if not isinstance(objective, BatchObjective):
        return rows
    return objective.prepared(rows, lambda part: logprobs(jax.lax.stop_gradient(params), part))
