"""What several advantage estimators need of a group: its moments, the ranks in it, sums across its rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.masking import (
    check_mask,
    fill_masked,
    group_first,
    group_total,
    safe_divide,
)


class GroupStatistics(NamedTuple):
    """Statistics of each sample's group, of the shape of the samples."""

    count: Array
    mean: Array
    sum_of_squares: Array
    is_constant: Array
    """No two valid values differ, by an exact comparison."""

    def variance(self, ddof: int) -> Array:
        """The variance; 0 in groups of `ddof` valid samples or fewer."""
        return safe_divide(self.sum_of_squares, jnp.maximum(self.count - ddof, 0))


def group_statistics(x: ArrayLike, mask: ArrayLike, group_ids: ArrayLike | None = None) -> GroupStatistics:
    """Moments over the valid samples of each group; arguments as for `jaxrl_llm.masking.group_total`."""
    x = fill_masked(x, mask)
    count = group_total(mask, mask, group_ids)
    mean = safe_divide(group_total(x, mask, group_ids), count)
    sum_of_squares = group_total((x - mean) ** 2, mask, group_ids)
    # Not highest == lowest: a NaN differs from itself and so keeps its group from passing for a constant one.
    first = group_total(x, group_first(mask, group_ids), group_ids)
    is_constant = group_total(x != first, mask, group_ids) == 0
    return GroupStatistics(count, mean, sum_of_squares, is_constant)


def group_labels(group_ids: ArrayLike | None, group_size: int | None, **samples: Any) -> ArrayLike | None:
    """The labels of samples by group, or `None` where the last of several axes is a group.

    Args:
        group_ids: Labels of the samples; equal ones, wherever they are, form a group.
        group_size: G, where the G samples of a prompt lie one after another along the last axis.
        samples: The one array whose shape is that of the samples, by its name in errors.

    Raises:
        ValueError: On both, on a size that does not divide the last axis, and on a single axis with neither: which
            samples of a flat batch share a prompt is to be said.
    """
    ((name, array),) = samples.items()
    shape = np.shape(array)
    if group_ids is not None and group_size is not None:
        raise ValueError(f"group_ids and group_size={group_size} are both given: pass one of them")
    if group_size is not None:
        if not shape or group_size < 1 or shape[-1] % group_size:
            raise ValueError(f"group_size is {group_size}, but {name} has shape {shape}: it must divide the last axis")
        return np.arange(math.prod(shape)).reshape(shape) // group_size
    if group_ids is None and len(shape) < 2:
        raise ValueError(
            f"{name} has shape {shape}, which does not say which samples share a prompt: pass group_size= if those "
            "of a prompt lie one after another, group_ids=, or an array [P, G]"
        )
    return group_ids


def group_rank(x: ArrayLike, mask: ArrayLike, group_ids: ArrayLike | None = None) -> Array:
    """The rank of each sample in its group: 0 for the largest valid one.

    Of equal ones the first has the lower rank; masked samples come after all valid ones.

    Args:
        x: `[..., G]`, a group along the last axis; or any shape with `group_ids`.
        mask: Bool, of the shape of `x`.
        group_ids: Labels of the shape of `x`; equal ones, wherever they are, form a group.

    Returns:
        Integers of the shape of `x`.
    """
    mask = check_mask(mask, x=x, group_ids=group_ids)
    descending = -fill_masked(x, mask)
    if group_ids is None:
        return jnp.argsort(jnp.lexsort((descending, ~mask)))
    ids = jnp.ravel(group_ids)
    order = jnp.lexsort((descending.ravel(), ~mask.ravel(), ids))
    sorted_ids = ids[order]
    position = jnp.arange(ids.size)
    is_start = jnp.concatenate([jnp.ones(1, bool), sorted_ids[1:] != sorted_ids[:-1]])[: ids.size]
    start = jax.lax.cummax(jnp.where(is_start, position, 0))
    rank = jnp.zeros_like(position).at[order].set(position - start, unique_indices=True)
    return rank.reshape(mask.shape)


def rows_total(x: ArrayLike, mask: ArrayLike, group_ids: ArrayLike | None = None) -> Array:
    """Gives every token the sum, over the rows of its group, of the valid tokens at its position.

    Args:
        x: `[..., G, T]`, the rows of a group along axis −2; or `[..., T]` with `group_ids`.
        mask: Bool, of the shape of `x`.
        group_ids: Labels `[...]` of the rows.

    Returns:
        The shape of `x`.
    """
    values = fill_masked(x, mask)
    if group_ids is None:
        return jnp.broadcast_to(jnp.sum(values, axis=-2, keepdims=True), values.shape)
    return jax.vmap(group_total, in_axes=(-1, -1, None), out_axes=-1)(values, jnp.asarray(mask), group_ids)


def row_labels(group_ids: ArrayLike | None, group_size: int | None, **rows: Any) -> ArrayLike | None:
    """`group_labels` of rows `[..., T]`: `None` where axis −2 of `[..., P, G, T]` is a group."""
    ((name, array),) = rows.items()
    shape = np.shape(array)
    if group_ids is not None and np.shape(group_ids) != shape[:-1]:
        raise ValueError(
            f"group_ids has shape {np.shape(group_ids)}, but {name} has shape {shape}: pass one label for each row"
        )
    if group_ids is None and group_size is None and len(shape) < 3:
        raise ValueError(
            f"{name} has shape {shape}, which does not say which rows share a prompt: pass group_size= if those of a "
            "prompt lie one after another, group_ids=, or an array [P, G, T]"
        )
    return group_labels(group_ids, group_size, **{f"rows of {name}": jax.ShapeDtypeStruct(shape[:-1], bool)})


def whiten_by_length(x: ArrayLike, lengths: ArrayLike, mask: ArrayLike, *, ddof: int = 1, eps: float = 1e-8) -> Array:
    """What `jaxrl_llm.masking.whiten` over tokens gives where all tokens of a sequence hold one number.

    Args:
        x: The number of each sequence, any shape.
        lengths: How many tokens hold it, of the shape of `x`.
        mask: Bool, of the shape of `x`: False for sequences that have no part.
        ddof: Subtracted from the number of tokens in the variance.
        eps: Added to the variance, inside the root.

    Returns:
        The shape of `x`, 0 where masked.
    """
    mask = check_mask(mask, x=x, lengths=lengths)
    counts, values = fill_masked(lengths, mask), fill_masked(x, mask)
    total = jnp.sum(counts)
    centred = values - safe_divide(jnp.sum(counts * values), total)
    variance = safe_divide(jnp.sum(counts * centred**2), jnp.maximum(total - ddof, 0))
    return jnp.where(mask, centred * jax.lax.rsqrt(variance + eps), 0.0)


def safe_sqrt(x: Array) -> Array:
    """√x with gradient 0 at x = 0, where the true one is infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)
