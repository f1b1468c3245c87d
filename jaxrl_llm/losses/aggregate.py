"""How per-token losses become one number: token and sequence means with a global denominator.

Every mode is one formula, with weights w that depend on the mask alone and a denominator N that adds up
over the parts of a batch:

    loss = Σ wₜ Lₜ / N

| mode                    | wₜ on valid tokens                     | N         | also known as               |
|-------------------------|----------------------------------------|-----------|-----------------------------|
| token-mean              | 1                                      | tokens    | DAPO; TRL `dapo`; verl      |
| seq-mean-token-mean     | 1 / tokens of its sequence             | sequences | GRPO (paper); TRL `grpo`    |
| seq-mean-token-sum      | 1                                      | sequences | Dr. GRPO (paper); LUSPO     |
| seq-mean-token-sum-norm | 1 / max_length                         | sequences | Dr. GRPO (code)             |
| token-sum               | 1                                      | none      |                             |
| group-mean-token-mean   | 1 / tokens of its group                | groups    | DAPO, prompt by prompt      |
| group-sum-token-mean    | 1 / (tokens of its sequence            | none      | sum over the groups of      |
|                         | · sequences of its group)              |           | `seq-mean-token-mean`       |

The mean of the means of micro-batches is another loss, unless all have the same counts. So N is computed
once, over the whole batch of an optimizer step (`aggregation_normalizer` of the whole mask, or the sum
over its parts), and given to each part as `normalizer`: then losses and gradients of the parts *sum* to
the whole's. The two group modes moreover need all rows of a group in one part, since their weights look
at the whole group. Under `jit` with sharded arrays all counts are global as they stand.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.masking import (
    check_mask,
    count_true,
    fill_masked,
    group_first,
    group_total,
    safe_divide,
    segment_first,
    segment_total,
)

AggregationMode = Literal[
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
    "group-mean-token-mean",
    "group-sum-token-mean",
]


def aggregate(
    values: ArrayLike,
    mask: ArrayLike,
    *,
    mode: AggregationMode,
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> Array:
    """Reduces a per-token loss to a scalar; the table at the top of this file defines the modes.

    Args:
        values: Per-token losses `[..., T]`; whatever is at masked positions is ignored.
        mask: Bool `[..., T]`, True on the tokens that count.
        mode: What is averaged over what.
        normalizer: The denominator N of the whole batch of which these rows are a part, from
            `aggregation_normalizer`. None: these rows are the whole batch. The two modes that are sums
            have no denominator and do not look at it, so that one way of calling is right for all modes.
        max_length: The constant of "seq-mean-token-sum-norm", the configured completion length. (The
            padded width of a batch would make the loss depend on its padding.)
        segment_ids: Integers `[..., T]` where rows hold packed sequences, each a run of equal ids.
        group_ids: Labels `[...]` of the rows' groups, for the group modes. None: the groups are axis −2
            of `[..., G, T]`, as in `[P, G, T]`.
        count_empty: Whether sequences (and groups) without a valid token count in N. In TRL they do.

    Returns:
        A float32 scalar; 0, with gradient 0, if nothing counts.

    Raises:
        ValueError: On unequal shapes, an unknown mode, or an argument that the mode needs and lacks.
    """
    values = fill_masked(values, mask)
    weights = aggregation_weights(
        mask,
        mode=mode,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )
    if normalizer is None or mode in ("token-sum", "group-sum-token-mean"):
        normalizer = aggregation_normalizer(
            mask, mode=mode, segment_ids=segment_ids, group_ids=group_ids, count_empty=count_empty
        )
    return safe_divide(jnp.sum(values * weights), normalizer)


def aggregation_normalizer(
    mask: ArrayLike,
    *,
    mode: AggregationMode,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> Array:
    """The denominator N of a mode for these rows: the number of tokens, sequences or groups; 1 for the sums.

    Arguments as for `aggregate`. The counts of the parts of a batch add up to that of the whole.

    Returns:
        A float32 scalar.
    """
    mask = _check(mask, mode, segment_ids, group_ids, count_empty)
    match mode:
        case "token-mean":
            return count_true(mask)
        case "token-sum" | "group-sum-token-mean":
            return jnp.float32(1)
        case "group-mean-token-mean":
            return count_true(group_first(_sequences_per_row(mask, segment_ids, count_empty) > 0, group_ids))
        case _:
            return jnp.sum(_sequences_per_row(mask, segment_ids, count_empty))


def aggregation_weights(
    mask: ArrayLike,
    *,
    mode: AggregationMode,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> Array:
    """The weight w of each token in a mode; arguments as for `aggregate`.

    Returns:
        Float32 `[..., T]`, 0 at masked positions.
    """
    mask = _check(mask, mode, segment_ids, group_ids, count_empty)
    ones = mask.astype(jnp.float32)
    match mode:
        case "token-mean" | "token-sum" | "seq-mean-token-sum":
            return ones
        case "seq-mean-token-sum-norm":
            if max_length is None:
                raise ValueError("aggregation mode 'seq-mean-token-sum-norm' divides by max_length: pass it")
            if isinstance(max_length, int | float) and not max_length > 0:
                raise ValueError(f"max_length is {max_length}: it must be positive")
            return ones / max_length
        case "group-mean-token-mean":
            return safe_divide(ones, _sum_over_group(count_true(mask, -1), group_ids)[..., None])
        case _:
            weights = safe_divide(ones, segment_total(ones, mask, segment_ids))
            if mode == "seq-mean-token-mean":
                return weights
            sequences = _sum_over_group(_sequences_per_row(mask, segment_ids, count_empty), group_ids)
            return safe_divide(weights, sequences[..., None])


def _check(
    mask: ArrayLike,
    mode: str,
    segment_ids: ArrayLike | None,
    group_ids: ArrayLike | None,
    count_empty: bool,
) -> Array:
    mask = check_mask(mask, segment_ids=segment_ids)
    if mode not in get_args(AggregationMode):
        modes = ", ".join(get_args(AggregationMode))
        raise ValueError(f"unknown aggregation mode {mode!r}: choose one of {modes}")
    if count_empty and segment_ids is not None:
        raise ValueError("count_empty with segment_ids: an empty packed sequence is not told from padding")
    if group_ids is not None and np.shape(group_ids) != mask.shape[:-1]:
        raise ValueError(
            f"group_ids has shape {np.shape(group_ids)}, but mask has shape {mask.shape}: pass one label for each row"
        )
    if group_ids is None and mode.startswith("group-") and mask.ndim < 3:
        raise ValueError(
            f"aggregation mode {mode!r} with mask of shape {mask.shape}: "
            "pass group_ids, or arrays [P, G, T] with the groups on axis -2"
        )
    return mask


def _sequences_per_row(mask: Array, segment_ids: ArrayLike | None, count_empty: bool) -> Array:
    """Number of sequences in each row that count: `[..., T]` to `[...]`."""
    return jnp.ones(mask.shape[:-1], jnp.float32) if count_empty else count_true(segment_first(mask, segment_ids), -1)


def _sum_over_group(rows: Array, group_ids: ArrayLike | None) -> Array:
    return group_total(rows, jnp.ones(rows.shape, bool), group_ids)
