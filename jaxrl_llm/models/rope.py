"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and their context extensions."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.config import RopeConfig


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, both float32 `[..., H/2]`."""

    cos: jax.Array
    sin: jax.Array


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequencies of the H/2 planes, and the factor on cos and sin.

    ω_i = θ^(−2i/H), then scaled: `linear` divides all by the factor (Chen et al. 2023); `llama3` divides
    the long wavelengths, keeps the short ones and blends between (Llama 3.1); `yarn` does so by rotations
    within the original context and multiplies cos and sin by 0.1·ln(factor) + 1 (Peng et al. 2023).
    Computed in float32, as the reference implementations do, so that long positions agree.

    Returns:
        `([H/2] float32 radians per position, attention factor)`.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1.0) / np.power(np.float32(rope.theta), exponent)
    if rope.scaling == "none":
        return inverse, 1.0
    if rope.scaling == "linear":
        return inverse / np.float32(rope.factor), 1.0
    if rope.scaling == "llama3":
        return _llama3(rope, inverse), 1.0
    return _yarn(rope, inverse, head_dim), _yarn_attention_factor(rope)


def _llama3(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    length = rope.original_max_position_embeddings or 0
    wavelength = 2 * math.pi / inverse
    ramp = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - ramp) * inverse / rope.factor + ramp * inverse
    scaled = np.where(wavelength > length / rope.low_freq_factor, inverse / rope.factor, blended)
    return np.where(wavelength < length / rope.high_freq_factor, inverse, scaled).astype(np.float32)


def _yarn(rope: RopeConfig, inverse: np.ndarray, head_dim: int) -> np.ndarray:
    length = rope.original_max_position_embeddings or 0

    def dimension(rotations: float) -> float:
        """Dimension whose plane turns this often within the original context."""
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return (inverse / rope.factor * ramp + inverse * (1 - ramp)).astype(np.float32)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(coefficient: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * coefficient * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def rotation(rope: RopeConfig, head_dim: int, positions: jax.Array) -> Rotation:
    """Rotation of each of `positions` `[...]`."""
    omega, factor = frequencies(rope, head_dim)
    # As an array: where XLA's TPU compiler makes positions and sines in one loop, it writes out every step of it.
    angles = jax.lax.optimization_barrier(positions[..., None].astype(jnp.float32) * omega)
    return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x: jax.Array, turn: Rotation) -> jax.Array:
    """Turns the planes (i, i + H/2) of `x` `[..., heads, H]` by `turn` `[..., H/2]`, in float32."""
    cos, sin = turn.cos[..., None, :], turn.sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
