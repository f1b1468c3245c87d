"""From scores to rewards: the KL penalty and the score's place among the tokens, and penalties for length."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.kl import kl_penalty
from jaxrl_llm.masking import as_float, check_choice, check_mask, fill_masked, masked_sum, per_token, segment_last

RewardKLEstimator = Literal["k1", "k2", "k3", "abs"]
ScorePosition = Literal["last", "after_last"]


def shape_rewards(
    scores: ArrayLike | None,
    mask: ArrayLike,
    *,
    token_rewards: ArrayLike | None = None,
    old_logprobs: ArrayLike | None = None,
    ref_logprobs: ArrayLike | None = None,
    kl_coef: ArrayLike = 0.05,
    kl_estimator: RewardKLEstimator = "k1",
    kl_clip: float | None = None,
    score_clip: float | None = None,
    missing_eos_penalty: float | None = None,
    finished: ArrayLike | None = None,
    score_position: ScorePosition = "last",
    segment_ids: ArrayLike | None = None,
) -> Array:
    """The token rewards of PPO for language models: a KL penalty at every token, the score at the last one.

        rₜ = −kl_coef · (old_logprobsₜ − ref_logprobsₜ) + [t is the last token] · score + token_rewardsₜ

    The penalty in the reward is k1 of the *old* policy: through the policy gradient it has the gradient of
    KL(policy ‖ reference), which k2, k3 and abs have not. Unlike `rlhf_reward`, each token bears its own part of
    the penalty. The score is clipped first; then the penalty for a missing end is taken off.

    Args:
        scores: `[...]`, one for each sequence; with packed rows `[..., T]`, the same at all tokens of a sequence. None:
            there are `token_rewards` alone.
        mask: Bool `[..., T]`.
        token_rewards: `[..., T]`, rewards of tokens, such as a process reward model gives; what is at masked positions
            is ignored. None: there are `scores` alone.
        old_logprobs: Log-probabilities of the tokens under the policy that sampled, `[..., T]`; a constant.
        ref_logprobs: The same under the reference. Both are needed unless `kl_coef` is 0.
        kl_coef: Weight of the KL penalty.
        kl_estimator: "k1", "k2", "k3" or "abs"; see `jaxrl_llm.losses.kl`.
        kl_clip: Bound ±kl_clip on the KL of a token. None: no bound.
        score_clip: Bound ±score_clip on the score (OpenRLHF: 10), and on the reward of a token. None: no bound.
        missing_eos_penalty: Taken off the score of sequences that are not `finished`. None: nothing.
        finished: Bool `[...]`, or `[..., T]` (needed with `segment_ids`): the sequence ended by itself.
        score_position: "last": at the last valid token. "after_last": one slot later where there is room, as in
            TRL's PPO; then `mask_after_last(mask)` is the mask of what follows, `gae` above all, with the value
            of one more state.
        segment_ids: Integers `[..., T]` where rows hold several packed sequences, each a run of equal ids.

    Returns:
        `[..., T]`, 0 at positions that are no token (but for the slot of the score). A sequence without a token
        has no reward.

    Raises:
        ValueError: On shapes that do not fit, an unknown option, a KL penalty without log-probabilities, or a
            `missing_eos_penalty` without `finished`, or neither scores nor rewards of tokens.

    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences" (1909.08593).
    """
    mask = check_mask(mask, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, segment_ids=segment_ids)
    check_choice("score_position", score_position, ScorePosition)
    if scores is None and token_rewards is None:
        raise ValueError("there are neither scores nor token_rewards: pass one of them, or both")
    packed = segment_ids is not None
    scores = 0.0 if scores is None else _clip(as_float(per_token(mask, packed=packed, scores=scores)), score_clip)
    if missing_eos_penalty is not None:
        if finished is None:
            raise ValueError(f"missing_eos_penalty is {missing_eos_penalty}, but there is no finished: pass it")
        scores = jnp.where(per_token(mask, packed=packed, finished=finished), scores, scores - missing_eos_penalty)
    slots = mask if score_position == "last" else mask_after_last(mask, segment_ids=segment_ids)
    rewards = jnp.where(segment_last(slots, segment_ids), scores, 0.0)
    if token_rewards is not None:
        rewards += _clip(fill_masked(token_rewards, mask), score_clip)
    return rewards - _kl_in_reward(old_logprobs, ref_logprobs, mask, kl_coef, kl_estimator, kl_clip)


def rlhf_reward(
    scores: ArrayLike,
    old_logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    kl_coef: ArrayLike = 0.05,
    kl_estimator: RewardKLEstimator = "k1",
    kl_clip: float | None = None,
    score_clip: float | None = None,
) -> Array:
    """The reward of RLHF for a whole sequence: its score minus its KL from the reference.

        R = score − kl_coef · Σₜ (old_logprobsₜ − ref_logprobsₜ)

    It is what RLOO compares. Unlike `shape_rewards`, it is one number a sequence: the sum of those token rewards.

    Args:
        scores: `[...]`.
        old_logprobs: `[..., T]`, as `shape_rewards`.
        ref_logprobs: `[..., T]`.
        mask: Bool `[..., T]`.
        kl_coef: Weight of the KL penalty.
        kl_estimator: As `shape_rewards`.
        kl_clip: Bound on the KL of a token, before the sum. None: no bound.
        score_clip: Bound ±score_clip on the score, before the penalty (TRL's RLOO). None: no bound.

    Returns:
        `[...]`.

    Raises:
        ValueError: On shapes that do not fit or an unknown estimator.

    Source: Ziegler et al. 2019 (1909.08593); Ahmadian et al. 2024, "Back to basics" (2402.14740).
    """
    mask = check_mask(mask, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    if np.shape(scores) != mask.shape[:-1]:
        raise ValueError(f"scores has shape {np.shape(scores)}, but mask has shape {mask.shape}: pass one a sequence")
    penalty = _kl_in_reward(old_logprobs, ref_logprobs, mask, kl_coef, kl_estimator, kl_clip)
    return _clip(as_float(scores), score_clip) - masked_sum(penalty, mask, axis=-1)


def overlong_penalty(
    lengths: ArrayLike, *, max_length: int, cache: int, scale: float = 1.0, capped: bool = True
) -> Array:
    """DAPO's soft overlong punishment: a reward that falls from 0 to −1 over the last `cache` tokens allowed.

        scale · clip((max_length − cache − length) / cache, −1, 0)

    It is added to the scores, before advantages and after `keep_mixed_groups`: a filter that saw it would take the
    differences that it makes for a signal. The paper has max_length 20480 and cache 4096. Unlike
    `mask & finished[..., None]`, which leaves truncated sequences out of the loss (overlong filtering), it teaches.

    Args:
        lengths: Lengths of the completions in tokens, any shape.
        max_length: Length from which on the penalty is full.
        cache: Number of tokens over which it grows.
        scale: Factor on the penalty.
        capped: Whether it stops at −1 (paper, TRL, OpenRLHF); False lets it grow beyond max_length (verl).

    Returns:
        The shape of `lengths`.

    Raises:
        ValueError: Unless 0 < cache ≤ max_length.

    Source: Yu et al. 2025, "DAPO" (2503.14476).
    """
    plain = isinstance(cache, int | float) and isinstance(max_length, int | float)
    if plain and not 0 < cache <= max_length:
        raise ValueError(f"cache is {cache} and max_length {max_length}: 0 < cache <= max_length is needed")
    penalty = jnp.minimum((max_length - cache - as_float(lengths)) / cache, 0.0)
    return scale * (jnp.maximum(penalty, -1.0) if capped else penalty)


def mask_after_last(mask: ArrayLike, *, segment_ids: ArrayLike | None = None) -> Array:
    """The mask with one more slot behind each sequence's last token, where there is room.

        mask or [t − 1 is the last token of its sequence]

    It belongs to `shape_rewards(score_position="after_last")`. Unlike `mask`, it covers the state after the last
    token, whose value and reward TRL's PPO counts.

    Args:
        mask: Bool `[..., T]`.
        segment_ids: As `shape_rewards`; the slot must lie in the sequence's own segment.

    Returns:
        Bool `[..., T]`.

    Source: TRL, `PPOTrainer`.
    """
    mask = check_mask(mask, segment_ids=segment_ids)
    behind = jnp.roll(segment_last(mask, segment_ids), 1, axis=-1) & (jnp.arange(mask.shape[-1]) > 0)
    if segment_ids is not None:
        ids = jnp.asarray(segment_ids)
        behind &= ids == jnp.roll(ids, 1, axis=-1)
    return mask | behind


def _kl_in_reward(
    old_logprobs: ArrayLike | None,
    ref_logprobs: ArrayLike | None,
    mask: Array,
    kl_coef: ArrayLike,
    kl_estimator: RewardKLEstimator,
    kl_clip: float | None,
) -> Array:
    """What the KL takes off the reward of each token; a constant."""
    check_choice("KL estimator in the reward", kl_estimator, RewardKLEstimator)
    if isinstance(kl_coef, int | float) and kl_coef == 0:
        return jnp.zeros(mask.shape, jnp.float32)
    if old_logprobs is None or ref_logprobs is None:
        missing = "old_logprobs" if old_logprobs is None else "ref_logprobs"
        raise ValueError(f"kl_coef is {kl_coef}, but there are no {missing}: pass them, or kl_coef=0")
    old, ref = fill_masked(old_logprobs, mask), fill_masked(ref_logprobs, mask)
    return jax.lax.stop_gradient(kl_penalty(old, ref, estimator=kl_estimator, clip=kl_clip)) * kl_coef


def _clip(x: Array, bound: float | None) -> Array:
    return x if bound is None else jnp.clip(x, -bound, bound)
