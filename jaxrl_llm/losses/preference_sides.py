"""Losses of preference pairs that look at each side against its reference, and not only at the difference.

D_w = log π(y_w) − log π_ref(y_w) is the log-ratio of the chosen completion, D_l that of the rejected one, both of sums
over tokens. A loss of D_w − D_l alone lets both fall together; these say where each should go.
"""

from __future__ import annotations

import jax
from jax import Array
from jax.nn import sigmoid, softplus
from jax.typing import ArrayLike

from jaxrl_llm.losses._pairs import check_together, make_pairs, reduce_pairs
from jaxrl_llm.losses._rows import check_positive
from jaxrl_llm.masking import check_same_shape, fill_masked
from jaxrl_llm.records import Metrics


def nca_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike,
    ref_rejected_logprobs: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Noise contrastive alignment of pairs: keeps the chosen completion likely while it separates the two.

        mean over pairs of  −log σ(beta D_w) − ½ log σ(−beta D_w) − ½ log σ(−beta D_l)

    Unlike `dpo_loss`, it works on the absolute likelihood of the chosen completion, which cannot fall for free.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        beta: As `dpo_loss`.
        weights: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`.

    Raises:
        ValueError: As `dpo_loss`.

    Source: Chen et al. 2024, "Noise contrastive alignment of language models" (2402.05369).
    """
    check_positive(beta=beta)
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    chosen, rejected = pairs.chosen_log_ratios * beta, pairs.rejected_log_ratios * beta
    losses = softplus(-chosen) + 0.5 * softplus(chosen) + 0.5 * softplus(rejected)
    return reduce_pairs(losses, pairs, beta=beta, weights=weights, normalizer=normalizer)


def apo_zero_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike,
    ref_rejected_logprobs: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Anchored preference optimization, zero: the chosen completion up and the rejected one down.

        mean over pairs of  1 − σ(beta D_w) + σ(beta D_l)

    For data whose chosen completions are better than what the policy writes.

    Unlike `apo_down_loss`, it raises the likelihood of the chosen completion.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        beta: As `dpo_loss`.
        weights: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`.

    Raises:
        ValueError: As `dpo_loss`.

    Source: D'Oosterlinck et al. 2024, "Anchored preference optimization and contrastive revisions" (2408.06266).
    """
    check_positive(beta=beta)
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    losses = sigmoid(-pairs.chosen_log_ratios * beta) + sigmoid(pairs.rejected_log_ratios * beta)
    return reduce_pairs(losses, pairs, beta=beta, weights=weights, normalizer=normalizer)


def apo_down_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike,
    ref_rejected_logprobs: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Anchored preference optimization, down: both completions down, the rejected one further.

        mean over pairs of  σ(beta D_w) + 1 − σ(beta (D_w − D_l))

    For data whose chosen completions are worse than what the policy writes.

    Unlike `apo_zero_loss`, it lowers the likelihood of the chosen completion.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        beta: As `dpo_loss`.
        weights: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`.

    Raises:
        ValueError: As `dpo_loss`.

    Source: D'Oosterlinck et al. 2024, "Anchored preference optimization and contrastive revisions" (2408.06266).
    """
    check_positive(beta=beta)
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    losses = sigmoid(pairs.chosen_log_ratios * beta) + sigmoid(-pairs.margin * beta)
    return reduce_pairs(losses, pairs, beta=beta, weights=weights, normalizer=normalizer)


def sppo_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike,
    ref_rejected_logprobs: ArrayLike,
    *,
    beta: ArrayLike = 1e-3,
    chosen_win_probs: ArrayLike | None = None,
    rejected_win_probs: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Self-play preference optimization: regression of each log-ratio to how often the completion wins.

        mean over pairs of  (D_w − (P_w − ½) / beta)² + (D_l − (P_l − ½) / beta)²

    P is the probability that the completion beats one of the policy's own, from a judge; beta is 1/η of the paper.
    Without probabilities, P_w = 1 and P_l = 0 (TRL's `sppo_hard`). The reference is the policy of the last round.

    Unlike `ipo_loss`, each side has a target of its own.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        beta: Inverse of the step size η.
        chosen_win_probs: P_w in [0, 1], `[...]`; constants. None: 1.
        rejected_win_probs: P_l in [0, 1], `[...]`; constants. None: 0.
        weights: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`.

    Raises:
        ValueError: As `dpo_loss`, and on the probabilities of one side without the other's.

    Source: Wu et al. 2024, "Self-play preference optimization" (2405.00675).
    """
    check_positive(beta=beta)
    check_together(chosen_win_probs=chosen_win_probs, rejected_win_probs=rejected_win_probs)
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    chosen_target, rejected_target = 1.0, 0.0
    if chosen_win_probs is not None and rejected_win_probs is not None:
        check_same_shape(mask=pairs.mask, chosen_win_probs=chosen_win_probs, rejected_win_probs=rejected_win_probs)
        chosen_target = jax.lax.stop_gradient(fill_masked(chosen_win_probs, pairs.mask))
        rejected_target = jax.lax.stop_gradient(fill_masked(rejected_win_probs, pairs.mask))
    losses = (pairs.chosen_log_ratios - (chosen_target - 0.5) / beta) ** 2
    losses += (pairs.rejected_log_ratios - (rejected_target - 0.5) / beta) ** 2
    return reduce_pairs(losses, pairs, beta=beta, weights=weights, normalizer=normalizer)


def bco_pair_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike,
    ref_rejected_logprobs: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    reward_shift: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Binary classifier optimization on pairs: the sum over both sides of the unpaired loss.

        mean over pairs of  −log σ(beta D_w − δ) − log σ(−(beta D_l − δ))        δ = reward_shift

    Unlike `bco_loss`, whose mean is over samples, a pair counts once, so that this is twice as large. TRL's `bco_pair`
    is without shift, the default here.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        beta: As `dpo_loss`.
        reward_shift: δ, a constant; the running mean of the rewards (`RewardShift`) is the paper's.
        weights: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`.

    Raises:
        ValueError: As `dpo_loss`.

    Source: Jung et al. 2024, "Binary classifier optimization for LLM alignment" (2404.04656).
    """
    check_positive(beta=beta)
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    shift = jax.lax.stop_gradient(reward_shift)
    losses = softplus(shift - pairs.chosen_log_ratios * beta) + softplus(pairs.rejected_log_ratios * beta - shift)
    return reduce_pairs(losses, pairs, beta=beta, weights=weights, normalizer=normalizer)
