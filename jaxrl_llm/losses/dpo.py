"""DPO: the logistic loss of preference pairs, and what it becomes when some labels are wrong.

The margin is h = [log π(y_w) − log π_ref(y_w)] − [log π(y_l) − log π_ref(y_l)], with the log-probabilities of whole
completions (`sequence_logprobs`): y_w the chosen one, y_l the rejected one. The losses are means over
pairs of terms of `jaxrl_llm.losses.preference_terms`.

From log-probs of tokens, `[2 B, T]`, rows of chosen completions before those of rejected ones:

    chosen, rejected = jnp.split(sequence_logprobs(logprobs, mask), 2)
    ref_chosen, ref_rejected = jnp.split(sequence_logprobs(ref_logprobs, mask), 2)
    loss, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)

With None for both references, the reference is left out of h ("reference-free"). A mixture of losses is a sum:

    loss += 0.1 * sft_loss(logprobs[:B], mask[:B])[0]

Parts of a batch add up to the whole's loss if each is given `normalizer`, the number of valid pairs of the whole.
"""

from __future__ import annotations

from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._pairs import divide_pairs_by_lengths, make_pairs, reduce_pairs
from jaxrl_llm.losses.preference_terms import (
    FDivergence,
    cdpo_term,
    dpo_term,
    f_divergence_score,
    robust_dpo_term,
)
from jaxrl_llm.records import Metrics


def dpo_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike | None,
    ref_rejected_logprobs: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float = 0.5,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Direct preference optimization: a classifier of preference pairs whose logit is the implicit reward.

        mean over pairs of  −log σ(beta h)

    With lengths, each side's log-ratio is divided by its own (TRL's `sigmoid_norm`). With another divergence than the
    reverse KL, f′ of the probability ratio takes the place of the log-ratio (`f_divergence_score`). Weights may be
    those of WPO, the product of `wpo_weights` of both sides.

    Unlike `ipo_loss`, it asks for an ever larger margin, and so moves far from the reference on pairs that are always
    labelled the same way. Both log-probs may fall while their difference grows.

    Args:
        chosen_logprobs: Log-probabilities of the chosen completions under the policy, `[...]`.
        rejected_logprobs: The same of the rejected completions, `[...]`.
        ref_chosen_logprobs: Those of the chosen ones under the reference, `[...]`; constants. None: no reference.
        ref_rejected_logprobs: Those of the rejected ones under the reference, `[...]`. None: no reference.
        beta: Inverse temperature: the larger, the closer the policy stays to the reference.
        f_divergence: Divergence that ties the policy to the reference; see `f_divergence_score`.
        f_alpha: Of the divergence "alpha"; see there.
        chosen_lengths: Numbers of tokens of the chosen completions, `[...]` integers, to divide by. None: no division.
        rejected_lengths: The same of the rejected ones, `[...]`.
        weights: Constant factors on the pairs' losses, `[...]`; the denominator counts every pair as 1.
        mask: Bool `[...]`, False for pairs that are padding: whatever is there is ignored. None: all count.
        normalizer: Number of valid pairs of the whole batch, if these are a part of it. None: the number here.

    Returns:
        The loss, a float32 scalar, and metrics, means over the valid pairs: `rewards/chosen` and `rewards/rejected`
        (beta · log-ratio), `rewards/margins`, `rewards/accuracies` (share of pairs with a positive margin),
        `logps/chosen` and `logps/rejected` (per sequence).

    Raises:
        ValueError: On unequal shapes, a mask that is not bool, one reference without the other, one length without
            the other, lengths that are not integers, or a beta that is not positive.

    Source: Rafailov et al. 2023, "Direct preference optimization" (2305.18290).
    """
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    scored = pairs._replace(
        chosen_log_ratios=f_divergence_score(pairs.chosen_log_ratios, f_divergence=f_divergence, f_alpha=f_alpha),
        rejected_log_ratios=f_divergence_score(pairs.rejected_log_ratios, f_divergence=f_divergence, f_alpha=f_alpha),
    )
    margin = divide_pairs_by_lengths(scored, chosen_lengths, rejected_lengths).margin
    return reduce_pairs(dpo_term(margin, beta=beta), pairs, beta=beta, weights=weights, normalizer=normalizer)


def cdpo_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike | None,
    ref_rejected_logprobs: ArrayLike | None,
    *,
    label_smoothing: ArrayLike,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Conservative DPO: label smoothing, for labels of which a share is wrong.

        mean over pairs of  −(1 − label_smoothing) log σ(beta h) − label_smoothing log σ(−beta h)

    What other systems call DPO with `label_smoothing`.

    Unlike `robust_dpo_loss`, it is not unbiased: it wants a margin of log((1 − label_smoothing)/label_smoothing)/beta.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        label_smoothing: Share of wrong labels, in [0, 0.5).
        beta: As `dpo_loss`.
        weights: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`.

    Raises:
        ValueError: As `dpo_loss`, and on a share outside [0, 0.5).

    Source: E. Mitchell 2023, "A note on DPO with noisy preferences".
    """
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    losses = cdpo_term(pairs.margin, label_smoothing=label_smoothing, beta=beta)
    return reduce_pairs(losses, pairs, beta=beta, weights=weights, normalizer=normalizer)


def robust_dpo_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike | None,
    ref_rejected_logprobs: ArrayLike | None,
    *,
    label_smoothing: ArrayLike,
    beta: ArrayLike = 0.1,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """DPO whose expectation over flipped labels is that of DPO over the right ones.

        mean of  [−(1 − label_smoothing) log σ(beta h) + label_smoothing log σ(−beta h)] / (1 − 2 label_smoothing)

    Unlike `cdpo_loss`, it subtracts the flipped loss; it may be negative, and noisier than DPO.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        label_smoothing: Share of flipped labels, in [0, 0.5), which must be known.
        beta: As `dpo_loss`.
        weights: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`.

    Raises:
        ValueError: As `dpo_loss`, and on a share outside [0, 0.5).

    Source: Chowdhury et al. 2024, "Provably robust DPO" (2403.00409).
    """
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, mask)
    losses = robust_dpo_term(pairs.margin, label_smoothing=label_smoothing, beta=beta)
    return reduce_pairs(losses, pairs, beta=beta, weights=weights, normalizer=normalizer)
