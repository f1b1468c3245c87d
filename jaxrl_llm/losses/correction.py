"""Factors for the `weights` of a policy loss: corrections for a sampler that differs from the learner, and masks.

There are three policies. The sampler's log-probs are what an inference engine reported; the old ones are what the
learner computed for the same tokens and the same parameters; the new ones are those of the policy being trained. The
ratio r of a loss corrects from old to new, the ρ = exp(old_logprobs − sampler_logprobs) of this file from sampler to
old. If a loss is given the sampler's log-probs as its old ones, r does both, and ρ must not be applied again.

Weights are `[..., T]` with 0 at masked positions, and constants. They leave the denominator of a loss as it is: a
token of weight 0 still counts. Several of them are combined by multiplying (masks by `&`).
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import check_bounds
from jaxrl_llm.losses.ratio import clamp_log_ratio
from jaxrl_llm.masking import check_mask, count_true, fill_masked, safe_divide, segment_total

CorrectionLevel = Literal["token", "sequence", "geometric"]


def importance_weights(
    old_logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    level: CorrectionLevel = "token",
    segment_ids: ArrayLike | None = None,
) -> Array:
    """The importance weights of the learner's old policy over the sampler, neither truncated nor masked.

        ρₜ = exp(old_logprobs − sampler_logprobs)        "token"
        Πₜ ρₜ                                            "sequence"
        (Πₜ ρₜ)^(1/n)                                    "geometric", n valid tokens

    Logarithms are clamped to ±20. Unlike `importance_ratio`, none of the two policies is being trained.

    Args:
        old_logprobs: Log-probabilities of the sampled tokens under the learner's old policy, `[..., T]`.
        sampler_logprobs: The same as the sampler reported them.
        mask: Bool `[..., T]`, True on the tokens that are trained.
        level: Whether each token has its own weight, or all of a sequence have one: the product or its n-th root.
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.

    Returns:
        `[..., T]`, 0 at masked positions.

    Raises:
        ValueError: On shapes that do not fit, a mask that is not bool, or an unknown level.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    if level not in get_args(CorrectionLevel):
        raise ValueError(f"unknown level {level!r}: choose one of {', '.join(get_args(CorrectionLevel))}")
    mask = check_mask(mask, old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs, segment_ids=segment_ids)
    log_weights = fill_masked(old_logprobs, mask) - fill_masked(sampler_logprobs, mask)
    if level != "token":
        log_weights = segment_total(log_weights, mask, segment_ids)
    if level == "geometric":
        log_weights = safe_divide(log_weights, segment_total(mask, mask, segment_ids))
    return jax.lax.stop_gradient(jnp.where(mask, jnp.exp(clamp_log_ratio(log_weights)), 0.0))


def tis_weights(
    old_logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    level: CorrectionLevel = "token",
    w_min: float | None = None,
    w_max: float | None = 2.0,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """Truncated importance sampling: weights with an upper bound, the usual correction for an inference engine.

        min(ρ, w_max)        and max(ρ, w_min), if given

    Unlike `mis_weights`, a token far off keeps a bounded weight instead of dropping out.

    Args:
        old_logprobs: As `importance_weights`.
        sampler_logprobs: As `importance_weights`.
        mask: As `importance_weights`.
        level: As `importance_weights`: verl and TRL have "token" and "sequence", ms-swift has "geometric".
        w_min: Lower bound. None: none.
        w_max: Upper bound. None: none.
        segment_ids: As `importance_weights`.

    Returns:
        `[..., T]`, 0 at masked positions.

    Raises:
        ValueError: As `importance_weights`, and on bounds in the wrong order.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; the truncation:
    Ionides 2008.
    """
    check_bounds(w_min, w_max)
    weights = importance_weights(old_logprobs, sampler_logprobs, mask, level=level, segment_ids=segment_ids)
    return jnp.where(mask, jnp.clip(weights, w_min, w_max), 0.0)


def mis_weights(
    old_logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    level: CorrectionLevel = "sequence",
    w_min: float | None = None,
    w_max: float | None = 3.0,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """Masked importance sampling: weights that are 0 where they leave a range.

        ρ if w_min ≤ ρ ≤ w_max, else 0

    By default a whole sequence drops out if the product of its weights is above 3. Unlike `tis_weights`, which
    truncates, what is far off does not count, since it is likely to be damaged.

    Args:
        old_logprobs: As `importance_weights`.
        sampler_logprobs: As `importance_weights`.
        mask: As `importance_weights`.
        level: As `importance_weights`.
        w_min: Lower bound. None: none.
        w_max: Upper bound. None: none.
        segment_ids: As `importance_weights`.

    Returns:
        `[..., T]`, 0 at masked positions.

    Raises:
        ValueError: As `importance_weights`, and on bounds in the wrong order.

    Source: Liu et al. 2025, "When speed kills stability: demystifying RL collapse from the training-inference
    mismatch".
    """
    check_bounds(w_min, w_max)
    weights = importance_weights(old_logprobs, sampler_logprobs, mask, level=level, segment_ids=segment_ids)
    return jnp.where(_within(weights, w_min, w_max), weights, 0.0)


def icepop_weights(
    old_logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    w_min: float = 0.5,
    w_max: float = 5.0,
) -> Array:
    """IcePop: the weight of a token, and 0 where sampler and learner disagree too much on it, in either direction.

        ρₜ if w_min ≤ ρₜ ≤ w_max, else 0

    Unlike `mis_weights` by default, tokens drop out one by one, and also those that the sampler liked too much.

    Args:
        old_logprobs: As `importance_weights`.
        sampler_logprobs: As `importance_weights`.
        mask: As `importance_weights`.
        w_min: Lower bound.
        w_max: Upper bound.

    Returns:
        `[..., T]`, 0 at masked positions.

    Raises:
        ValueError: As `mis_weights`.

    Source: Ling Team 2025, "Every step evolves" (2510.18855).
    """
    return mis_weights(old_logprobs, sampler_logprobs, mask, level="token", w_min=w_min, w_max=w_max)


def geometric_filter(
    old_logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    w_min: float = 0.999,
    w_max: float = 1.001,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """Marks the sequences on which sampler and learner agree on average over the tokens.

        w_min ≤ exp(Σₜ log ρₜ / n) ≤ w_max

    verl bounds the inverse, exp(−Σ log ρ / n): its bounds are 1/w_max and 1/w_min. Unlike `mis_weights`, it does not
    drop long sequences for their length alone, and it returns no weight.

    Args:
        old_logprobs: As `importance_weights`.
        sampler_logprobs: As `importance_weights`.
        mask: As `importance_weights`.
        w_min: Lower bound of the geometric mean.
        w_max: Upper bound of the geometric mean.
        segment_ids: As `importance_weights`.

    Returns:
        Bool `[..., T]`, False at masked positions.

    Raises:
        ValueError: As `mis_weights`.

    Source: Liu et al. 2025, "When speed kills stability: demystifying RL collapse from the training-inference
    mismatch"; verl.
    """
    check_bounds(w_min, w_max)
    options = {"level": "geometric", "segment_ids": segment_ids}
    return _within(importance_weights(old_logprobs, sampler_logprobs, mask, **options), w_min, w_max) & mask


def seq_mask_tis_weights(
    old_logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    w_min: float = 0.999,
    w_max: float = 1.001,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """The weights of the tokens of those sequences that `geometric_filter` keeps, and 0 for the rest.

        ρₜ if w_min ≤ exp(Σₜ log ρₜ / n) ≤ w_max, else 0

    It is OpenRLHF's `seq-mask-tis`, where the token weights are not truncated, despite the name. Unlike
    `geometric_filter`, what is kept is corrected, too.

    Args:
        old_logprobs: As `importance_weights`.
        sampler_logprobs: As `importance_weights`.
        mask: As `importance_weights`.
        w_min: As `geometric_filter`.
        w_max: As `geometric_filter`.
        segment_ids: As `importance_weights`.

    Returns:
        `[..., T]`, 0 at masked positions.

    Raises:
        ValueError: As `mis_weights`.

    Source: OpenRLHF, `vllm_is_correction_type="seq-mask-tis"`.
    """
    keep = geometric_filter(old_logprobs, sampler_logprobs, mask, w_min=w_min, w_max=w_max, segment_ids=segment_ids)
    return jnp.where(keep, importance_weights(old_logprobs, sampler_logprobs, mask), 0.0)


def effective_sample_size(weights: ArrayLike, mask: ArrayLike) -> Array:
    """The share of the tokens that are left, in effect, of a sample with unequal importance weights.

        (Σ w)² / (N Σ w²)        over the N valid tokens

    It is 1 where all weights are equal and 1/N where one token has all the weight. It is no mean: do not average it
    over micro-batches. Unlike the mean weight, which may be 1 for any spread, it says how noisy a corrected loss is.

    Args:
        weights: From this file, `[..., T]`.
        mask: Bool `[..., T]`, True on the tokens that are trained; the first tokens alone, from `segment_first`, to
            count sequences.

    Returns:
        A float32 scalar, 0 if nothing counts.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Kong 1992, "A note on importance sampling using standardized weights".
    """
    weights = fill_masked(weights, mask)
    return safe_divide(jnp.sum(weights) ** 2, count_true(mask) * jnp.sum(weights**2))


def _within(weights: Array, low: float | None, high: float | None) -> Array:
    return (weights >= (-jnp.inf if low is None else low)) & (weights <= (jnp.inf if high is None else high))
