"""The importance ratio of a sampled token, and how PPO's surrogate clips it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.masking import as_float, check_same_shape, per_token

LOG_RATIO_LIMIT = 20.0


def clamp_log_ratio(log_ratio: ArrayLike) -> Array:
    """Clamps to ±20, so that exp stays finite; outside, the gradient is 0."""
    return jnp.clip(as_float(log_ratio), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def importance_ratio(logprobs: ArrayLike, old_logprobs: ArrayLike | None) -> Array:
    """The importance ratio of a token: how much likelier it has become since it was sampled.

        r = π/π_old = exp(logprobs − old_logprobs)

    The log-ratio is clamped to ±20, so that r stays finite; outside, the gradient is 0. Unlike `importance_weights`,
    which compare a sampler with the learner that it serves, r has a gradient, r ∇logprobs.

    Args:
        logprobs: Log-probabilities of the sampled tokens under the policy, any shape.
        old_logprobs: The same under the policy that sampled; a constant. None: that is the policy
            itself, so that r is 1 and its gradient ∇logprobs.

    Returns:
        The shape of `logprobs`.

    Raises:
        ValueError: On unequal shapes.

    Source: Kakade & Langford 2002; Schulman et al. 2017 (1707.06347).
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    old = jax.lax.stop_gradient(as_float(logprobs if old_logprobs is None else old_logprobs))
    return jnp.exp(clamp_log_ratio(as_float(logprobs) - old))


def clipped_surrogate(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> Array:
    """The per-token loss of PPO: the policy gradient, cut off once the ratio has gone far enough.

        max(−A min(r, ratio_cap), −A clip(r, 1 − clip_low, 1 + clip_high))        ≤ −A · dual_clip if A < 0

    Here r = π/π_old = exp(logprobs − old_logprobs). A token's gradient is −A r ∇logprobs, or 0 once its ratio has
    left the clip range in the direction that A asks for. Unlike `soft_gate`, the cut is sudden: inside the range r
    weighs in full, beyond it the token has no say.

    Args:
        logprobs: Log-probabilities under the policy, `[..., T]`.
        old_logprobs: The same under the policy that sampled; a constant. None: the policy itself.
        advantages: `[..., T]`, or `[...]` with one for each sequence; a constant.
        clip_low: Distance of the lower bound from 1. None: no lower bound.
        clip_high: Distance of the upper bound from 1. None: no upper bound (both None: −A r).
        dual_clip: Bound, above 1, on the loss of tokens with A < 0, in units of −A. None: no bound.
        ratio_cap: Cap, above 1 + clip_high, on the unclipped ratio ("two-sided clipping", TRL's
            `delta`); for A < 0 it does the same as `dual_clip`. None: no cap.

    Returns:
        `[..., T]`; not masked. Where padding may be not finite, apply `fill_masked` to the inputs first.

    Raises:
        ValueError: On shapes that do not fit or bounds that make no sense.

    Source: Schulman et al. 2017, "Proximal policy optimization algorithms" (1707.06347). Asymmetric bounds: Yu et
    al. 2025 (2503.14476). Dual clip: Ye et al. 2020 (1912.09729). Two-sided: INTELLECT-2, 2025 (2505.07291).
    """
    check_clip_bounds(clip_low, clip_high, dual_clip, ratio_cap)
    ratio = importance_ratio(logprobs, old_logprobs)
    advantages = jax.lax.stop_gradient(as_float(per_token(ratio, advantages=advantages)))
    losses = -advantages * (ratio if ratio_cap is None else jnp.minimum(ratio, ratio_cap))
    if clip_low is not None or clip_high is not None:
        losses = jnp.maximum(losses, -advantages * jnp.clip(ratio, *clip_range(clip_low, clip_high)))
    if dual_clip is not None:
        losses = jnp.where(advantages < 0, jnp.minimum(losses, -advantages * dual_clip), losses)
    return losses


class ClipIndicators(NamedTuple):
    """Which tokens are clipped: bool arrays, whose means over the valid tokens are the clip fractions."""

    low: Array
    """A < 0 and r < 1 − clip_low: the token was made rarer than the range allows."""
    high: Array
    """A > 0 and r > 1 + clip_high: the token was made more frequent than the range allows."""
    dual: Array | None = None
    """A < 0 and r > dual_clip, where there is a dual clip: the loss has reached its bound."""
    cap: Array | None = None
    """A < 0 and r > ratio_cap, where there is a cap: the loss has reached its bound."""

    @property
    def region(self) -> Array:
        """Low or high: the tokens whose gradient the clip range cuts."""
        return self.low | self.high


def clip_indicators(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> ClipIndicators:
    """Marks the tokens whose gradient `clipped_surrogate` cuts, because their loss is the clipped one, strictly.

        A < 0 and r < 1 − clip_low        "low"
        A > 0 and r > 1 + clip_high       "high"
        A < 0 and r > dual_clip           "dual"
        A < 0 and r > ratio_cap           "cap"

    Their means over the valid tokens are the clip fractions that trainers log. Unlike a test of the ratio alone, a
    token that has moved against its advantage does not count, since its gradient is not cut.

    Args:
        logprobs: As `clipped_surrogate`.
        old_logprobs: As `clipped_surrogate`.
        advantages: As `clipped_surrogate`.
        clip_low: As `clipped_surrogate`.
        clip_high: As `clipped_surrogate`.
        dual_clip: As `clipped_surrogate`.
        ratio_cap: As `clipped_surrogate`.

    Returns:
        `ClipIndicators` of bool `[..., T]`; not masked.

    Raises:
        ValueError: On shapes that do not fit or bounds that make no sense.

    Source: Schulman et al. 2017, "Proximal policy optimization algorithms" (1707.06347).
    """
    check_clip_bounds(clip_low, clip_high, dual_clip, ratio_cap)
    ratio = importance_ratio(logprobs, old_logprobs)
    advantages = per_token(ratio, advantages=advantages)
    falling = advantages < 0
    lower, upper = clip_range(clip_low, clip_high)
    never = jnp.zeros(ratio.shape, bool)
    return ClipIndicators(
        low=never if lower is None else (ratio < lower) & falling,
        high=never if upper is None else (ratio > upper) & (advantages > 0),
        dual=None if dual_clip is None else (ratio > dual_clip) & falling,
        cap=None if ratio_cap is None else (ratio > ratio_cap) & falling,
    )


def clip_range(clip_low: float | None, clip_high: float | None) -> tuple[float | None, float | None]:
    """The bounds of the ratio; None where there is none."""
    return None if clip_low is None else 1 - clip_low, None if clip_high is None else 1 + clip_high


def check_clip_bounds(
    clip_low: float | None, clip_high: float | None, dual_clip: float | None, ratio_cap: float | None
) -> None:
    """Raises ValueError for plain numbers that make no sense; traced ones (a schedule) cannot be looked at."""
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if isinstance(bound, int | float) and not bound >= 0:
            raise ValueError(f"{name} is {bound}: it is a distance from 1 and must not be negative")
    if isinstance(dual_clip, int | float) and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}: it must be above 1, or it cuts the gradient at ratio 1")
    if ratio_cap is not None and clip_high is None:
        raise ValueError(f"ratio_cap is {ratio_cap}, but clip_high is None: a cap is for ratios beyond the range")
    highest = 1 + clip_high if isinstance(clip_high, int | float) else 0
    if isinstance(ratio_cap, int | float) and not ratio_cap > highest:
        raise ValueError(f"ratio_cap is {ratio_cap}: it must be above 1 + clip_high = {highest}")
