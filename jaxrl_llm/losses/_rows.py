"""What all policy losses share: checked and filled rows, constant weights, and the metrics of a ratio."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.kl import kl_k3
from jaxrl_llm.losses.ratio import ClipIndicators, clamp_log_ratio
from jaxrl_llm.masking import check_mask, fill_masked, per_token
from jaxrl_llm.records import Max, Mean, Metrics


class PolicyRows(NamedTuple):
    """Arrays `[..., T]` with 0 at the padding, through which no gradient flows."""

    logprobs: Array
    old_logprobs: Array
    """A constant, like all that follow."""
    advantages: Array
    mask: Array
    weights: Array | None

    @property
    def inputs(self) -> tuple[Array, Array, Array]:
        """Log-probs, old log-probs and advantages, as the terms take them."""
        return self.logprobs, self.old_logprobs, self.advantages

    @property
    def log_ratio(self) -> Array:
        """The logarithm of π/π_old at each token."""
        return self.logprobs - self.old_logprobs

    def weigh(self, losses: Array) -> Array:
        """Multiplies the policy term by the weights; one that is 0 removes the token, whatever its loss is."""
        return losses if self.weights is None else jnp.where(self.weights == 0, 0.0, losses * self.weights)


def policy_rows(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> PolicyRows:
    """Checks the arguments of a policy loss and fills their padding; `grpo_loss` describes them.

    Raises:
        ValueError: On shapes that do not fit or a mask that is not bool.
    """
    mask = check_mask(mask, logprobs=logprobs, old_logprobs=old_logprobs, segment_ids=segment_ids)

    def constant(**array: ArrayLike) -> Array:
        return jax.lax.stop_gradient(fill_masked(per_token(mask, packed=segment_ids is not None, **array), mask))

    filled = fill_masked(logprobs, mask)
    return PolicyRows(
        logprobs=filled,
        old_logprobs=jax.lax.stop_gradient(filled if old_logprobs is None else fill_masked(old_logprobs, mask)),
        advantages=constant(advantages=advantages),
        mask=mask,
        weights=None if weights is None else constant(weights=weights),
    )


def ratio_metrics(rows: PolicyRows, log_ratio: Array | None = None, where: Array | None = None) -> Metrics:
    """The metrics `ratio/mean` and `ratio/max` of each token's ratio, and KL(old policy ‖ policy) by two estimators.

    These are `approx_kl/k1`, the mean of −log r, unbiased and possibly negative, and `approx_kl/k3`, the mean of
    r − 1 − log r, which is never negative.

    Args:
        rows: The rows of the loss.
        log_ratio: That of sequences, `[..., T]`, if the loss is about these.
        where: Marks the places of `log_ratio` that count.
    """
    tokens = jax.lax.stop_gradient(clamp_log_ratio(rows.log_ratio))
    ratio = jnp.exp(tokens if log_ratio is None else jax.lax.stop_gradient(log_ratio))
    where = rows.mask if where is None else where
    return {
        "ratio/mean": Mean.of(ratio, where),
        "ratio/max": Max.of(ratio, where),
        "approx_kl/k1": Mean.of(-tokens, rows.mask),
        "approx_kl/k3": Mean.of(kl_k3(jnp.zeros_like(tokens), tokens), rows.mask),
    }


def clip_metrics(clipped: ClipIndicators, where: Array) -> Metrics:
    """The metrics `clip_ratio/low_mean`, `…/high_mean` and `…/region_mean` over the places marked.

    With a dual clip or a cap on the ratio, `…/dual_mean` and `…/cap_mean`, too.
    """
    shares = clipped._asdict() | {"region": clipped.region}
    return {f"clip_ratio/{name}_mean": Mean.of(share, where) for name, share in shares.items() if share is not None}


def check_positive(**numbers: ArrayLike | None) -> None:
    """Raises ValueError for a plain number that is not positive and finite; traced ones cannot be looked at."""
    _check(numbers, "positive", lambda x: x > 0)


def check_not_negative(**numbers: ArrayLike | None) -> None:
    """Raises ValueError for a plain number that is negative or not finite; traced ones cannot be looked at."""
    _check(numbers, "not negative", lambda x: x >= 0)


def check_bounds(w_min: ArrayLike | None, w_max: ArrayLike | None) -> None:
    """Raises ValueError for bounds on a weight that are negative or in the wrong order, if plain numbers."""
    check_not_negative(w_min=w_min, w_max=w_max)
    if isinstance(w_min, int | float) and isinstance(w_max, int | float) and w_min > w_max:
        raise ValueError(f"w_min is {w_min} and w_max is {w_max}: no weight is between them")


def _check(numbers: dict[str, ArrayLike | None], wanted: str, holds: Callable[[float], bool]) -> None:
    for name, x in numbers.items():
        if isinstance(x, int | float) and not (math.isfinite(x) and holds(x)):
            raise ValueError(f"{name} is {x}: it must be finite and {wanted}")
