"""Masks for the `weights` of a policy loss: which sequences are too far off-policy, which tokens are decisions.

They are constants, and leave the denominator of a loss as it is: a token that is left out still counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import policy_rows
from jaxrl_llm.masking import check_mask, count_true, fill_masked, safe_divide, segment_total


def off_policy_sequence_mask(
    logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    threshold: float,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """Marks the sequences that may be learned from: those that did well, and those still near their sampler.

        A ≥ 0  or  Σₜ (sampler_logprobs − logprobs) / n ≤ threshold        n valid tokens

    A failure that the policy would hardly produce any more teaches nothing and disturbs much. The mean estimates
    KL(sampler ‖ policy), of all that has happened since: updates, and the sampler's own deviation. Unlike
    `geometric_filter`, it looks at the policy being trained, and keeps all successes.

    Args:
        logprobs: Log-probabilities of the completions' tokens under the policy, `[..., T]`.
        sampler_logprobs: The same as the sampler reported them (or under the old policy).
        advantages: As `gspo_loss`; only their sign matters here.
        mask: Bool `[..., T]`, True on the tokens that are trained.
        threshold: Largest mean of log-ratios of a failure that is kept, in nats per token.
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.

    Returns:
        Bool `[..., T]`, False at masked positions.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: DeepSeek-AI 2025, "DeepSeek-V3.2" (2512.02556).
    """
    rows = policy_rows(logprobs, sampler_logprobs, advantages, mask, segment_ids=segment_ids)
    gap = segment_total(jax.lax.stop_gradient(-rows.log_ratio), rows.mask, segment_ids)
    kl = safe_divide(gap, segment_total(rows.mask, rows.mask, segment_ids))
    return rows.mask & ((rows.advantages >= 0) | (kl <= threshold))


def top_entropy_mask(entropy: ArrayLike, mask: ArrayLike, *, fraction: float = 0.2) -> Array:
    """Marks the tokens of the highest entropy: the forks of a chain of thought, on which learning may be spent.

        H ≥ quantile(H, 1 − fraction)        over all valid tokens, interpolated linearly

    The quantile is that of the tokens given: of a micro-batch it is another than of the batch. Unlike an entropy
    bonus, it does not raise the entropy, it only leaves the tokens out that follow from those before.

    Args:
        entropy: Entropy of the policy at each token, in nats, `[..., T]`.
        mask: Bool `[..., T]`, True on the tokens that are trained.
        fraction: Share of the tokens that is kept, from 0 to 1 (all).

    Returns:
        Bool `[..., T]`, False at masked positions.

    Raises:
        ValueError: On unequal shapes, a mask that is not bool, or a fraction beyond 0 and 1.

    Source: Wang et al. 2025, "Beyond the 80/20 rule" (2506.01939).
    """
    if isinstance(fraction, int | float) and not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}: it is a share of the tokens, from 0 to 1")
    mask = check_mask(mask, entropy=entropy)
    if not mask.size:
        return mask
    entropy = jax.lax.stop_gradient(fill_masked(entropy, mask))
    ascending = jnp.sort(jnp.where(mask, entropy, jnp.finfo(entropy.dtype).max).ravel())
    last = jnp.maximum(count_true(mask) - 1, 0)
    position = (1 - fraction) * last
    below = jnp.floor(position).astype(jnp.int32)
    low, high = ascending[below], ascending[jnp.minimum(below + 1, last.astype(jnp.int32))]
    return mask & (entropy >= low + (position - below) * (high - low))
