"""Products of a policy's Fisher matrix with vectors, on pytrees of parameters.

The Fisher matrix F is the Hessian of the mean KL divergence from the policy at the present parameters. It is never
formed. What a product is made of decides what the model must support:

| product                         | from                 | differentiates                  | noise            |
|---------------------------------|----------------------|---------------------------------|------------------|
| `hessian_vector_product`        | the KL divergence    | backwards, twice (or once each) | none             |
| `gauss_newton_vector_product`   | the logits           | forwards and backwards          | none             |
| `sampled_fisher_vector_product` | log-probs of samples | forwards and backwards          | from the samples |

A model with `custom_vjp` functions (attention kernels) cannot be differentiated forwards, but its gradient can, unless
these functions call further ones of the kind. At the parameters that the divergence is taken from, the first two are
equal. Differentiating a sampled KL twice is no substitute: the Hessian of a k1 estimate is not F.

Parameters are pytrees of floating-point arrays; vectors have their structure and are float32, whatever the type of
the parameters. Dropout must be off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.aggregate import AggregationMode, aggregation_normalizer, aggregation_weights
from jaxrl_llm.masking import as_float, check_mask, check_same_shape, safe_divide

Tree = Any
"""A pytree of floating-point arrays."""


def hessian_vector_product(kl: Callable[[Tree], Array], params: Tree, vector: Tree, *, reverse: bool = True) -> Tree:
    """The Fisher-vector product as the derivative of a gradient.

        F v = ∇⟨∇D, v⟩        D = kl(params), the mean KL(old ‖ policy) with the old policy at `params`

    Unlike `gauss_newton_vector_product`, it needs the divergence alone, and away from the old policy it is the
    Hessian there and no Fisher matrix.

    Args:
        kl: Divergence as a function of the parameters, a scalar. Its token weights must be those of the surrogate.
        params: Where the Hessian is taken.
        vector: v, of the structure of `params`.
        reverse: True differentiates the gradient backwards, which works also where `custom_vjp` functions are nested.
            False differentiates it forwards, which is cheaper.

    Returns:
        F v, of the structure of `params`, float32.

    Source: Schulman et al. 2015, "TRPO" (1502.05477); Pearlmutter 1994.
    """
    wide, function = widen_parameters(kl, params)
    gradient = jax.grad(function)
    if reverse:
        return jax.vjp(gradient, wide)[1](vector)[0]
    return jax.jvp(gradient, (wide,), (vector,))[1]


def gauss_newton_vector_product(
    logits: Callable[[Tree], Array],
    params: Tree,
    vector: Tree,
    mask: ArrayLike,
    *,
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Tree:
    """The Fisher-vector product through the logits.

        F v = Agg[ Jᵀ (diag(p) − p pᵀ) J v ]        J = ∂logits/∂params, p = softmax(logits)

    Unlike `hessian_vector_product`, it is positive semi-definite wherever it is taken, and it differentiates the
    model once.

    Args:
        logits: Logits `[..., T, V]` as a function of the parameters, temperature applied.
        params: Where F is taken.
        vector: v, of the structure of `params`.
        mask: Bool `[..., T]`, True on the tokens that count, those of the surrogate (or a part, to save work).
        aggregation: How tokens are averaged; see `jaxrl_llm.losses.aggregate`.
        normalizer: Denominator of the whole batch, if these rows are a part of it: then products of parts add up.
        weights: What each token counts, `[..., T]`, in place of `aggregation` and `normalizer`: for parts of which
            these alone do not tell, such as some of the tokens of a sequence.

    Returns:
        F v, of the structure of `params`, float32.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: Schraudolph 2002; Martens 2014 (1412.1193).
    """
    wide, function = widen_parameters(logits, params)
    z, jacobian = jax.linearize(function, wide)
    weights = _token_weights(mask, z.shape[:-1], "logits", aggregation, normalizer, weights)[..., None]
    tangent = jnp.where(weights > 0, as_float(jacobian(vector)), 0.0)
    p = jax.nn.softmax(jnp.where(weights > 0, as_float(z), 0.0))
    curved = weights * p * (tangent - jnp.sum(p * tangent, axis=-1, keepdims=True))
    return jax.linear_transpose(jacobian, wide)(curved.astype(z.dtype))[0]


def sampled_fisher_vector_product(
    logprobs: Callable[[Tree], Array],
    params: Tree,
    vector: Tree,
    mask: ArrayLike,
    *,
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Tree:
    """An estimate of the Fisher-vector product from the sampled tokens alone.

        F v ≈ Agg[ ⟨∇logprobs, v⟩ ∇logprobs ]

    Unbiased if the tokens were sampled by the policy at `params`. Unlike `gauss_newton_vector_product`, whose
    expectation over tokens is exact, it has sampling noise, but needs no array over the vocabulary.

    Args:
        logprobs: Log-probabilities `[..., T]` of the sampled tokens as a function of the parameters.
        params: Where F is taken.
        vector: v, of the structure of `params`.
        mask: As `gauss_newton_vector_product`.
        aggregation: As `gauss_newton_vector_product`.
        normalizer: As `gauss_newton_vector_product`.
        weights: As `gauss_newton_vector_product`.

    Returns:
        F v, of the structure of `params`, float32.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: Amari 1998, "Natural gradient works efficiently in learning".
    """
    wide, function = widen_parameters(logprobs, params)
    values, jacobian = jax.linearize(function, wide)
    weights = _token_weights(mask, values.shape, "logprobs", aggregation, normalizer, weights)
    tangent = jnp.where(weights > 0, as_float(jacobian(vector)), 0.0)
    return jax.linear_transpose(jacobian, wide)((weights * tangent).astype(values.dtype))[0]


def widen_parameters(function: Callable[[Tree], Array], params: Tree) -> tuple[Tree, Callable[[Tree], Array]]:
    """The parameters in float32, and the function of these that narrows them to their own type first.

    Its derivatives, and hence the vectors that they are taken along, are float32.
    """
    types = jax.tree.map(lambda p: jnp.asarray(p).dtype, params)

    def of_wide(wide: Tree) -> Array:
        return function(jax.tree.map(lambda p, dtype: p.astype(dtype), wide, types))

    return jax.tree.map(as_float, params), of_wide


def _token_weights(
    mask: ArrayLike,
    shape: tuple[int, ...],
    name: str,
    aggregation: AggregationMode,
    normalizer: ArrayLike | None,
    weights: ArrayLike | None,
) -> Array:
    """What each token counts in a mean over tokens of the given shape."""
    mask = check_mask(mask)
    if mask.shape != shape:
        raise ValueError(f"mask has shape {mask.shape}, but the {name} are of {shape} tokens: they must be equal")
    if weights is not None:
        check_same_shape(weights=weights, mask=mask)
        return jnp.where(mask, as_float(weights), 0.0)
    if normalizer is None:
        normalizer = aggregation_normalizer(mask, mode=aggregation)
    return safe_divide(aggregation_weights(mask, mode=aggregation), normalizer)
