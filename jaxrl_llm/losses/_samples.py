"""What the losses of single labelled completions share: log-ratios, labels, metrics."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._pairs import reference_constant
from jaxrl_llm.masking import check_same_shape, fill_masked, mask_or_all
from jaxrl_llm.records import Mean, Metrics


class Samples(NamedTuple):
    """Completions with a label, `[...]` each, with 0 at the masked ones."""

    logprobs: Array
    log_ratios: Array
    """log π(y)/π_ref(y)."""
    labels: Array
    """Bool, True for the desirable ones."""
    mask: Array

    @property
    def desirable(self) -> Array:
        """Marks the valid samples that are desirable."""
        return self.mask & self.labels

    @property
    def undesirable(self) -> Array:
        """Marks the valid samples that are not."""
        return self.mask & ~self.labels


def make_samples(logprobs: ArrayLike, ref_logprobs: ArrayLike, labels: ArrayLike, mask: ArrayLike | None) -> Samples:
    """Checks the arrays, `[...]` each, and subtracts the reference, a constant."""
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    mask, labels = mask_or_all(mask, logprobs=logprobs), check_labels(labels, logprobs=logprobs)
    policy = fill_masked(logprobs, mask)
    return Samples(policy, policy - reference_constant(ref_logprobs, mask), labels, mask)


def check_labels(labels: ArrayLike, **array: ArrayLike) -> Array:
    """Returns `labels` as an array. Raises ValueError unless it is bool and of the shape of the named array."""
    labels = jnp.asarray(labels)
    if labels.dtype != jnp.bool_:
        raise ValueError(f"labels must be bool, but have dtype {labels.dtype}: pass labels > 0 if 1 means desirable")
    check_same_shape(labels=labels, **array)
    return labels


def sample_metrics(samples: Samples, beta: ArrayLike) -> Metrics:
    """The metrics of both sides, under the names that TRL gives them."""
    rewards = jax.lax.stop_gradient(beta * samples.log_ratios)
    logprobs = jax.lax.stop_gradient(samples.logprobs)
    return {
        "rewards/chosen": Mean.of(rewards, samples.desirable),
        "rewards/rejected": Mean.of(rewards, samples.undesirable),
        "logps/chosen": Mean.of(logprobs, samples.desirable),
        "logps/rejected": Mean.of(logprobs, samples.undesirable),
    }
