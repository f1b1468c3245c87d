"""What linear layers of all kinds share: the type of their factors, the name of what they give, the activations."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm.models.config import Activation, DType

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
