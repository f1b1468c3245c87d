"""The KL divergence from a reference policy: estimates from one sampled token per position, and the exact sum.

The estimators are functions of d = logprobs − ref_logprobs of the sampled token. What one is worth depends
on its place: in the *reward* only its value counts, in the *loss* only its gradient, and the two disagree.
For tokens sampled from the policy itself:

| estimator | value           | factor on ∇logprobs | expected gradient                             |
|-----------|-----------------|---------------------|-----------------------------------------------|
| k1        | d               | 1                   | 0: as a loss it regularizes nothing           |
| k2        | d²/2            | d                   | that of KL(policy ‖ reference), the right one |
| k3        | e⁻ᵈ − 1 + d     | 1 − e⁻ᵈ             | that of KL(reference ‖ policy)                |
| abs       | the modulus of d| sign(d)             | neither                                       |
| k1+, k3+  | as k1, k3       | d                   | that of KL(policy ‖ reference)                |
| k3-ratio  | r · k3          | d (where r = 1)     | that of KL(policy ‖ reference), off-policy too|

So: in the reward, k1 of the *old* policy; in the loss, k2, k3+ or k3-ratio. Plain k3 is the default of
GRPO because its published numbers used it. All but k3-ratio leave out the importance weight of off-policy
tokens. `kl_exact` needs no sample, but the logits of the whole vocabulary.

Sources: J. Schulman, "Approximating KL divergence" (2020); gradients: arXiv 2510.01555 and 2512.21852.
k3-ratio is DeepSeek-V3.2's "unbiased KL" (TRL's `use_bias_correction_kl`); k1+ and k3+, straight-through,
are verl's.

These are *terms*: equal shapes in, that shape out, nothing reduced, no mask. Where padding may be not
finite, apply `fill_masked` to the inputs first.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.ratio import clamp_log_ratio, importance_ratio
from jaxrl_llm.masking import as_float, check_choice, check_same_shape, fill_unusable

KLEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "k3-ratio"]
KLDirection = Literal["reverse", "forward"]


def kl_k1(logprobs: ArrayLike, ref_logprobs: ArrayLike, *, clip: float | None = None) -> Array:
    """d: unbiased, high variance, may be negative. Gradient ∇logprobs, whose expectation is 0.

    Args:
        logprobs: Log-probabilities of the sampled tokens, any shape.
        ref_logprobs: The same under the reference; a constant.
        clip: Bound ±clip on the value (with gradient 0 beyond). None: no bound; trainers use 10.

    Returns:
        The shape of `logprobs`, in nats per token.
    """
    return _clip(_reference_log_ratio(logprobs, ref_logprobs), clip)


def kl_k2(logprobs: ArrayLike, ref_logprobs: ArrayLike, *, clip: float | None = None) -> Array:
    """d²/2: biased, low variance. Gradient d ∇logprobs, unbiased for KL(policy ‖ reference). See `kl_k1`."""
    return _clip(0.5 * _reference_log_ratio(logprobs, ref_logprobs) ** 2, clip)


def kl_k3(logprobs: ArrayLike, ref_logprobs: ArrayLike, *, clip: float | None = None) -> Array:
    """e⁻ᵈ − 1 + d, d clamped to ±20: unbiased, low variance, never negative. See `kl_k1`.

    The gradient (1 − e⁻ᵈ) ∇logprobs is that of KL(reference ‖ policy).
    """
    d = clamp_log_ratio(_reference_log_ratio(logprobs, ref_logprobs))
    return _clip(jnp.expm1(-d) + d, clip)


def kl_abs(logprobs: ArrayLike, ref_logprobs: ArrayLike, *, clip: float | None = None) -> Array:
    """|d|: a penalty on any deviation, no estimate of a KL. Gradient sign(d) ∇logprobs. See `kl_k1`."""
    return _clip(jnp.abs(_reference_log_ratio(logprobs, ref_logprobs)), clip)


def kl_k1_straight_through(logprobs: ArrayLike, ref_logprobs: ArrayLike, *, clip: float | None = None) -> Array:
    """The value of `kl_k1` with the gradient of `kl_k2`, d ∇logprobs; `clip` bounds the value only."""
    return _with_gradient_of_k2(kl_k1(logprobs, ref_logprobs, clip=clip), logprobs, ref_logprobs)


def kl_k3_straight_through(logprobs: ArrayLike, ref_logprobs: ArrayLike, *, clip: float | None = None) -> Array:
    """The value of `kl_k3` with the gradient of `kl_k2`, d ∇logprobs; `clip` bounds the value only."""
    return _with_gradient_of_k2(kl_k3(logprobs, ref_logprobs, clip=clip), logprobs, ref_logprobs)


def kl_k3_ratio_weighted(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    ref_logprobs: ArrayLike,
    *,
    clip: float | None = None,
) -> Array:
    """The product r k3 with r = π/π_old: unbiased in value and gradient for tokens sampled by the old policy.

    Gradient r (k3 + 1 − e⁻ᵈ) ∇logprobs, which is d ∇logprobs at r = 1.

    Args:
        logprobs: Log-probabilities under the policy, any shape.
        old_logprobs: The same under the policy that sampled; a constant. None: the policy itself, r = 1.
        ref_logprobs: The same under the reference; a constant.
        clip: Bound on k3, before the ratio.

    Returns:
        The shape of `logprobs`.
    """
    return importance_ratio(logprobs, old_logprobs) * kl_k3(logprobs, ref_logprobs, clip=clip)


def kl_penalty(
    logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    *,
    estimator: KLEstimator,
    old_logprobs: ArrayLike | None = None,
    clip: float | None = None,
) -> Array:
    """The estimator that a user has picked by name; the table at the top of this file says what each is for.

    Args:
        logprobs: Log-probabilities of the sampled tokens, any shape.
        ref_logprobs: The same under the reference; a constant.
        estimator: One of `KLEstimator`.
        old_logprobs: The same under the policy that sampled, for "k3-ratio". None: the policy itself.
        clip: Bound on the value. None: no bound.

    Returns:
        The shape of `logprobs`.

    Raises:
        ValueError: On an unknown estimator, unequal shapes or a negative clip.
    """
    match estimator:
        case "k1":
            return kl_k1(logprobs, ref_logprobs, clip=clip)
        case "k2":
            return kl_k2(logprobs, ref_logprobs, clip=clip)
        case "k3":
            return kl_k3(logprobs, ref_logprobs, clip=clip)
        case "abs":
            return kl_abs(logprobs, ref_logprobs, clip=clip)
        case "k1+":
            return kl_k1_straight_through(logprobs, ref_logprobs, clip=clip)
        case "k3+":
            return kl_k3_straight_through(logprobs, ref_logprobs, clip=clip)
        case "k3-ratio":
            return kl_k3_ratio_weighted(logprobs, old_logprobs, ref_logprobs, clip=clip)
    raise ValueError(f"unknown KL estimator {estimator!r}: choose one of {', '.join(get_args(KLEstimator))}")


def kl_exact(logits: ArrayLike, ref_logits: ArrayLike, *, direction: KLDirection = "reverse") -> Array:
    """The KL divergence between whole next-token distributions, summed over the vocabulary.

        Σᵥ p(v) (log p(v) − log ref(v))        "reverse", KL(policy ‖ reference)
        Σᵥ ref(v) (log ref(v) − log p(v))      "forward", KL(reference ‖ policy)

    Value and gradient have no sampling noise, at the price of logits `[..., T, V]` in memory. The forward
    direction with the old policy as the reference is the constraint of TRPO. Unlike `kl_penalty`, it does not
    depend on the token that was sampled. An entry with probability 0 under both policies adds nothing; logits that are
    no distribution (NaN) give NaN and no gradient.

    Args:
        logits: Logits (or log-probabilities) under the policy, `[..., V]`, temperature applied.
        ref_logits: The same under the reference; a constant.
        direction: From which of the two the expectation is taken.

    Returns:
        `[...]`, in nats; not masked.

    Raises:
        ValueError: On unequal shapes or an unknown direction.

    Source: Kullback & Leibler 1951; J. Schulman, "Approximating KL divergence" (2020).
    """
    check_same_shape(logits=logits, ref_logits=ref_logits)
    check_choice("direction", direction, KLDirection)
    (logits, usable), (ref_logits, ref_usable) = fill_unusable(as_float(logits)), fill_unusable(as_float(ref_logits))
    policy, reference = jax.nn.log_softmax(logits), jax.lax.stop_gradient(jax.nn.log_softmax(ref_logits))
    kl = categorical_kl(policy, reference) if direction == "reverse" else categorical_kl(reference, policy)
    return jnp.where(usable & ref_usable, kl, jnp.nan)


def categorical_kl(logprobs: Array, other_logprobs: Array) -> Array:
    """Σᵥ exp(logprobs) (logprobs − other_logprobs) of normalized log-probabilities `[..., V]`, differentiable in both.

    Entries with probability 0 under the first count as 0 · log 0 = 0, also where it only rounds to 0: a vocabulary
    may be cut with −1e9 in one model and with −∞ in the other.
    """
    probs = jnp.exp(logprobs)
    possible = probs >= jnp.finfo(probs.dtype).tiny
    gap = jnp.where(possible, logprobs, 0.0) - jnp.where(possible, other_logprobs, 0.0)
    return jnp.sum(probs * gap, axis=-1)


def _reference_log_ratio(logprobs: ArrayLike, ref_logprobs: ArrayLike) -> Array:
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return as_float(logprobs) - jax.lax.stop_gradient(as_float(ref_logprobs))


def _clip(x: Array, bound: float | None) -> Array:
    if isinstance(bound, int | float) and not bound >= 0:
        raise ValueError(f"clip is {bound}: it bounds a distance from 0 and must not be negative")
    return x if bound is None else jnp.clip(x, -bound, bound)


def _with_gradient_of_k2(value: Array, logprobs: ArrayLike, ref_logprobs: ArrayLike) -> Array:
    k2 = kl_k2(logprobs, ref_logprobs)
    # The bracket is exactly 0; adding k2 to (value − k2) would round the value.
    return jax.lax.stop_gradient(value) + (k2 - jax.lax.stop_gradient(k2))
