"""Process supervision: scores of the steps of a completion, as token rewards and as advantages.

A completion's steps are a padded list: `step_scores` `[..., K]` with a bool `step_mask` of that shape, in order,
and `step_ends` `[..., K]`, the index of each step's last token. What is at masked steps does not matter.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.group import group_advantages
from jaxrl_llm.advantages.statistics import row_labels
from jaxrl_llm.masking import check_choice, check_mask, fill_masked, next_valid, safe_divide, suffix_sum

PROBABILITY_FLOOR = 1e-6
"""How near to 0 and 1 a probability may be before its logit is taken."""

StepRewardKind = Literal["identity", "centered", "logit", "progress", "min_form"]


def find_step_ends(is_end: ArrayLike, *, max_steps: int) -> tuple[Array, Array]:
    """Turns marked tokens into the padded list of step ends.

        step_endsₖ = position of the k-th marked token

    Unlike `step_of_token`, it goes from tokens to steps.

    Args:
        is_end: Bool `[..., T]`: the token ends a step (and is valid).
        max_steps: K, the length of the list; further steps are left out.

    Returns:
        `step_ends`, integers `[..., K]`, and `step_mask`, bool `[..., K]`.

    Raises:
        ValueError: On marks that are not bool.

    Source: Lightman et al. 2023, "Let's verify step by step" (2305.20050).
    """
    is_end = check_mask(is_end)
    # A stable sort that puts the marked tokens first, in their order.
    order = jnp.argsort(~is_end, axis=-1, stable=True)[..., :max_steps]
    missing = max_steps - order.shape[-1]
    step_ends = jnp.pad(order, [(0, 0)] * (order.ndim - 1) + [(0, max(missing, 0))])
    step_mask = jnp.arange(max_steps) < jnp.sum(is_end, axis=-1, keepdims=True)
    return jnp.where(step_mask, step_ends, 0), step_mask


def step_of_token(step_ends: ArrayLike, step_mask: ArrayLike, num_tokens: int) -> Array:
    """Which step each token belongs to.

        number of steps that end before t

    Unlike `find_step_ends`, it goes from steps to tokens.

    Args:
        step_ends: Integers `[..., K]`.
        step_mask: Bool `[..., K]`.
        num_tokens: T.

    Returns:
        Integers `[..., T]`; behind the last step, the number of steps.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Lightman et al. 2023, "Let's verify step by step" (2305.20050).
    """
    step_mask = check_mask(step_mask, step_ends=step_ends)
    before = jnp.asarray(step_ends)[..., None, :] < jnp.arange(num_tokens)[:, None]
    return jnp.sum(before & step_mask[..., None, :], axis=-1)


def steps_to_tokens(step_values: ArrayLike, step_ends: ArrayLike, step_mask: ArrayLike, num_tokens: int) -> Array:
    """Puts the value of each step on its last token: dense rewards.

        rₜ = Σₖ [step_endsₖ = t] step_valuesₖ

    Their returns are those of any token rewards: `reinforce_advantages`, `gae`; a score for the outcome is added by
    `shape_rewards`. Rows may be packed. Unlike `process_advantages`, nothing is compared.

    Args:
        step_values: `[..., K]`.
        step_ends: Integers `[..., K]`.
        step_mask: Bool `[..., K]`.
        num_tokens: T.

    Returns:
        `[..., T]`.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Uesato et al. 2022 (2211.14275); Wang et al. 2023, "Math-Shepherd" (2312.08935).
    """
    step_mask = check_mask(step_mask, step_values=step_values, step_ends=step_ends)
    values = fill_masked(step_values, step_mask)
    # A comparison and a sum, which fuse; a scatter would not be reproducible on every accelerator.
    here = (jnp.asarray(step_ends)[..., None, :] == jnp.arange(num_tokens)[:, None]) & step_mask[..., None, :]
    return jnp.sum(jnp.where(here, values[..., None, :], 0.0), axis=-1)


def process_advantages(
    step_rewards: ArrayLike,
    step_ends: ArrayLike,
    step_mask: ArrayLike,
    mask: ArrayLike,
    *,
    ddof: int = 1,
    eps: float = 1e-4,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """GRPO with process supervision: the step rewards of a group standardized together, summed from each token on.

        r̃ᵢⱼ = (rᵢⱼ − mean) / (std + eps)        over all steps of all samples of the group
        Aᵢₜ = Σⱼ r̃ᵢⱼ over the steps j that end at t or later

    Unlike `group_advantages`, a token is judged by its own step and those that follow.

    Args:
        step_rewards: `[..., G, K]`, the samples of a group along axis −2; or `[..., K]` with `group_ids`.
        step_ends: Integers, of that shape.
        step_mask: Bool, of that shape.
        mask: Bool `[..., G, T]` of the tokens.
        ddof: 1 for the unbiased deviation, 0 for the population's.
        eps: Added to the deviation, outside the root.
        group_ids: Labels `[...]` of the samples; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        `[..., G, T]`, 0 at masked positions and behind the last step.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.

    Source: Shao et al. 2024, "DeepSeekMath" (2402.03300).
    """
    group_ids = row_labels(group_ids, group_size, step_rewards=step_rewards)
    mask = check_mask(mask)
    step_mask = check_mask(step_mask, step_rewards=step_rewards, step_ends=step_ends)
    shape = step_mask.shape
    if shape[:-1] != mask.shape[:-1]:
        raise ValueError(
            f"step_mask has shape {shape}, but mask has shape {mask.shape}: all but the last must be equal"
        )

    rewards = fill_masked(step_rewards, step_mask)
    if group_ids is None:  # a group's steps in one row
        row = (*shape[:-2], shape[-2] * shape[-1])
        standardized = group_advantages(rewards.reshape(row), ddof=ddof, eps=eps, mask=step_mask.reshape(row))
    else:
        labels = jnp.broadcast_to(jnp.asarray(group_ids)[..., None], shape)
        standardized = group_advantages(rewards, ddof=ddof, eps=eps, mask=step_mask, group_ids=labels)
    dense = steps_to_tokens(standardized.reshape(shape), step_ends, step_mask, mask.shape[-1])
    return jnp.where(mask, suffix_sum(dense, jnp.ones_like(mask)), 0.0)


def dense_step_rewards(
    step_scores: ArrayLike, step_mask: ArrayLike, *, kind: StepRewardKind = "identity", temperature: float = 0.1
) -> Array:
    """Rewards from a process reward model's probabilities that the steps are right.

        identity: pₖ;   centered: pₖ − ½;   logit: log(pₖ / (1 − pₖ)), p in [10⁻⁶, 1 − 10⁻⁶]
        progress: pₖ − pₖ₋₁ (p₀ = 0);   min_form: pₖ · softmax(−p / temperature)ₖ

    Sums of positive rewards make answers of more steps better, whatever they are worth: "centered", "progress" and
    "min_form" (PURE: nearly all on the worst step) do not. Unlike `aggregate_step_scores`, one number for each step.

    Args:
        step_scores: Probabilities `[..., K]`.
        step_mask: Bool `[..., K]`.
        kind: See above.
        temperature: Of "min_form": the smaller, the more falls on the worst step.

    Returns:
        `[..., K]`, 0 at masked steps.

    Raises:
        ValueError: On unequal shapes or an unknown kind.

    Source: Lightman et al. 2023 (2305.20050); Cheng et al. 2025, "Stop summation" (PURE, 2504.15275).
    """
    check_choice("kind", kind, StepRewardKind)
    mask = check_mask(step_mask, step_scores=step_scores)
    scores = fill_masked(step_scores, mask, 0.5)
    match kind:
        case "identity":
            rewards = scores
        case "centered":
            rewards = scores - 0.5
        case "logit":
            certain = jnp.clip(scores, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
            rewards = jnp.log(certain) - jnp.log1p(-certain)
        case "progress":
            previous = jnp.flip(next_valid(jnp.flip(scores, -1), jnp.flip(mask, -1)), -1)
            rewards = scores - previous
        case "min_form":
            rewards = scores * min_form_weights(scores, mask, temperature=temperature)
    return jnp.where(mask, rewards, 0.0)


def min_form_weights(step_scores: ArrayLike, step_mask: ArrayLike, *, temperature: float = 0.1) -> Array:
    """How the credit of a completion falls on its steps in PURE: nearly all on the worst.

        softmax(−p / temperature)

    Unlike the sum of the scores, their weighted sum is about their minimum.

    Args:
        step_scores: `[..., K]`.
        step_mask: Bool `[..., K]`.
        temperature: The smaller, the sharper.

    Returns:
        `[..., K]`, which sum to 1 over the valid steps; 0 at masked ones.

    Raises:
        ValueError: On unequal shapes, or unless the temperature is positive.

    Source: Cheng et al. 2025, "Stop summation" (PURE, 2504.15275).
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be positive")
    mask = check_mask(step_mask, step_scores=step_scores)
    logits = -fill_masked(step_scores, mask) / temperature
    highest = jnp.max(jnp.where(mask, logits, -jnp.inf), axis=-1, keepdims=True)
    shifted = logits - jax.lax.stop_gradient(jnp.where(jnp.isneginf(highest), 0.0, highest))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, shifted, 0.0)), 0.0)
    return safe_divide(weights, jnp.sum(weights, axis=-1, keepdims=True))


def implicit_process_rewards(
    logprobs: ArrayLike, ref_logprobs: ArrayLike, mask: ArrayLike, *, beta: float = 0.05
) -> Array:
    """Token rewards of an implicit process reward model: one that was trained as the log-ratio of two models.

        beta · (logprobsₜ − ref_logprobsₜ)

    Unlike the KL penalty of `shape_rewards`, `logprobs` are the reward model's, and the sign is positive.

    Args:
        logprobs: Log-probabilities of the tokens under the reward model, `[..., T]`.
        ref_logprobs: The same under the model that it started from.
        mask: Bool `[..., T]`.
        beta: The coefficient that it was trained with.

    Returns:
        `[..., T]`, 0 at masked positions.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Cui et al. 2025, "PRIME" (2502.01456).
    """
    mask = check_mask(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    return beta * (fill_masked(logprobs, mask) - fill_masked(ref_logprobs, mask))
