"""Statistics of ragged arrays: masked sums, moments and suffix sums, over rows, packed segments and groups.

Arrays are `[..., T]` with a bool `mask` of the same shape. What lies at a masked position never matters,
neither for the value nor for the gradient, be it NaN or infinite. Arithmetic is in float32 (float64
stays float64).
"""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

Axis = int | tuple[int, ...] | None


def as_float(x: ArrayLike) -> Array:
    """Returns `x` as float32, or as float64 if it is float64: half precision and integers are widened."""
    x = jnp.asarray(x)
    return x.astype(jnp.result_type(x, jnp.float32))  # of a plain number, float32 under x64, too


def check_same_shape(**arrays: ArrayLike | None) -> None:
    """Raises ValueError, naming the argument and both shapes, unless all arrays (not None) have one shape."""
    shapes = {name: np.shape(x) for name, x in arrays.items() if x is not None}
    first, *others = shapes
    for name in others:
        if shapes[name] != shapes[first]:
            raise ValueError(
                f"{name} has shape {shapes[name]}, but {first} has shape {shapes[first]}: they must be equal"
            )


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises ValueError, naming them, unless `value` is one of the `choices`, a `Literal` type."""
    if value not in get_args(choices):
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(get_args(choices))}")


def check_mask(mask: ArrayLike, **arrays: ArrayLike | None) -> Array:
    """Returns `mask` as an array. Raises ValueError unless it is bool and the named arrays have its shape."""
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be bool, but has dtype {mask.dtype}: pass mask != 0 if 0 means masked")
    check_same_shape(mask=mask, **arrays)
    return mask


def mask_or_all(mask: ArrayLike | None, **array: ArrayLike) -> Array:
    """Returns `mask`, checked, or without one an all-True mask for the one named array."""
    (x,) = array.values()
    return jnp.ones(np.shape(x), bool) if mask is None else check_mask(mask, **array)


def per_token(tokens: ArrayLike, *, packed: bool = False, **array: ArrayLike) -> Array:
    """Broadcasts the one named array over tokens: from `[...]`, one for each sequence, or as it is.

    Args:
        tokens: Any array `[..., T]` of tokens; only its shape matters.
        packed: Whether its rows hold several sequences, so that one number for a row is not one for each sequence.
        array: The array, by its name in errors.

    Raises:
        ValueError: On a shape that does not fit.
    """
    ((name, x),) = array.items()
    shape, wanted = np.shape(x), np.shape(tokens)
    if shape == wanted:
        return jnp.asarray(x)
    if packed or shape != wanted[:-1]:
        way_out = "with segment_ids a row holds several sequences, so pass one for each token"
        raise ValueError(
            f"{name} has shape {shape}, but the tokens have shape {wanted}: "
            + (way_out if packed else "pass one for each token, or one for each sequence")
        )
    return jnp.broadcast_to(jnp.asarray(x)[..., None], wanted)


def length_mask(lengths: ArrayLike, size: int) -> Array:
    """Marks the first `lengths` of `size` positions: `[...]` integers to bool `[..., size]`.

    Masks come from lengths and never from token ids, so that a padding id that is also the
    end-of-sequence id is no trouble.
    """
    return jnp.arange(size) < jnp.asarray(lengths)[..., None]


def fill_masked(x: ArrayLike, mask: ArrayLike, value: float = 0.0) -> Array:
    """Returns `x` as floats with `value` at the masked positions, through which no gradient flows.

    To be applied to the *inputs* of a function that may not be finite at the padding (exp, log, √): with a
    `where` on its output alone, the gradient is 0 times the unused branch's derivative, which may be NaN.
    """
    return jnp.where(check_mask(mask, x=x), as_float(x), value)


def fill_unusable(logits: Array) -> tuple[Array, Array]:
    """Logits `[..., V]` with zeros in the rows that are no distribution, and a mask `[...]` of the others.

    A row with a NaN or +∞, or of nothing but −∞, has no softmax. (Hidden states `[..., D]` likewise.) What is computed
    of its zeros is to be replaced by NaN: then the loss shows it, unless it masks it, and no gradient flows through it.
    A `where` on the output alone would give 0 times the derivative at a NaN, which is NaN, also where the loss masks
    it.
    """
    usable = jnp.isfinite(jnp.max(logits, axis=-1))  # NaN where there is one
    return jnp.where(usable[..., None], logits, 0.0), usable


def safe_divide(total: ArrayLike, count: ArrayLike) -> Array:
    """The quotient total / count, and 0 (value and gradient) where count is 0."""
    nonzero = jnp.asarray(count) != 0
    return jnp.where(nonzero, total / jnp.where(nonzero, count, 1), 0.0)


def count_true(mask: ArrayLike, axis: Axis = None, *, keepdims: bool = False) -> Array:
    """Number of True elements as float32; counted in integers, since a float32 counter stops at 2²⁴."""
    return jnp.sum(jnp.asarray(mask), axis, keepdims=keepdims, dtype=jnp.int32).astype(jnp.float32)


def masked_sum(x: ArrayLike, mask: ArrayLike, axis: Axis = None, *, keepdims: bool = False) -> Array:
    """Σ x over the valid positions of `axis` (all axes by default)."""
    return jnp.sum(fill_masked(x, mask), axis, keepdims=keepdims)


def masked_mean(x: ArrayLike, mask: ArrayLike, axis: Axis = None, *, keepdims: bool = False) -> Array:
    """Σ x / N over the N valid positions of `axis`; 0 where there are none."""
    return safe_divide(masked_sum(x, mask, axis, keepdims=keepdims), count_true(mask, axis, keepdims=keepdims))


def masked_var(x: ArrayLike, mask: ArrayLike, axis: Axis = None, *, ddof: int = 1, keepdims: bool = False) -> Array:
    """Σ (x − mean)² / (N − ddof) over the N valid positions of `axis`; 0 where N ≤ ddof.

    `ddof=1` is the unbiased estimator, `ddof=0` the population variance.
    """
    deviation = fill_masked(x, mask) - masked_mean(x, mask, axis, keepdims=True)
    degrees = jnp.maximum(count_true(mask, axis, keepdims=keepdims) - ddof, 0.0)
    return safe_divide(masked_sum(deviation**2, mask, axis, keepdims=keepdims), degrees)


def whiten(x: ArrayLike, mask: ArrayLike, *, ddof: int = 1, shift_mean: bool = True, eps: float = 1e-8) -> Array:
    """Scales all valid elements of `x` together to mean 0 and variance 1.

        (x − mean) / √(var + eps)        and 0 at masked positions

    Args:
        x: Any shape.
        mask: Bool, of the shape of `x`.
        ddof: 1 for the unbiased variance (PPO in TRL and verl), 0 for that of the population.
        shift_mean: False adds the mean back after the scaling.
        eps: Added to the variance, inside the root.

    Returns:
        An array of the shape of `x`. Fewer than two valid elements give zeros (or the mean).
    """
    mean = masked_mean(x, mask)
    scaled = (fill_masked(x, mask) - mean) * jax.lax.rsqrt(masked_var(x, mask, ddof=ddof) + eps)
    return jnp.where(mask, scaled if shift_mean else scaled + mean, 0.0)


def suffix_sum(
    x: ArrayLike, mask: ArrayLike, *, discount: ArrayLike = 1.0, segment_ids: ArrayLike | None = None
) -> Array:
    """Discounted sum from each valid token to the end of its sequence (reward-to-go).

        Gₜ = xₜ + discount · Gₜ′        t′ the next valid token

    A masked token (padding, or an observation amid a completion) adds nothing, discounts nothing and does
    not cut the sum: what comes after it reaches what comes before it.

    Args:
        x: `[..., T]`.
        mask: Bool `[..., T]`.
        discount: Factor per valid token.
        segment_ids: Integers `[..., T]` of a packed row: the sum stops where the id changes.

    Returns:
        `[..., T]`, 0 at masked positions.
    """
    values = fill_masked(x, mask)
    decay = jnp.where(mask, discount, 1.0).astype(values.dtype)
    if segment_ids is not None:
        check_same_shape(mask=mask, segment_ids=segment_ids)
        decay = jnp.where(_segment_ends(segment_ids), 0.0, decay)
    return jnp.where(mask, _linear_scan(decay, values, reverse=True), 0.0)


def segment_total(x: ArrayLike, mask: ArrayLike, segment_ids: ArrayLike | None = None) -> Array:
    """Gives every position the sum over the valid tokens of its segment.

    Args:
        x: `[..., T]`.
        mask: Bool `[..., T]`.
        segment_ids: Integers `[..., T]`: a segment is a run of equal ids. None: each row is one.

    Returns:
        `[..., T]`.
    """
    values = fill_masked(x, mask)
    if segment_ids is None:
        return jnp.broadcast_to(jnp.sum(values, axis=-1, keepdims=True), values.shape)
    # Two scans and not a scatter-add: that is atomic on some accelerators, hence not reproducible.
    check_same_shape(mask=mask, segment_ids=segment_ids)
    ends = _segment_ends(segment_ids)
    inside = 1.0 - ends.astype(values.dtype)
    from_start = _linear_scan(jnp.roll(inside, 1, axis=-1), values, reverse=False)
    return _linear_scan(inside, jnp.where(ends, from_start, 0.0), reverse=True)


def segment_first(mask: ArrayLike, segment_ids: ArrayLike | None = None) -> Array:
    """Marks the first valid token of each segment (of each row, without ids), to count segments."""
    mask = check_mask(mask, segment_ids=segment_ids)
    if segment_ids is None:
        width = mask.shape[-1]
        places = jnp.arange(width)
        first = jnp.min(jnp.where(mask, places, width), axis=-1, keepdims=True, initial=width)
        return mask & (places == first)
    rank = jnp.cumsum(mask, axis=-1)
    starts = jnp.roll(_segment_ends(segment_ids), 1, axis=-1)
    return mask & (rank - jax.lax.cummax(jnp.where(starts, rank - mask, 0), axis=mask.ndim - 1) == 1)


def segment_last(mask: ArrayLike, segment_ids: ArrayLike | None = None) -> Array:
    """Marks the last valid token of each segment (of each row, without ids): where a sequence's score belongs."""
    mask = check_mask(mask, segment_ids=segment_ids)
    backwards = None if segment_ids is None else jnp.flip(jnp.asarray(segment_ids), -1)
    return jnp.flip(segment_first(jnp.flip(mask, -1), backwards), -1)


def next_valid(x: ArrayLike, mask: ArrayLike, segment_ids: ArrayLike | None = None) -> Array:
    """Gives every position the value at the next valid token of its segment, and 0 after the last one."""
    mask = check_mask(mask, x=x, segment_ids=segment_ids)
    last = jnp.arange(mask.shape[-1]) == mask.shape[-1] - 1
    ends = jnp.broadcast_to(last, mask.shape) if segment_ids is None else _segment_ends(segment_ids)
    values = fill_masked(x, mask)
    held = _linear_scan(jnp.where(mask | ends, 0.0, 1.0).astype(values.dtype), values, reverse=True)
    return jnp.where(ends, 0.0, jnp.roll(held, -1, axis=-1))


def _segment_ends(segment_ids: ArrayLike) -> Array:
    """Marks the last position of each run of equal ids."""
    ids = jnp.asarray(segment_ids)
    return jnp.concatenate([ids[..., 1:] != ids[..., :-1], jnp.ones_like(ids[..., :1], bool)], axis=-1)


def _linear_scan(decay: Array, values: Array, *, reverse: bool) -> Array:
    """The recurrence sₜ = valuesₜ + decayₜ · sₜ₋₁ along the last axis (sₜ₊₁ if reversed)."""
    time_first = (jnp.moveaxis(decay, -1, 0), jnp.moveaxis(values, -1, 0))
    _, sums = jax.lax.scan(_linear_step, jnp.zeros(values.shape[:-1], values.dtype), time_first, reverse=reverse)
    return jnp.moveaxis(sums, 0, -1)


def _linear_step(carry: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
    decay, value = now
    carry = value + jnp.where(decay == 0, 0.0, decay * carry)  # a cut stops NaN and ∞, too
    return carry, carry


def group_total(x: ArrayLike, mask: ArrayLike, group_ids: ArrayLike | None = None) -> Array:
    """Gives every sample the sum over the valid samples of its group.

    Args:
        x: One number for each sample: `[..., G]` with a group along the last axis, or any shape with ids.
        mask: Bool, of the shape of `x`.
        group_ids: Integers of the shape of `x`; equal ones, wherever they are, form a group.
    """
    if group_ids is None:
        return segment_total(x, mask)
    mask = check_mask(mask, x=x, group_ids=group_ids)
    order, ids = _sort_groups(group_ids)
    total = segment_total(jnp.ravel(x)[order], mask.ravel()[order], ids)
    return _unsort(total, order).reshape(np.shape(x))


def group_first(mask: ArrayLike, group_ids: ArrayLike | None = None) -> Array:
    """Marks the first valid sample of each group, to count groups; arguments as for `group_total`."""
    mask = check_mask(mask, group_ids=group_ids)
    if group_ids is None:
        return segment_first(mask)
    order, ids = _sort_groups(group_ids)
    return _unsort(segment_first(mask.ravel()[order], ids), order).reshape(mask.shape)


def _sort_groups(group_ids: ArrayLike) -> tuple[Array, Array]:
    """The stable order that lines groups up as the segments of one packed row, and the ids in that order."""
    ids = jnp.ravel(group_ids)
    order = jnp.argsort(ids)
    return order, ids[order]


def _unsort(x: Array, order: Array) -> Array:
    return jnp.zeros_like(x).at[order].set(x, unique_indices=True)
