"""What linear layers of all kinds share: the type of their factors, the name of what they give, the activations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm.models.config import Activation, DType

LINEAR = "linear"
"""Name, for policies of rematerialisation, of what a linear layer gives, since they do not see the product in it."""

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""Nonlinearities of an MLP's gate."""


def operand(dtype: DType, x: jax.Array) -> jax.Array:
    """What is multiplied or added in `dtype`; of float32, which is wider, the values that it has there, in float32."""
    narrow = jnp.finfo(dtype)
    return x if x.dtype == dtype else jax.lax.reduce_precision(x, narrow.nexp, narrow.nmant)
