"""KTO: completions that are labelled good or bad, one by one, and a value that saturates.

Arrays are `[...]`, one number a completion; `labels` is True for the desirable ones. The two sides need not be of the
same prompts nor equal in number.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid, softplus
from jax.typing import ArrayLike

from jaxrl_llm.losses._pairs import mean_over
from jaxrl_llm.losses._rows import check_not_negative, check_positive
from jaxrl_llm.losses._samples import Samples, make_samples, sample_metrics
from jaxrl_llm.masking import (
    check_choice,
    check_mask,
    check_same_shape,
    count_true,
    fill_masked,
    mask_or_all,
    masked_mean,
    masked_sum,
    safe_divide,
)
from jaxrl_llm.records import Mean, Metrics

KTOVariant = Literal["kto", "one_sided_dpo", "apo_zero_unpaired"]


def kto_loss(
    logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    labels: ArrayLike,
    kl: ArrayLike | None,
    *,
    variant: KTOVariant = "kto",
    beta: ArrayLike = 0.1,
    lambda_d: ArrayLike = 1.0,
    lambda_u: ArrayLike = 1.0,
    per_side_mean: bool = False,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Kahneman–Tversky optimization: a completion's value is that of its gain over what the policy gains anyway.

        mean over samples of  lambda_d (1 − σ(beta (D − z₀)))  if desirable,  lambda_u (1 − σ(beta (z₀ − D)))  if not

    with D = log π(y) − log π_ref(y) and z₀ = `kl`. The variants are

    - "kto": this;
    - "apo_zero_unpaired": z₀ = 0 (TRL's loss of that name);
    - "one_sided_dpo": −log σ(beta D) if desirable, −log σ(−beta D) if not: DPO with 0 for the absent side.

    Unlike `bco_loss`, the value saturates on both ends, so that hopeless samples have no gradient. For data with more
    samples on one side see `kto_balance`.

    Args:
        logprobs: Log-probabilities of the completions under the policy, `[...]`.
        ref_logprobs: The same under the reference, `[...]`; constants.
        labels: Bool `[...]`, True if desirable.
        kl: z₀, a constant: one number from `kto_kl` over the whole batch, or one for each sample, `[...]`, from
            `kto_kl_of_other_side`. None for the variants that have none.
        variant: One of `KTOVariant`.
        beta: Inverse temperature: the larger, the sooner a gain saturates.
        lambda_d: Weight of desirable samples.
        lambda_u: Weight of undesirable samples; above lambda_d it is an aversion to losses.
        per_side_mean: Average each side by itself, then the two sides if both have samples.
        mask: Bool `[...]`, False for samples that are padding. None: all count.
        normalizer: Number of valid samples of the whole batch, if these are a part of it; with `per_side_mean`, the
            numbers of desirable and of undesirable ones, `[2]`. None: the number here.

    Returns:
        The loss, a float32 scalar, and metrics: `rewards/chosen` and `logps/chosen` over the desirable samples,
        `rewards/rejected` and `logps/rejected` over the others, and, of "kto", `kl`. (TRL's `rewards/margins` is the
        difference of the two means.)

    Raises:
        ValueError: On unequal shapes, labels or a mask that are not bool, an unknown variant, or a kl that is missing
            or has no part in the variant.

    Source: Ethayarajh et al. 2024, "KTO" (2402.01306).
    """
    check_choice("variant", variant, KTOVariant)
    if (kl is None) == (variant == "kto"):
        raise ValueError(f"variant {variant!r} with kl {kl}: pass kl (see `kto_kl`) to 'kto', and None to the others")
    check_positive(beta=beta)
    check_not_negative(lambda_d=lambda_d, lambda_u=lambda_u)
    samples = make_samples(logprobs, ref_logprobs, labels, mask)
    z0 = 0.0 if kl is None else jax.lax.stop_gradient(_per_sample(kl, samples.mask))
    # Positive where the sample is better than the baseline and should be, or worse and should be.
    gain = jnp.where(samples.labels, beta * (samples.log_ratios - z0), beta * (z0 - samples.log_ratios))
    losses = softplus(-gain) if variant == "one_sided_dpo" else sigmoid(-gain)
    losses = jnp.where(samples.labels, lambda_d, lambda_u) * losses
    metrics = sample_metrics(samples, beta)
    if kl is not None:
        metrics["kl"] = Mean.of(jnp.broadcast_to(z0, samples.mask.shape), samples.mask)
    if per_side_mean:
        return _mean_of_sides(losses, samples, normalizer), metrics
    return mean_over(losses, samples.mask, normalizer=normalizer), metrics


def kto_kl(
    mismatched_logprobs: ArrayLike, ref_mismatched_logprobs: ArrayLike, *, mask: ArrayLike | None = None
) -> Array:
    """The baseline z₀ of KTO: how far the policy is from the reference, from completions of other prompts.

        max(0, mean of  log π(y′ | x) − log π_ref(y′ | x))        y′ the completion of another prompt of the batch

    The mismatch is made by rotating the batch's completions by one against its prompts; mask what meets its own prompt.
    The clamp is on the mean, which is to be over the whole batch and all devices: of one or two samples it is noise.

    Unlike `kl_k1`, the completions are not samples of the policy: it is a bias that keeps the loss stable, no estimate.

    Args:
        mismatched_logprobs: Log-probabilities of the mismatched completions under the policy, `[...]`.
        ref_mismatched_logprobs: The same under the reference, `[...]`.
        mask: Bool `[...]`, False for samples that do not count. None: all count.

    Returns:
        A float32 scalar, a constant (no gradient).

    Raises:
        ValueError: On unequal shapes.

    Source: Ethayarajh et al. 2024, "KTO" (2402.01306).
    """
    mask = mask_or_all(mask, mismatched_logprobs=mismatched_logprobs)
    check_same_shape(mismatched_logprobs=mismatched_logprobs, ref_mismatched_logprobs=ref_mismatched_logprobs)
    log_ratios = fill_masked(mismatched_logprobs, mask) - fill_masked(ref_mismatched_logprobs, mask)
    return jax.lax.stop_gradient(jnp.maximum(masked_mean(log_ratios, mask), 0.0))


def kto_kl_of_other_side(
    logprobs: ArrayLike, ref_logprobs: ArrayLike, labels: ArrayLike, *, mask: ArrayLike | None = None
) -> Array:
    """A baseline for KTO without further forward passes: the mean log-ratio of the samples with the other label.

        z₀ = max(0, mean D over the undesirable)  for a desirable sample, and the other way round

    Unlike `kto_kl`, it moves with what is trained. OpenRLHF's "vanilla" KTO lets gradient through; here it is constant.

    Args:
        logprobs: As `kto_loss`.
        ref_logprobs: As `kto_loss`.
        labels: As `kto_loss`.
        mask: As `kto_loss`.

    Returns:
        `[...]`, for `kl` of `kto_loss`; 0 if the other side is empty.

    Raises:
        ValueError: As `kto_loss`.

    Source: OpenRLHF, `VanillaKTOLoss`.
    """
    samples = make_samples(logprobs, ref_logprobs, labels, mask)
    desirable, undesirable = (
        jnp.maximum(masked_mean(samples.log_ratios, side), 0.0) for side in (samples.desirable, samples.undesirable)
    )
    return jax.lax.stop_gradient(jnp.where(samples.labels, undesirable, desirable))


def kto_balance(
    num_desirable: int, num_undesirable: int, *, low: float = 1.0, high: float = 4 / 3
) -> tuple[float, float]:
    """Weights that make up for unequal numbers of desirable and undesirable samples.

        low ≤ lambda_d n_D / (lambda_u n_U) ≤ high

    The scarcer side is raised just so far that the ratio is in the range, and the other keeps weight 1.

    Unlike `per_side_mean`, it is fixed for a data set, and leaves room for more weight on the desirable side.

    Args:
        num_desirable: n_D, in the data set.
        num_undesirable: n_U.
        low: Lower bound of the ratio.
        high: Upper bound of the ratio. (A later version of the paper says 3/2.)

    Returns:
        lambda_d and lambda_u, for `kto_loss`.

    Raises:
        ValueError: Unless there are samples on both sides and 0 < low ≤ high.

    Source: Ethayarajh et al. 2024, "KTO" (2402.01306), equation 8.
    """
    if num_desirable < 1 or num_undesirable < 1:
        raise ValueError(f"{num_desirable} desirable and {num_undesirable} undesirable samples: KTO needs both")
    if not 0 < low <= high:
        raise ValueError(f"low is {low} and high is {high}: they must be positive and in order")
    ratio = num_desirable / num_undesirable
    return max(1.0, low / ratio), max(1.0, ratio / high)


def _per_sample(kl: ArrayLike, mask: Array) -> Array:
    """One number for all samples, or one each."""
    if jnp.ndim(kl) == 0:
        return jnp.asarray(kl)
    check_mask(mask, kl=kl)
    return fill_masked(kl, mask)


def _mean_of_sides(losses: Array, samples: Samples, normalizer: ArrayLike | None) -> Array:
    sides = (samples.desirable, samples.undesirable)
    counts = jnp.stack([count_true(side) for side in sides]) if normalizer is None else jnp.asarray(normalizer)
    if counts.shape != (2,):
        raise ValueError(
            f"normalizer has shape {counts.shape}: with per_side_mean pass the numbers of desirable and of "
            "undesirable samples, [2]"
        )
    means = safe_divide(jnp.stack([masked_sum(losses, side) for side in sides]), counts)
    return safe_divide(jnp.sum(means), jnp.sum(counts > 0))
