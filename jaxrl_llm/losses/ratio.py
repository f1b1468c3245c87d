"""The importance ratio of a sampled token, and where a clipped loss cuts it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.masking import as_float, check_same_shape

LOG_RATIO_LIMIT = 20.0


def clamp_log_ratio(log_ratio: ArrayLike) -> Array:
    """Clamps to ±20, so that exp stays finite; outside, the gradient is 0."""
    return jnp.clip(as_float(log_ratio), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def importance_ratio(logprobs: ArrayLike, old_logprobs: ArrayLike | None) -> Array:
    """The ratio r = π/π_old = exp(logprobs − old_logprobs), the log-ratio clamped to ±20.

    Args:
        logprobs: Log-probabilities of the sampled tokens under the policy, any shape.
        old_logprobs: The same under the policy that sampled; a constant. None: that is the policy
            itself, so that r is 1 and its gradient ∇logprobs.

    Returns:
        The shape of `logprobs`.
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    old = jax.lax.stop_gradient(as_float(logprobs if old_logprobs is None else old_logprobs))
    return jnp.exp(clamp_log_ratio(as_float(logprobs) - old))


class ClipIndicators(NamedTuple):
    """Which tokens are clipped: bool arrays, whose means over the valid tokens are the clip fractions."""

    low: Array
    """A < 0 and r < 1 − clip_low: the token was made rarer than the range allows."""
    high: Array
    """A > 0 and r > 1 + clip_high: the token was made more frequent than the range allows."""

    @property
    def region(self) -> Array:
        """Either of them: the tokens whose gradient is cut."""
        return self.low | self.high


def clip_indicators(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
) -> ClipIndicators:
    """Marks the tokens whose loss is the clipped one, strictly; arguments as for `clipped_surrogate`."""
    ratio = importance_ratio(logprobs, old_logprobs)
    advantages = per_token_advantages(advantages, ratio)
    lower, upper = clip_range(clip_low, clip_high)
    never = jnp.zeros(ratio.shape, bool)
    return ClipIndicators(
        low=never if lower is None else (ratio < lower) & (advantages < 0),
        high=never if upper is None else (ratio > upper) & (advantages > 0),
    )


def per_token_advantages(advantages: ArrayLike, logprobs: Array) -> Array:
    """Broadcasts `[...]` advantages to `[..., T]`."""
    advantages = as_float(advantages)
    if advantages.shape == logprobs.shape:
        return advantages
    if advantages.shape != logprobs.shape[:-1]:
        raise ValueError(
            f"advantages has shape {advantages.shape}, but logprobs has shape {logprobs.shape}: "
            "pass one advantage for each token, or one for each sequence"
        )
    return jnp.broadcast_to(advantages[..., None], logprobs.shape)


def clip_range(clip_low: float | None, clip_high: float | None) -> tuple[float | None, float | None]:
    """The bounds of the ratio; None where there is none."""
    return None if clip_low is None else 1 - clip_low, None if clip_high is None else 1 + clip_high
