"""What linear layers of all kinds share: the product, the type of its factors, the name of its result, activations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm.models.config import Activation, DType
from jaxrl_llm.sharding import on_cpu

LINEAR = "linear"
"""Name, for policies of rematerialisation, of what a linear layer gives, since they do not see the product in it."""


def clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """(u + 1)·g·σ(1.702 g) of g = min(gate, 7) and u = up within ±7 (GPT-OSS, 2025)."""
    gate, up = jnp.minimum(gate, SWIGLU_LIMIT), jnp.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1) * gate * jax.nn.sigmoid(SWIGLU_SLOPE * gate)


SWIGLU_LIMIT, SWIGLU_SLOPE = 7.0, 1.702

GATES: dict[Activation, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "clamped_swiglu": clamped_swiglu,
}
"""What an MLP makes of what its gate and its up-projection give."""


def operand(dtype: DType, x: jax.Array) -> jax.Array:
    """What is multiplied or added in `dtype`; of float32, which is wider, the values that it has there, in float32."""
    narrow = jnp.finfo(dtype)
    return x if x.dtype == dtype else jax.lax.reduce_precision(x, narrow.nexp, narrow.nmant)


SMALL = 2**18
"""Numbers, at most, of a weight whose product with a row takes less time than what surrounds it."""
_FEW = 128
"""Rows, at most, beside which packing a weight takes time that can be seen."""


def times_transposed(x: jax.Array, weight: jax.Array, *, dtype: DType | None = None) -> jax.Array:
    """x·Wᵀ of `[..., inner]` and `[out, inner]` in the type `dtype`, or that of x.

    Of few rows and a large weight it is (W·xᵀ)ᵀ on CPUs. XLA packs the right factor of a product anew each time, here
    the few rows and else the whole weight; docs/benchmarks.md has the time of decoding with and without.
    """
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    if on_cpu() and weight.size > SMALL and x.size <= _FEW * x.shape[-1]:
        # Without the barrier XLA would fold the turn into the product, which is then the other one.
        return jnp.moveaxis(jax.lax.optimization_barrier(product("oi,...i->o...", weight, x)), 0, -1)
    return product("...i,oi->...o", x, weight)
