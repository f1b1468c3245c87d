"""The parts of TRPO as pure functions on pytrees: the natural gradient, the trust region, line search.

The natural gradient is F⁻¹ g, with g the gradient of a surrogate objective and F the Fisher matrix of the policy;
`fisher.py` makes the products with F that are all that is needed of it, and
`conjugate_gradient.py` solves for the direction. Everything works under `jit`; vectors and sums
are float32, whatever the type of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.algorithms.trust_region.conjugate_gradient import (
    ConjugateGradient,
    Product,
    conjugate_gradient,
    damped,
    tree_dot,
)
from jaxrl_llm.algorithms.trust_region.fisher import Tree, hessian_vector_product, widen_parameters
from jaxrl_llm.masking import as_float
from jaxrl_llm.records import Mean, Metrics


def trust_region_scale(direction: Tree, product: Product, *, max_kl: ArrayLike = 0.01) -> Array:
    """The factor that makes a direction as long as the divergence allows, to second order.

        √(2 max_kl / (xᵀ F x))

    Unlike `line_search`, it trusts the quadratic model of the divergence, ½ xᵀ F x.

    Args:
        direction: x.
        product: v ↦ F v, the damped one if x was found with it.
        max_kl: Bound on the divergence.

    Returns:
        A scalar; 0 where xᵀ F x is not positive.

    Raises:
        ValueError: If the bound is not positive.

    Source: Schulman et al. 2015, "TRPO" (1502.05477).
    """
    if isinstance(max_kl, int | float) and not max_kl > 0:
        raise ValueError(f"max_kl is {max_kl}: it must be positive")
    curvature = tree_dot(direction, product(direction))
    positive = curvature > 0
    return jnp.where(positive, jnp.sqrt(2 * max_kl / jnp.where(positive, curvature, 1.0)), 0.0)


class TrustRegionStep(NamedTuple):
    """A step that makes the most of the divergence, and how it was found."""

    step: Tree
    """What to add to the parameters."""
    scale: Array
    """Its factor on the direction."""
    solver: ConjugateGradient
    """`solver.solution` is the direction, F⁻¹ g."""


def trpo_direction(
    product: Product,
    gradient: Tree,
    *,
    max_kl: ArrayLike = 0.01,
    damping: ArrayLike = 0.1,
    iterations: int = 10,
    tolerance: float = 1e-10,
) -> TrustRegionStep:
    """The natural gradient of an objective, scaled to the trust region.

        s = √(2 max_kl / (xᵀ (F + damping I) x)) · x        x ≈ (F + damping I)⁻¹ g

    Unlike `conjugate_gradient` alone, whose solution grows with the gradient, its length is fixed by how far the
    policy moves: the scale of the objective cancels, except that a gradient with ‖g‖² ≤ tolerance makes no step.

    Args:
        product: v ↦ F v, not damped.
        gradient: g of the objective that is *maximised*.
        max_kl: Bound on the divergence.
        damping: Added to the diagonal of F.
        iterations: As `conjugate_gradient`.
        tolerance: As `conjugate_gradient`.

    Returns:
        `TrustRegionStep`.

    Raises:
        ValueError: As the functions that it is made of.

    Source: Schulman et al. 2015, "TRPO" (1502.05477); defaults of OpenAI's Spinning Up.
    """
    product = damped(product, damping)
    solver = conjugate_gradient(product, gradient, iterations=iterations, tolerance=tolerance)
    scale = trust_region_scale(solver.solution, product, max_kl=max_kl)
    return TrustRegionStep(jax.tree.map(lambda x: scale * x, solver.solution), scale, solver)


class LineSearch(NamedTuple):
    """Where a line search ended."""

    params: Tree
    """The accepted parameters; exactly the old ones if none were."""
    accepted: Array
    """Bool scalar."""
    backtracks: Array
    """How often the step was shortened: the accepted index, or the number of tries if none was."""
    improvement: Array
    """Surrogate at the returned parameters minus that at the old ones; 0 if none were accepted."""
    kl: Array
    """Divergence at the returned parameters; 0 if none were accepted."""


def line_search(
    surrogate: Callable[[Tree], Array],
    kl: Callable[[Tree], Array],
    params: Tree,
    step: Tree,
    *,
    max_kl: ArrayLike = 0.01,
    tries: int = 10,
    shrink: ArrayLike = 0.8,
    kl_tolerance: ArrayLike = 1.0,
) -> LineSearch:
    """Shortens a step until it keeps what it promises.

        θ′ = θ + shrinkʲ s,  first j < tries with  kl(θ′) ≤ kl_tolerance · max_kl  and  surrogate(θ′) > surrogate(θ)

    If there is no such j, the parameters stay as they are. A try that is not finite is refused. Unlike `ppo_loss`,
    whose clip takes a token's incentive to go farther, it bounds the divergence itself.

    Args:
        surrogate: The objective that is maximised, a scalar of the parameters: Agg[r A].
        kl: The mean KL(old ‖ policy) over the same tokens with the same weights.
        params: θ.
        step: s, of the structure of `params`.
        max_kl: Bound on the divergence.
        tries: Lengths that are tried at most.
        shrink: Factor between two tries.
        kl_tolerance: Slack of the bound (1.5 in OpenAI's baselines).

    Returns:
        `LineSearch`.

    Raises:
        ValueError: If `tries` or `shrink` makes no sense.

    Source: Schulman et al. 2015, "TRPO" (1502.05477); defaults of OpenAI's Spinning Up.
    """
    if isinstance(tries, int) and tries < 1:
        raise ValueError(f"tries is {tries}: it must be at least 1")
    if isinstance(shrink, int | float) and not 0 < shrink < 1:
        raise ValueError(f"shrink is {shrink}: it must be between 0 and 1")
    before = as_float(surrogate(params))

    def moved(index: Array) -> Tree:
        length = jnp.float32(shrink) ** index
        return jax.tree.map(lambda p, s: (as_float(p) + length * s).astype(jnp.asarray(p).dtype), params, step)

    def unfinished(state: tuple) -> Array:
        index, accepted, _, _ = state
        return ~accepted & (index < tries)

    def attempt(state: tuple) -> tuple:
        index = state[0]
        there = moved(index)
        improvement, divergence = as_float(surrogate(there)) - before, as_float(kl(there))
        accepted = (improvement > 0) & (divergence <= kl_tolerance * max_kl) & jnp.isfinite(improvement)
        return jnp.where(accepted, index, index + 1), accepted, improvement, divergence

    start = (jnp.int32(0), jnp.bool_(False), jnp.zeros_like(before), _zero_like(kl, params))
    index, accepted, improvement, divergence = jax.lax.while_loop(unfinished, attempt, start)
    chosen = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), moved(index), params)
    return LineSearch(
        chosen, accepted, index, jnp.where(accepted, improvement, 0.0), jnp.where(accepted, divergence, 0.0)
    )


def trpo_step(
    surrogate: Callable[[Tree], Array],
    kl: Callable[[Tree], Array],
    params: Tree,
    *,
    product: Product | None = None,
    max_kl: ArrayLike = 0.01,
    damping: ArrayLike = 0.1,
    iterations: int = 10,
    tolerance: float = 1e-10,
    tries: int = 10,
    shrink: ArrayLike = 0.8,
    kl_tolerance: ArrayLike = 1.0,
) -> tuple[Tree, Metrics]:
    """One step of trust region policy optimization: the natural gradient, scaled, then shortened until it holds.

        maximise surrogate(θ)  subject to  kl(θ) ≤ max_kl

    With `clipped_surrogate(…, clip_low=None, clip_high=None)` aggregated and negated as the surrogate and
    `kl_exact(logits, old_logits, direction="forward")` aggregated the same way as the divergence. Unlike
    `ppo_loss`, one step uses up a batch: it goes as far as the trust region allows. Only what is in `params` moves;
    for a language model a part (adapters, the last layers) makes the four vectors of its size affordable.

    Args:
        surrogate: As `line_search`; its gradient at `params` is the one followed.
        kl: As `line_search`; its minimum, 0, must be at `params`.
        params: θ, a pytree of floating-point arrays.
        product: v ↦ F v at `params`, not damped. None: `hessian_vector_product` of `kl`.
        max_kl: Bound on the divergence.
        damping: As `trpo_direction`.
        iterations: As `conjugate_gradient`.
        tolerance: As `conjugate_gradient`.
        tries: As `line_search`.
        shrink: As `line_search`.
        kl_tolerance: As `line_search`.

    Returns:
        The new parameters, in the types of the old ones, and metrics: `trpo/accepted` (0 if the parameters had to
        stay), `trpo/backtracks`, `trpo/improvement` of the surrogate, `trpo/kl`, `trpo/step_scale`,
        `trpo/cg_residual`, `trpo/cg_iterations` and `grad_norm`.

    Raises:
        ValueError: As the functions that it is made of.

    Source: Schulman et al. 2015, "TRPO" (1502.05477); defaults of OpenAI's Spinning Up.
    """

    def hessian_product(vector: Tree) -> Tree:
        return hessian_vector_product(kl, params, vector)

    wide, objective = widen_parameters(surrogate, params)
    gradient = jax.grad(objective)(wide)
    direction = trpo_direction(
        hessian_product if product is None else product,
        gradient,
        max_kl=max_kl,
        damping=damping,
        iterations=iterations,
        tolerance=tolerance,
    )
    found = line_search(
        surrogate,
        kl,
        params,
        direction.step,
        max_kl=max_kl,
        tries=tries,
        shrink=shrink,
        kl_tolerance=kl_tolerance,
    )
    metrics = {
        "trpo/accepted": found.accepted,
        "trpo/backtracks": found.backtracks,
        "trpo/improvement": found.improvement,
        "trpo/kl": found.kl,
        "trpo/step_scale": direction.scale,
        "trpo/cg_residual": direction.solver.residual,
        "trpo/cg_iterations": direction.solver.iterations,
        "grad_norm": jnp.sqrt(tree_dot(gradient, gradient)),
    }
    return found.params, {name: Mean.of(value) for name, value in metrics.items()}


def _zero_like(function: Callable[[Tree], Array], params: Tree) -> Array:
    """0 in the type of the function's values."""
    return as_float(jnp.zeros((), jax.eval_shape(function, params).dtype))
