"""One optimizer step: a gradient over micro-batches, and what the optimizer makes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.algorithms.leafwise import move
from jaxrl_llm.algorithms.rounding import widen
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import join, split_trainable
from jaxrl_llm.records import Mean, Metrics
from jaxrl_llm.sharding import constrain

Loss = Callable[[Params, Any, Any], tuple[jax.Array, Metrics]]
"""(parameters, rows, normalizer) → the rows' part of the loss, and its metrics."""
Carry = tuple[Params, optax.OptState]


def make_gradient_step(
    loss: Loss, optimizer: optax.GradientTransformation, micro_batches: int
) -> Callable[[Carry, Any, Any], tuple[Carry, Metrics]]:
    """The function `((params, opt_state), rows, normalizer) -> ((params, opt_state), metrics)`.

    With the denominator of all rows given to every micro-batch, losses and gradients of the micro-batches add
    up to those of the whole. Gradients, moments and the update are float32 whatever parameters are stored in: the loss
    is differentiated at float32 copies of them, so that also a weight's gradient leaves its product in float32, before
    devices and micro-batches are summed. The optimizer's state says how the sum is stored again (`rounding.py`).

    The gradient is that of what is trained (`split_trainable`: of a model with adapters these and its heads, else
    everything), of which alone the optimizer keeps a state; the rest is handed on as it is.

    A gradient that is not finite changes neither parameters nor the optimizer's state, which it would spoil for
    good: the step is skipped. Metrics: `loss`, `grad_norm` (as they are), `frac_steps_skipped`, and those of `loss`.
    """

    def gradient_of(params: Params, frozen: Params, rows: Any, normalizer: Any) -> tuple[Params, jax.Array, Metrics]:
        def of_trainable(part: Params) -> tuple[jax.Array, Metrics]:
            return loss(join(part, frozen), rows, normalizer)

        (value, metrics), gradient = jax.value_and_grad(of_trainable, has_aux=True)(params)
        return gradient, value, metrics

    def accumulated(params: Params, frozen: Params, rows: Any, normalizer: Any) -> tuple[Params, jax.Array, Metrics]:
        def micro_step(total: Params, part: Any) -> tuple[Params, tuple[jax.Array, Metrics]]:
            gradient, value, metrics = gradient_of(params, frozen, part, normalizer)
            return jax.tree.map(jnp.add, total, gradient), (value, metrics)

        zeros = jax.tree.map(jnp.zeros_like, params)
        gradient, (values, stacked) = jax.lax.scan(micro_step, zeros, deal(rows, micro_batches))
        return gradient, jnp.sum(values), {name: record.reduce() for name, record in stacked.items()}

    def gradient_step(carry: Carry, rows: Any, normalizer: Any) -> tuple[Carry, Metrics]:
        (params, frozen), state = split_trainable(carry[0]), carry[1]
        if micro_batches == 1:
            gradient, value, metrics = gradient_of(widen(params), frozen, spread(rows), normalizer)
        else:
            gradient, value, metrics = accumulated(widen(params), frozen, rows, normalizer)
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


def spread(rows: Any) -> Any:
    """Splits rows `[R, …]` over the mesh."""
    return jax.tree.map(lambda x: constrain(x, "rows", *(None,) * (x.ndim - 1)), rows)


def deal(rows: Any, parts: int) -> Any:
    """`[R, …]` → `[parts, R/parts, …]`, row i to part i mod `parts`, so that each part spans all devices."""

    def one(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
        return constrain(x, None, "rows", *(None,) * (x.ndim - 2))

    return jax.tree.map(one, rows)


def collect(x: jax.Array) -> jax.Array:
    """The inverse of `deal`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
