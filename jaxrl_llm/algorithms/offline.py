"""Training on given rows: one optimizer step of any objective that samples nothing, and its metrics on held-out rows.

Supervised fine-tuning, reward models and preference optimisation differ in their `Objective` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import chex
import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.algorithms.batching import UpdateConfig, map_groups, split_groups
from jaxrl_llm.algorithms.gradient import make_gradient_step, spread
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import reference_of
from jaxrl_llm.records import Metrics
from jaxrl_llm.sharding import row_shards
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
        """Whether the G completions of a prompt must be computed together (a preference pair)."""
        ...

    def normalizer(self, rows: Any) -> Any:
        """The denominators, a tree of scalars, that all micro-batches of one step share."""
        ...

    def loss(self, model: Any, params: Params, rows: Any, normalizer: Any) -> tuple[jax.Array, Metrics]:
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
    *,
    micro_batches: int = 1,
) -> OfflineStep:
    """The pure function `(state, rows, reference=None) -> (state, metrics)` that makes one optimizer step.

    Compile and call it under `jax.set_mesh`, where there is a mesh: it splits rows over that.

    Args:
        model: a `Transformer`, or what the objective reads in its place (`ScoreModel`).
        optimizer: an optax transformation.
        objective: what it is trained towards.
        micro_batches: pieces in which the gradient is accumulated.

    Returns:
        A function of `TrainState`, rows, and the parameters of the reference: read only if the objective needs one and
        the rows do not bring its log-probs; `None`: those of the state without its adapters, if it has any. Rows whose
        arrays do not fit together raise AssertionError when it is traced.
    """
    plan, reference_logprobs = UpdateConfig(micro_batches=micro_batches), make_reference_pass(model, micro_batches)

    def loss(params: Params, rows: Any, normalizer: Any) -> tuple[jax.Array, Metrics]:
        return objective.loss(model, params, rows, normalizer)

    gradient_step = make_gradient_step(loss, optimizer, micro_batches)

    def offline_step(
        state: TrainState, rows: Any, reference: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        _check_rows(rows)
        rows = with_reference(objective, rows, reference_of(state.params, reference), reference_logprobs)
        rows = _prepared(objective, rows, state.params, reference_logprobs)
        prompts, group = rows.mask.shape[:2]
        split = plan.group_split(prompts, group, row_shards(), whole_groups=objective.whole_groups)
        carry = (state.params, state.opt_state)
        (params, opt_state), metrics = gradient_step(carry, split_groups(rows, split), objective.normalizer(rows))
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {name: record.value() for name, record in metrics.items()}

    return offline_step


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
    reference_logprobs = make_reference_pass(model, 1)

    def evaluation(
        params: Params, rows: Any, reference: Params | None = None, normalizer: Any = None
    ) -> tuple[jax.Array, Metrics]:
        _check_rows(rows)
        rows = with_reference(objective, rows, reference_of(params, reference), reference_logprobs)
        rows = spread(_prepared(objective, rows, params, reference_logprobs))
        own = objective.normalizer(rows)
        if normalizer is not None:
            own = jax.tree.map(lambda mine, given: given if isinstance(mine, jax.Array) else mine, own, normalizer)
        return objective.loss(model, params, rows, own)

    return evaluation


def make_reference_pass(model: Any, micro_batches: int) -> Callable[[Params, Any], jax.Array]:
    """The pure function from parameters and rows to the log-probs `[P, G, Tc]` of all their tokens.

    To be compiled by itself where a reference is computed once ahead of training; part of the step otherwise.
    """
    scores, plan = Scorer(model), UpdateConfig(micro_batches=micro_batches)

    def logprobs(params: Params, rows: Any) -> jax.Array:
        given = map_groups(lambda part: scores(params, part).logprobs, rows, plan)
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
