"""One optimizer step: a gradient over micro-batches, and what the optimizer makes of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.algorithms.batching import MicroBatches, cut
from jaxrl_llm.algorithms.leafwise import move
from jaxrl_llm.algorithms.pieces import Pieces
from jaxrl_llm.algorithms.rounding import widen
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import join, split_trainable
from jaxrl_llm.records import Mean, Metrics


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss in two parts: what a forward pass makes of texts, token by token, and what is made of that."""

    scores: Callable[[Params, Any], Any]
    """(parameters, texts) → a tree of arrays `[P, G, Tc, …]`; see `layout_of` for what texts are."""
    of_scores: Callable[[Any, Any, Any], tuple[jax.Array, Metrics]]
    """(scores, rows, normalizer) → the rows' part of the loss, and its metrics."""
    whole_groups: bool = False
    """Whether it compares the completions of a prompt."""
    whole_batch: bool = False
    """Whether it compares those of different prompts."""


Carry = tuple[Params, optax.OptState]


def make_gradient_step(
    loss: Loss, optimizer: optax.GradientTransformation, plan: MicroBatches
) -> Callable[[Carry, Any, Any], tuple[Carry, Metrics]]:
    """The function `((params, opt_state), rows, normalizer) -> ((params, opt_state), metrics)`.

    Gradients, moments and the update are float32 whatever parameters are stored in: the loss is differentiated at
    float32 copies of them, so that also a weight's gradient leaves its product in float32, before devices and pieces
    are summed. The optimizer's state says how the sum is stored again (`rounding.py`).

    The gradient is that of what is trained (`split_trainable`: of a model with adapters these and its heads, else
    everything), of which alone the optimizer keeps a state; the rest is handed on as it is.

    A gradient that is not finite changes neither parameters nor the optimizer's state, which it would spoil for
    good: the step is skipped. Metrics: `loss`, `grad_norm` (as they are), `frac_steps_skipped`, those of `loss`, and
    `perf/frac_tokens_useful`: of the tokens that are computed, those of prompts and what is read of completions.
    """

    def gradient_step(carry: Carry, rows: Any, normalizer: Any) -> tuple[Carry, Metrics]:
        (params, frozen), state = split_trainable(carry[0]), carry[1]
        gradient, value, metrics = _gradient(loss, plan, widen(params), frozen, rows, normalizer)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)
        # Not `where`, which keeps what was before beside what is after.
        params, opt_state = jax.lax.cond(
            finite,
            functools.partial(move, optimizer),
            lambda gradient, norm, params, state: (params, state),
            *(gradient, norm, params, state),
        )
        carry = join(params, frozen), opt_state
        step = {"loss": Mean.of(value), "grad_norm": Mean.of(norm), "frac_steps_skipped": Mean.of(~finite)}
        return carry, metrics | step

    return gradient_step


def _gradient(
    loss: Loss, plan: MicroBatches, params: Params, frozen: Params, rows: Any, normalizer: Any
) -> tuple[Params, jax.Array, Metrics]:
    """Gradient, loss and metrics of all rows, piece by piece.

    With the denominator of all rows given to each piece, losses and gradients of pieces add up to those of the whole.
    A loss that compares what lies in different pieces is taken of the scores of all of them, which a first pass makes;
    its derivatives by these then stand for it in each piece.
    """
    pieces = cut(rows, plan, whole_groups=loss.whole_groups)

    def scores(part: Params, texts: Any) -> Any:
        return loss.scores(join(part, frozen), texts)

    def of_piece(rows: Any, texts: Any) -> tuple[Params, jax.Array, Metrics]:
        def of_trainable(part: Params) -> tuple[jax.Array, Metrics]:
            return loss.of_scores(scores(part, texts), rows, normalizer)

        (value, metrics), gradient = jax.value_and_grad(of_trainable, has_aux=True)(params)
        return gradient, value, metrics

    useful = {"perf/frac_tokens_useful": pieces.useful} if hasattr(rows, "completion") else {}
    if not pieces.divide(whole_groups=loss.whole_groups, whole_batch=loss.whole_batch):
        gradient, value, metrics = pieces.fold(of_piece)
        return gradient, value, metrics | useful

    def of_scores(made: Any) -> tuple[jax.Array, Metrics]:
        return loss.of_scores(made, rows, normalizer)

    (value, metrics), slopes = jax.value_and_grad(of_scores, has_aux=True)(map_scores(pieces, scores, params))
    return pull_scores(pieces, scores, params, slopes), value, metrics | useful


def map_scores(pieces: Pieces, scores: Callable[[Any, Any], Any], params: Any) -> Any:
    """The scores of all rows, `[P, G, Tc, …]`."""
    return pieces.map(lambda _, texts: scores(params, texts))


def pull_scores(pieces: Pieces, scores: Callable[[Any, Any], Any], params: Any, slopes: Any) -> Any:
    """The gradient by parameters of what has these derivatives by the scores of all rows."""

    def of_slopes(_: Any, texts: Any, slopes: Any) -> Any:
        return jax.vjp(lambda params: scores(params, texts), params)[1](slopes)[0]

    return pieces.fold(of_slopes, (slopes,))
