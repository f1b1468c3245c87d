"""Conjugate gradient on pytrees: a linear system whose matrix is known by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.algorithms.trust_region.fisher import Tree
from jaxrl_llm.masking import as_float, safe_divide

Product = Callable[[Tree], Tree]
"""v ↦ F v."""


def damped(product: Product, damping: ArrayLike) -> Product:
    """The product with a damped matrix, which is better conditioned.

        v ↦ (F + damping · I) v

    Steps become shorter where F is flat, where the quadratic model of the divergence reaches least far. Unlike
    `line_search`, which shortens a step that turned out too long, it changes the direction, too.

    Args:
        product: v ↦ F v, of the whole batch (added per part of a batch, the damping would count as often).
        damping: Not negative.

    Returns:
        The damped product.

    Raises:
        ValueError: If the damping is negative.

    Source: Schulman et al. 2015, "TRPO" (1502.05477).
    """
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"damping is {damping}: it must not be negative")
    return lambda vector: jax.tree.map(lambda Fv, v: Fv + damping * v, product(vector), vector)


class ConjugateGradient(NamedTuple):
    """What conjugate gradient found."""

    solution: Tree
    residual: Array
    """‖b − F x‖², as the recurrence has it."""
    iterations: Array
    """Products that were made."""


def conjugate_gradient(
    product: Product, target: Tree, *, iterations: int = 10, tolerance: float = 1e-10
) -> ConjugateGradient:
    """Solves F x = b for a symmetric positive definite F that is known by its products.

        x = argmin ½ xᵀ F x − bᵀ x        over the span of b, F b, F² b, …

    Ends after `iterations` products, at ‖b − F x‖² ≤ tolerance, or where vᵀ F v ≤ 0 shows that F is not positive
    definite (then x is what was found so far). Unlike `jax.scipy.sparse.linalg.cg` it starts at 0, says how far it
    came, and survives an indefinite F.

    Args:
        product: v ↦ F v, on vectors of the structure of `target`.
        target: b.
        iterations: Products at most.
        tolerance: Bound on the squared norm of the residual. Absolute, as in the authors' code.

    Returns:
        `ConjugateGradient`, float32.

    Raises:
        ValueError: If a number of iterations or a tolerance makes no sense.

    Source: Hestenes & Stiefel 1952.
    """
    if isinstance(iterations, int) and iterations < 1:
        raise ValueError(f"iterations is {iterations}: it must be at least 1")
    if isinstance(tolerance, int | float) and not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}: it must not be negative")
    target = jax.tree.map(as_float, target)

    def unfinished(state: tuple) -> Array:
        _, _, _, squared, count, definite = state
        return (count < iterations) & (squared > tolerance) & definite

    def iterate(state: tuple) -> tuple:
        solution, residual, vector, squared, count, _ = state
        image = product(vector)
        curvature = tree_dot(vector, image)
        definite = curvature > 0
        length = jnp.where(definite, safe_divide(squared, curvature), 0.0)
        solution = _add_scaled(solution, length, vector)
        residual = _add_scaled(residual, -length, image)
        smaller = tree_dot(residual, residual)
        vector = _add_scaled(residual, safe_divide(smaller, squared), vector)
        return solution, residual, vector, smaller, count + 1, definite

    zeros = jax.tree.map(jnp.zeros_like, target)
    start = (zeros, target, target, tree_dot(target, target), jnp.int32(0), jnp.bool_(True))
    solution, _, _, squared, count, _ = jax.lax.while_loop(unfinished, iterate, start)
    return ConjugateGradient(solution, squared, count)


def tree_dot(one: Tree, other: Tree) -> Array:
    """The inner product of two trees, summed in float32."""
    products = jax.tree.map(lambda x, y: jnp.sum(as_float(x) * as_float(y)), one, other)
    return jax.tree.reduce(jnp.add, products, jnp.float32(0))


def _add_scaled(tree: Tree, factor: Array, other: Tree) -> Tree:
    return jax.tree.map(lambda x, y: x + factor.astype(x.dtype) * y, tree, other)
