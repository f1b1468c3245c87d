"""What the losses of preference pairs share: log-ratios of both sides, the mean over valid pairs, the metrics."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.masking import check_same_shape, count_true, fill_masked, mask_or_all, masked_sum, safe_divide
from jaxrl_llm.records import Mean, Metrics


class Pairs(NamedTuple):
    """Both sides of preference pairs, `[...]` each, with 0 at the masked pairs."""

    chosen_logprobs: Array
    rejected_logprobs: Array
    chosen_log_ratios: Array
    """log π(y)/π_ref(y) of the chosen completion; without a reference, log π(y)."""
    rejected_log_ratios: Array
    mask: Array

    @property
    def margin(self) -> Array:
        """The log-ratio of the chosen side minus that of the rejected one, h."""
        return self.chosen_log_ratios - self.rejected_log_ratios


def make_pairs(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike | None,
    ref_rejected_logprobs: ArrayLike | None,
    mask: ArrayLike | None,
) -> Pairs:
    """Checks the arrays of the two sides, `[...]` each, and subtracts the reference, a constant, if there is one."""
    check_same_shape(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    check_together(ref_chosen_logprobs=ref_chosen_logprobs, ref_rejected_logprobs=ref_rejected_logprobs)
    mask = mask_or_all(mask, chosen_logprobs=chosen_logprobs)
    chosen, rejected = fill_masked(chosen_logprobs, mask), fill_masked(rejected_logprobs, mask)
    return Pairs(
        chosen,
        rejected,
        chosen - reference_constant(ref_chosen_logprobs, mask),
        rejected - reference_constant(ref_rejected_logprobs, mask),
        mask,
    )


def reference_constant(ref_logprobs: ArrayLike | None, mask: Array) -> Array:
    """The reference's log-probs as constants with 0 at the masked places; 0 without a reference."""
    return (
        jnp.zeros((), jnp.float32) if ref_logprobs is None else jax.lax.stop_gradient(fill_masked(ref_logprobs, mask))
    )


def divide_by_lengths(x: Array, lengths: ArrayLike, mask: Array, name: str) -> Array:
    """Sums over tokens to means; 0 where a length is 0. `name` is that of `lengths` in an error."""
    check_same_shape(chosen_logprobs=mask, **{name: lengths})
    check_lengths(**{name: lengths})
    return safe_divide(x, fill_masked(lengths, mask, 1.0))


def divide_pairs_by_lengths(
    pairs: Pairs, chosen_lengths: ArrayLike | None, rejected_lengths: ArrayLike | None
) -> Pairs:
    """Divides both sides' log-ratios by their lengths, if there are any."""
    check_together(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    if chosen_lengths is None or rejected_lengths is None:
        return pairs
    chosen, rejected, mask = pairs.chosen_log_ratios, pairs.rejected_log_ratios, pairs.mask
    return pairs._replace(
        chosen_log_ratios=divide_by_lengths(chosen, chosen_lengths, mask, "chosen_lengths"),
        rejected_log_ratios=divide_by_lengths(rejected, rejected_lengths, mask, "rejected_lengths"),
    )


def mean_over(
    losses: Array, mask: Array, *, weights: ArrayLike | None = None, normalizer: ArrayLike | None = None
) -> Array:
    """Σ weights · losses over what is valid, divided by its number, or by `normalizer`, that of the whole batch.

    Raises:
        ValueError: On losses that are not of the shape of `mask`, because a coefficient was not, unequal shapes of the
            weights, or a normalizer that is not one number.
    """
    if losses.shape != mask.shape:
        raise ValueError(
            f"the losses have shape {losses.shape}, but mask has shape {mask.shape}: a coefficient (beta, …) must be "
            "one number, or an array of the mask's shape"
        )
    if weights is not None:
        check_same_shape(mask=mask, weights=weights)
        losses = losses * jax.lax.stop_gradient(fill_masked(weights, mask))
    return divide_by_count(masked_sum(losses, mask), count_true(mask), normalizer, "normalizer")


def divide_by_count(total: Array, count: Array, normalizer: ArrayLike | None, name: str) -> Array:
    """Divides by `normalizer`, one number, or if it is None by `count`. `name` is that of `normalizer` in an error."""
    if normalizer is None:
        return safe_divide(total, count)
    if jnp.ndim(normalizer):
        raise ValueError(f"{name} has shape {jnp.shape(normalizer)}: pass one number, the count of the whole batch")
    return safe_divide(total, normalizer)


def pair_metrics(pairs: Pairs, chosen_rewards: Array, rejected_rewards: Array) -> Metrics:
    """The metrics of every loss of pairs, under the names that TRL gives them."""
    records = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": chosen_rewards > rejected_rewards,
        "logps/chosen": pairs.chosen_logprobs,
        "logps/rejected": pairs.rejected_logprobs,
    }
    return {name: Mean.of(jax.lax.stop_gradient(values), pairs.mask) for name, values in records.items()}


def reduce_pairs(
    losses: Array, pairs: Pairs, *, beta: ArrayLike, weights: ArrayLike | None, normalizer: ArrayLike | None
) -> tuple[Array, Metrics]:
    """The mean over the valid pairs, and metrics with beta · log-ratio as a side's reward."""
    loss = mean_over(losses, pairs.mask, weights=weights, normalizer=normalizer)
    return loss, pair_metrics(pairs, pairs.chosen_log_ratios * beta, pairs.rejected_log_ratios * beta)


def check_lengths(**lengths: ArrayLike) -> None:
    """Raises ValueError unless lengths are integers, so that the reference's log-probs are not taken for them."""
    for name, x in lengths.items():
        dtype = jnp.asarray(x).dtype
        if not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {dtype}: pass numbers of tokens, integers such as mask.sum(-1)")


def check_together(**arguments: ArrayLike | None) -> None:
    """Raises ValueError if some of the arguments are None and others are not."""
    missing = [name for name, x in arguments.items() if x is None]
    if missing and len(missing) < len(arguments):
        raise ValueError(
            f"{' and '.join(arguments)} go together, but {' and '.join(missing)} is None: pass all of them or none"
        )


def check_label_smoothing(label_smoothing: ArrayLike) -> None:
    """Raises ValueError unless a plain number is in [0, 0.5): at 0.5 the labels say nothing."""
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: it is the share of wrong labels, in [0, 0.5)")
