"""Metrics that add up: records of a mean, a maximum, moments, merged over micro-batches and devices.

Two records join into exactly the record of both parts, which means of means do not; `value()` is asked for once, at
the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.masking import as_float, count_true, fill_masked, mask_or_all, masked_mean, masked_sum, safe_divide


class Mean(NamedTuple):
    """A mean that is not divided yet: a sum with its denominator.

    Two records add up to the mean over both, which means of means do not, so metrics are merged over
    micro-batches and devices in this form and divided once, at the end.
    """

    total: Array
    count: Array

    @classmethod
    def of(cls, values: ArrayLike, mask: ArrayLike | None = None) -> Mean:
        """Records `values` where `mask` holds (everywhere if there is no mask)."""
        mask = mask_or_all(mask, values=values)
        return cls(masked_sum(values, mask), count_true(mask))

    def merge(self, other: Mean) -> Mean:
        """Joins two records."""
        return Mean(self.total + other.total, self.count + other.count)

    def reduce(self, axis: int = 0) -> Mean:
        """Joins records that are stacked along `axis`, as `lax.scan` and `vmap` return them."""
        return Mean(jnp.sum(self.total, axis), jnp.sum(self.count, axis))

    def value(self) -> Array:
        """The mean; 0 where nothing was counted."""
        return safe_divide(self.total, self.count)


class Max(NamedTuple):
    """The largest of the values recorded, −∞ before the first; merged like `Mean`."""

    maximum: Array

    @classmethod
    def of(cls, values: ArrayLike, mask: ArrayLike | None = None) -> Max:
        """Records `values` where `mask` holds (everywhere if there is no mask)."""
        return cls(jnp.max(fill_masked(values, mask_or_all(mask, values=values), -jnp.inf), initial=-jnp.inf))

    def merge(self, other: Max) -> Max:
        """Joins two records."""
        return Max(jnp.maximum(self.maximum, other.maximum))

    def reduce(self, axis: int = 0) -> Max:
        """Joins records that are stacked along `axis`."""
        return Max(jnp.max(self.maximum, axis))

    def value(self) -> Array:
        """The maximum; 0 where nothing was counted."""
        return jnp.where(jnp.isneginf(self.maximum), 0.0, self.maximum)


class Moments(NamedTuple):
    """Count, mean and spread of what was recorded so far.

    Two records join into exactly that of both together (Chan et al. 1979), so that it serves as a metric that is
    merged over micro-batches and devices, like `Mean`, and as the state of a normalisation.
    """

    count: Array
    mean: Array
    squares: Array
    """Σ (x − mean)²."""

    @classmethod
    def of(cls, values: ArrayLike, mask: ArrayLike | None = None) -> Moments:
        """Records `values` where `mask` holds (everywhere if there is no mask)."""
        mask = mask_or_all(mask, values=values)
        mean = masked_mean(values, mask)
        return cls(count_true(mask), mean, masked_sum((values - mean) ** 2, mask))

    def merge(self, other: Moments) -> Moments:
        """Joins two records."""
        return Moments(*(jnp.stack(pair) for pair in zip(self, other, strict=True))).reduce()

    def reduce(self, axis: int = 0) -> Moments:
        """Joins records that are stacked along `axis`, as `lax.scan` and `vmap` return them."""
        count = jnp.sum(self.count, axis)
        mean = safe_divide(jnp.sum(self.count * self.mean, axis), count)
        between = self.count * (self.mean - jnp.expand_dims(mean, axis)) ** 2
        return Moments(count, mean, jnp.sum(self.squares + between, axis))

    def variance(self, ddof: int = 1) -> Array:
        """Σ (x − mean)² / (count − ddof); 0 where count ≤ ddof."""
        return safe_divide(self.squares, jnp.maximum(self.count - ddof, 0.0))

    def value(self) -> Array:
        """The standard deviation, √variance with ddof 1."""
        return jnp.sqrt(self.variance())


class ExplainedVariance(NamedTuple):
    """The share of the variance of the returns that the values predict: 1 − var(returns − values) / var(returns).

    1 is a perfect critic, 0 one as good as a constant, below 0 a worse one.
    """

    returns: Moments
    errors: Moments

    @classmethod
    def of(cls, values: ArrayLike, returns: ArrayLike, mask: ArrayLike | None = None) -> ExplainedVariance:
        """Records predictions and what they were to predict, where `mask` holds."""
        return cls(Moments.of(returns, mask), Moments.of(as_float(returns) - as_float(values), mask))

    def merge(self, other: ExplainedVariance) -> ExplainedVariance:
        """Joins two records."""
        return ExplainedVariance(self.returns.merge(other.returns), self.errors.merge(other.errors))

    def reduce(self, axis: int = 0) -> ExplainedVariance:
        """Joins records that are stacked along `axis`."""
        return ExplainedVariance(self.returns.reduce(axis), self.errors.reduce(axis))

    def value(self) -> Array:
        """The explained variance; 0 where the returns do not vary, that is, not by more than their rounding."""
        rounding = self.returns.count * (1e-6 * self.returns.mean) ** 2
        varied = jnp.where(self.returns.squares > rounding, self.returns.squares, 0.0)
        return safe_divide(varied - self.errors.squares, varied)


Record = Mean | Max | Moments | ExplainedVariance
Metrics = dict[str, Record]
"""The metrics of a loss, by name."""


def _is_record(node: Any) -> bool:
    return isinstance(node, Record)


def join_parts(left: Any, right: Any) -> Any:
    """Joins two trees of what parts of a batch add up to: arrays are summed, records are merged."""
    return jax.tree.map(lambda a, b: a.merge(b) if _is_record(a) else a + b, left, right, is_leaf=_is_record)


def nothing_yet(like: Any) -> Any:
    """What `join_parts` of it and any tree like that (of arrays or shapes) leaves as it is."""

    def empty(node: Any) -> Any:
        if isinstance(node, Max):
            return Max(jnp.full(node.maximum.shape, -jnp.inf, node.maximum.dtype))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), node)

    return jax.tree.map(empty, like, is_leaf=_is_record)
