"""What an optimizer makes of a gradient: parameter by parameter, its state fetched from where it lies and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxrl_llm.algorithms.rounding import rounded, unrounded
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import join
from jaxrl_llm.sharding import in_host_memory, to_device_memory, to_host_memory


class Leafwise(optax.GradientTransformationExtraArgs):
    """A transformation that needs of the other parameters, to update one, only the norm of their gradient.

    `update` is given that as `grad_norm`, and a tree in which all other leaves are missing; of trees in the state that
    are like the parameters (nested dicts) likewise.
    """


def move(
    optimizer: optax.GradientTransformation, gradient: Params, norm: jax.Array, params: Params, state: Any
) -> tuple[Params, Any]:
    """Parameters and the optimizer's state after a step, of the types and in the memories that they have.

    Of a `Leafwise` optimizer whose state lies in the host's memory, one parameter is moved after the other, so that of
    the state only one parameter's part at a time is on the devices.

    Args:
        optimizer: of these parameters.
        gradient: float32.
        norm: of the gradient.
        params: before the step.
        state: of `optimizer_state`.
    """
    if not isinstance(optimizer, Leafwise):
        return _move(optimizer.update, gradient, params, state)
    update, moved = functools.partial(optimizer.update, grad_norm=norm), []
    if not any(map(in_host_memory, jax.tree.leaves(state))):
        return _move(update, gradient, params, state)
    for path, _ in jax.tree.leaves_with_path(params):
        part = _cut_state(path, state)
        if moved:  # XLA would fetch all parts at once
            part, moved[-1] = jax.lax.optimization_barrier((part, moved[-1]))
        moved.append(_move(update, _cut(path, gradient), _cut(path, params), part))
    states = [state for _, state in moved]
    state = jax.tree.map(lambda *parts: functools.reduce(join, parts), *states, is_leaf=_is_dict)
    return functools.reduce(join, [params for params, _ in moved]), state


def _move(update: Callable[..., Any], gradient: Params, params: Params, state: Any) -> tuple[Params, Any]:
    near = jax.tree.map(to_device_memory, state)
    exact, before = unrounded(params, near)
    updates, after = update(gradient, before, exact)
    params, after = rounded(optax.apply_updates(exact, updates), after, params, near)
    return params, jax.tree.map(lambda new, old: to_host_memory(new) if in_host_memory(old) else new, after, state)


def _cut(path: Any, tree: Any) -> Any:
    """The tree with one leaf alone."""
    return {path[0].key: _cut(path[1:], tree[path[0].key])} if path else tree


def _cut_state(path: Any, state: Any) -> Any:
    """The same of each tree of parameters in a state."""
    return jax.tree.map(lambda node: _cut(path, node) if _is_dict(node) else node, state, is_leaf=_is_dict)


def _is_dict(node: Any) -> bool:
    return isinstance(node, dict)
