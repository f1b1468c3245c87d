"""Several rewards a sample, each brought to one scale before they are added up."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.group import group_advantages
from jaxrl_llm.advantages.reinforce import NormalizeOver
from jaxrl_llm.advantages.statistics import row_labels, whiten_by_length
from jaxrl_llm.masking import as_float, check_choice, mask_or_all


def gdpo_advantages(
    rewards: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    normalize_over: NormalizeOver = "sequences",
    lengths: ArrayLike | None = None,
    ddof: int = 1,
    eps: float = 1e-4,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """GDPO: each reward standardized within its group by itself, their weighted sum standardized over the batch.

        Sᵢ = Σₖ weightsₖ · (Rᵢₖ − meanₖ) / (stdₖ + eps)        mean and std of reward k over the group
        Aᵢ = (Sᵢ − mean S) / (std S + eps)                       over the batch

    The batch is the whole rollout, on all devices. Unlike `group_advantages` of the summed rewards, a reward with
    a large spread does not drown the others.

    Args:
        rewards: `[..., G, K]`: K rewards of each sample, a group along axis −2; or any shape `[..., K]` with
            `group_ids`.
        weights: `[K]`. None: 1 each.
        normalize_over: What the batch's mean and variance average over: "sequences", as above (TRL), or "tokens":
            (S − mean) / √(var + 1e-8), each sequence as often as it has tokens (verl, with eps 1e-6).
        lengths: Number of tokens of each sequence, `[..., G]`; needed for "tokens".
        ddof: 1 for the unbiased deviations, 0 for the population's.
        eps: Added to the deviations, outside the root.
        mask: Bool, of the shape of `rewards`: False where a reward does not apply to the sample. A sample to
            which none applies has advantage 0 and no part in the batch.
        group_ids: Labels `[...]` of the samples; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        The shape of `rewards` without its last axis: one advantage for each sample.

    Raises:
        ValueError: On shapes that do not fit, an unknown option, or "tokens" without `lengths`.

    Source: Liu et al. 2026, "GDPO" (2601.05242).
    """
    group_ids = row_labels(group_ids, group_size, rewards=rewards)
    check_choice("normalize_over", normalize_over, NormalizeOver)
    mask = mask_or_all(mask, rewards=rewards)
    num_rewards = mask.shape[-1]
    weights = jnp.ones(num_rewards, jnp.float32) if weights is None else as_float(weights)
    if weights.shape != (num_rewards,):
        raise ValueError(f"weights has shape {weights.shape}, but rewards has shape {mask.shape}: pass one a reward")

    rewards = as_float(rewards)
    standardized = [
        group_advantages(rewards[..., k], ddof=ddof, eps=eps, mask=mask[..., k], group_ids=group_ids)
        for k in range(num_rewards)
    ]
    total = jnp.sum(weights * jnp.stack(standardized, axis=-1), axis=-1)
    valid = jnp.any(mask, axis=-1)
    if normalize_over == "sequences":  # the batch as one group
        flat = group_advantages(total.reshape(1, -1), ddof=ddof, eps=eps, mask=valid.reshape(1, -1))
        return flat.reshape(total.shape)
    if lengths is None:
        raise ValueError("normalize_over 'tokens' weighs each sequence by its length: pass lengths, or 'sequences'")
    if np.shape(lengths) != total.shape:
        raise ValueError(f"lengths has shape {np.shape(lengths)}, but there are {total.shape} samples: pass one each")
    return whiten_by_length(total, lengths, valid, ddof=ddof)
