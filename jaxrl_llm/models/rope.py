"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and their context extensions."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.config import RopeConfig


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, both float32 `[..., planes]`: H/2 of them, or fewer."""

    cos: jax.Array
    sin: jax.Array


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequencies of the planes that are turned, and the factor on cos and sin.

    ω_i = θ^(−2i/H), then scaled: `linear` divides all by the factor (Chen et al. 2023); `llama3` divides
    the long wavelengths, keeps the short ones and blends between (Llama 3.1); `yarn` does so by rotations
    within the original context and multiplies cos and sin by 0.1·ln(factor) + 1 (Peng et al. 2023); `longrope` divides
    each by a factor of its own, and multiplies cos and sin by √(1 + ln(factor) / ln(original context)) (Ding et al.
    2024). Where but a part of a head is turned, H is the size of that part.
    Computed in float32, as the reference implementations do, so that long positions agree.

    Returns:
        `([planes] float32 radians per position, attention factor)`.

    Raises:
        ValueError: as `RopeConfig.planes`.
    """
    head_dim = 2 * rope.planes(head_dim)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1.0) / np.power(np.float32(rope.theta), exponent)
    if rope.scaling == "none":
        return inverse, 1.0
    if rope.scaling == "linear":
        return inverse / np.float32(rope.factor), 1.0
    if rope.scaling == "llama3":
        return _llama3(rope, inverse), 1.0
    if rope.scaling == "longrope":
        return _longrope(rope, head_dim), _longrope_attention_factor(rope)
    return _yarn(rope, inverse, head_dim), _yarn_attention_factor(rope)


def _llama3(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    length = rope.original_max_position_embeddings or 0
    wavelength = 2 * math.pi / inverse
    ramp = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - ramp) * inverse / rope.factor + ramp * inverse
    scaled = np.where(wavelength > length / rope.low_freq_factor, inverse / rope.factor, blended)
    return np.where(wavelength < length / rope.high_freq_factor, inverse, scaled).astype(np.float32)


def _longrope(rope: RopeConfig, head_dim: int) -> np.ndarray:
    factors = np.array(rope.long_factors if rope.long else rope.short_factors, np.float32)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1.0) / (factors * np.power(np.float32(rope.theta), exponent))


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    original = rope.original_max_position_embeddings or 0
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))


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


@jax.custom_vjp
def rotate(x: jax.Array, turn: Rotation) -> jax.Array:
    """Turns the planes (i, i + R) of `x` `[..., heads, H]` by `turn` `[..., R]`, in float32; the rest stays.

    The derivative by `x` turns back; `turn` has none.
    """
    return _turned(x, turn)


def _turned(x: jax.Array, turn: Rotation) -> jax.Array:
    cos, sin = turn.cos[..., None, :], turn.sin[..., None, :]
    planes = cos.shape[-1]
    ends = [end for end in (planes, 2 * planes) if end < x.shape[-1]]
    first, second, *rest = jnp.split(x.astype(jnp.float32), ends, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, *rest], axis=-1)
    return turned.astype(x.dtype)


def _rotate_forward(x: jax.Array, turn: Rotation) -> tuple[jax.Array, Rotation]:
    return _turned(x, turn), turn


def _rotate_backward(turn: Rotation, gradient: jax.Array) -> tuple[jax.Array, None]:
    # Plain, so that it can be transposed: the Fisher-vector products of a trust region are derivatives of derivatives.
    return _turned(gradient, Rotation(turn.cos, -turn.sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)
