"""Keys and values in the type in which a cache keeps them, which may be less than that in which layers make them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def has_scales(dtype: Any) -> bool:
    """Whether what is kept in this type are multiples of a scale."""
    return dtype == jnp.int8


class Kept(NamedTuple):
    """Keys and values as they are kept; `None`: they are the numbers themselves."""

    key: jax.Array
    """As of `KeyValue`."""
    value: jax.Array
    """As of `KeyValue`."""
    key_scale: jax.Array | None = None
    """`[…, K, T]` float32: what a token's key in a head is to be multiplied by."""
    value_scale: jax.Array | None = None
    """`[…, K, T]` float32, of its value."""

    @classmethod
    def of(cls, key: jax.Array, value: jax.Array, dtype: Any, *, key_axis: int = -1) -> Kept:
        """In a type, which int8 is rounded to by the largest entry of each token in each head.

        Args:
            key: `[…, K, H]`, or with T behind or before H.
            value: the same, H last.
            dtype: to keep them in.
            key_axis: that of H in the keys.
        """
        if not has_scales(dtype):
            return cls(key.astype(dtype), value.astype(dtype))
        (key, key_scale), (value, value_scale) = _rounded(key, key_axis), _rounded(value, -1)
        return cls(key, value, key_scale, value_scale)


def _rounded(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The int8 and the scale with x ≈ int8 · scale with scale = max |x| / 127 along an axis; of zeros both are 0."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis) / 127
    steps = x / jnp.expand_dims(jnp.where(scale > 0, scale, 1.0), axis)
    return jnp.round(steps).astype(jnp.int8), scale
