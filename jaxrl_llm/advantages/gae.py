"""Generalized advantage estimation over completions: advantages from token rewards and a critic's values."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.masking import (
    as_float,
    check_choice,
    check_mask,
    fill_masked,
    next_valid,
    per_token,
    segment_last,
    suffix_sum,
)

MaskedTokens = Literal["carry", "zero"]


class GAE(NamedTuple):
    """What `gae` returns; both `[..., T]`, 0 at masked positions."""

    advantages: Array
    """Not whitened: `jaxrl_llm.masking.whiten` does that, over the whole batch and after the returns."""
    returns: Array
    """The critic's targets, advantages + values."""


def gae(
    token_rewards: ArrayLike,
    values: ArrayLike,
    mask: ArrayLike,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    masked_tokens: MaskedTokens = "carry",
    segment_ids: ArrayLike | None = None,
) -> GAE:
    """Generalized advantage estimation.

        δₜ = rₜ + gamma · Vₜ₊₁ − Vₜ
        Aₜ = δₜ + gamma · lam · Aₜ₊₁
        returnsₜ = Aₜ + Vₜ

    with V and A equal to 0 after a sequence's last token. gamma = lam = 1 gives the plain sum of the rewards to
    come, A = Σₖ₌ₜ rₖ − Vₜ; lam = 0 the one-step returns rₜ + gamma · Vₜ₊₁. Vₜ is the critic's value where token t is
    decided on: at the position before it, so that V₀ is read at the prompt's last token. A sequence that was cut
    at the maximum length counts as ended, unless `bootstrap_truncated` has shaped its rewards. Unlike
    `reinforce_advantages`, the baseline is a critic that looks at each prefix.

    Args:
        token_rewards: `[..., T]`, from `shape_rewards`.
        values: The critic's values `[..., T]` when the batch was collected; a constant.
        mask: Bool `[..., T]`.
        gamma: Discount per token.
        lam: Weight of the longer returns: 0 for one step, 1 for the whole sum.
        masked_tokens: What a masked token amid a completion, such as an observation, does. "carry": it is
            skipped, and the token before it sees the one after (verl, Tunix). "zero": it is a step with reward
            and value 0 (TRL, OpenRLHF). For right-padded completions both are the same.
        segment_ids: Integers `[..., T]` where rows hold several packed sequences, each a run of equal ids.

    Returns:
        Advantages and returns.

    Raises:
        ValueError: On unequal shapes, a mask that is not bool, or an unknown option.

    Source: Schulman et al. 2016, "High-dimensional continuous control using GAE" (1506.02438).
    """
    check_choice("masked_tokens", masked_tokens, MaskedTokens)
    mask = check_mask(mask, token_rewards=token_rewards, values=values, segment_ids=segment_ids)
    rewards = fill_masked(token_rewards, mask)
    values = jax.lax.stop_gradient(fill_masked(values, mask))
    steps = mask if masked_tokens == "carry" else jnp.ones_like(mask)
    deltas = rewards + gamma * next_valid(values, steps, segment_ids) - values
    summed = suffix_sum(deltas, steps, discount=gamma * lam, segment_ids=segment_ids)
    advantages = jnp.where(mask, summed, 0.0)
    return GAE(advantages, advantages + values)


def bootstrap_truncated(
    token_rewards: ArrayLike,
    final_values: ArrayLike,
    finished: ArrayLike,
    mask: ArrayLike,
    *,
    gamma: float = 1.0,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """Token rewards in which the value of the state after the last token stands for what truncation cut off.

        rₙ + gamma · Vₙ₊₁        at the last token n of each sequence that is not finished; rₜ elsewhere

    Returns and advantages of any kind then continue through the cut: `gae`, `reinforce_advantages`. Unlike
    `overlong_penalty`, a truncated sequence is not made worse than its value.

    Args:
        token_rewards: `[..., T]`.
        final_values: The critic's value at the last token, that is of the state after it: `[...]`, or `[..., T]`
            (needed with `segment_ids`); a constant. It may be anything where `finished`.
        finished: Bool `[...]` (or `[..., T]`): the sequence ended by itself.
        mask: Bool `[..., T]`.
        gamma: Discount per token.
        segment_ids: As `gae`.

    Returns:
        `[..., T]`, 0 at masked positions.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: Pardo et al. 2018, "Time limits in reinforcement learning" (1712.00378).
    """
    mask = check_mask(mask, token_rewards=token_rewards, segment_ids=segment_ids)
    packed = segment_ids is not None
    cut = segment_last(mask, segment_ids) & ~per_token(mask, packed=packed, finished=finished)
    final_values = jax.lax.stop_gradient(as_float(per_token(mask, packed=packed, final_values=final_values)))
    return fill_masked(token_rewards, mask) + jnp.where(cut, gamma * final_values, 0.0)
