"""Losses of preference pairs that, like DPO, are functions of the margin h, but not logistic ones.

See `jaxrl_llm.losses.dpo` for h, for training without a reference and for mixtures. Every loss is the mean over pairs
of a term of `jaxrl_llm.losses.preference_terms`.
"""

from __future__ import annotations

from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._pairs import divide_pairs_by_lengths, make_pairs, reduce_pairs
from jaxrl_llm.losses.preference_terms import discopop_term, exo_term, hinge_term, ipo_term
from jaxrl_llm.records import Metrics


def ipo_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike | None,
    ref_rejected_logprobs: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    target: ArrayLike | None = None,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Identity preference optimization: regression of the margin to a target.

        mean over pairs of  (h − target)²        target = 1 / (2 beta), where beta is the paper's τ

    As in the paper, h is of sums over tokens. With lengths, each side's log-ratio is divided by its own, as in TRL's
    `DPOTrainer` (its online trainers sum). Mind the scale: at h = 0 the loss is 1 / (4 beta²), 25 by default.

    Unlike `dpo_loss`, a margin beyond the target is pulled back, so that certain labels do not drive the policy away.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        beta: Strength of the regularization to the reference; the factor of the logged rewards as well.
        target: Another target margin. None: 1 / (2 beta).
        chosen_lengths: As `dpo_loss`.
        rejected_lengths: As `dpo_loss`.
        weights: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`.

    Raises:
        ValueError: As `dpo_loss`.

    Source: Azar et al. 2023 (2310.12036).
    """
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    losses = ipo_term(divide_pairs_by_lengths(pairs, chosen_lengths, rejected_lengths).margin, beta=beta, target=target)
    return reduce_pairs(losses, pairs, beta=beta, weights=weights, normalizer=normalizer)


def hinge_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike | None,
    ref_rejected_logprobs: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """The hinge loss on the implicit reward, of statistical rejection sampling optimization (RSO).

        mean over pairs of  max(0, 1 − beta h)

    Unlike `slic_loss`, the margin is relative to the reference, and there is no likelihood term.

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

    Source: Liu et al. 2023, "Statistical rejection sampling improves preference optimization" (2309.06657).
    """
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    return reduce_pairs(hinge_term(pairs.margin, beta=beta), pairs, beta=beta, weights=weights, normalizer=normalizer)


def exo_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike | None,
    ref_rejected_logprobs: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 1e-3,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Efficient exact optimization from preferences: the reverse KL from the smoothed label.

        mean over pairs of  KL( [σ(beta h), σ(−beta h)] ‖ [1 − label_smoothing, label_smoothing] )

    Unlike `dpo_loss`, which is the forward KL, its gradient fades on pairs that the policy has very wrong.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        beta: As `dpo_loss`.
        label_smoothing: Probability of the rejected completion in the label, in (0, 0.5).
        weights: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`.

    Raises:
        ValueError: As `dpo_loss`, and on a probability outside (0, 0.5).

    Source: Ji et al. 2024, "Towards efficient exact optimization of language model alignment" (2402.00856).
    """
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    losses = exo_term(pairs.margin, beta=beta, label_smoothing=label_smoothing)
    return reduce_pairs(losses, pairs, beta=beta, weights=weights, normalizer=normalizer)


def discopop_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike | None,
    ref_rejected_logprobs: ArrayLike | None,
    *,
    beta: ArrayLike = 0.05,
    tau: ArrayLike = 0.05,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Discovered preference optimization, or the log-ratio modulated loss: DPO blended with an exponential loss.

        mean over pairs of  −(1 − w) log σ(z) + w exp(−z)        z = beta h,  w = σ(z / tau)

    Unlike `dpo_loss`, pairs that are already right have the exponential loss; the loss is not convex around h = 0,
    where it pulls the margin down.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        beta: As `dpo_loss`.
        tau: Width of the switch between the two losses.
        weights: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`.

    Raises:
        ValueError: As `dpo_loss`.

    Source: Lu et al. 2024, "DiscoPOP" (2406.08414).
    """
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    losses = discopop_term(pairs.margin, beta=beta, tau=tau)
    return reduce_pairs(losses, pairs, beta=beta, weights=weights, normalizer=normalizer)
