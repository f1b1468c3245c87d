"""The loss of a critic: squared errors of the values, clipped around those that the batch was collected with."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.masking import as_float, check_choice, check_mask, check_same_shape, fill_masked
from jaxrl_llm.records import ExplainedVariance, Mean, Metrics

ValueLossKind = Literal["half_mse", "mse"]


def clipped_value_error(
    values: ArrayLike, old_values: ArrayLike | None, returns: ArrayLike, *, clip: float | None = 0.2
) -> Array:
    """The per-token loss of PPO's critic, without its factor ½.

        max((V − R)², (clip(V, V_old − clip, V_old + clip) − R)²)

    A token's gradient is 2 (V − R) ∇V, or 0 once V has moved towards R by more than `clip`. Unlike
    `clipped_surrogate`, it bounds a difference of values and not a ratio of probabilities, so that the bound has
    the unit of the rewards.

    Args:
        values: Predictions V of the critic, any shape.
        old_values: The same at collection; a constant. May be None without a clip.
        returns: What is to be predicted; a constant.
        clip: How far a value may move from the old one. None: as far as it likes.

    Returns:
        The shape of `values`; not masked. Where padding may be not finite, apply `fill_masked` to the inputs first.

    Raises:
        ValueError: On unequal shapes, a negative clip or a clip without old values.

    Source: Schulman et al. 2017, "PPO" (1707.06347), as in OpenAI's baselines.
    """
    check_same_shape(values=values, old_values=old_values, returns=returns)
    values = as_float(values)
    returns = jax.lax.stop_gradient(as_float(returns))
    errors = (values - returns) ** 2
    if clip is None:
        return errors
    near = _near_old(values, old_values, clip)
    return jnp.maximum(errors, (near - returns) ** 2)


def value_loss(
    values: ArrayLike,
    old_values: ArrayLike | None,
    returns: ArrayLike,
    mask: ArrayLike,
    *,
    clip: float | None = 0.2,
    kind: ValueLossKind = "half_mse",
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """The clipped squared error of PPO's critic.

        ½ Agg[ max((V − R)², (clip(V, V_old − clip, V_old + clip) − R)²) ]

    V is the critic's output at the position that decides the token (that of the token before it), and R the return
    that the advantage came with, before any whitening. Unlike `clipped_surrogate`, the policy's loss, it is not
    weighted with advantages; with a trunk shared by both, add it with a small coefficient (TRL: 0.1).

    Args:
        values: Predictions of the critic, `[..., T]`; nothing else is differentiated.
        old_values: The same when the batch was collected, `[..., T]`. May be None without a clip.
        returns: `[..., T]`.
        mask: Bool `[..., T]`, True on the tokens of the completions; whatever is elsewhere is ignored.
        clip: How far a value may move from the old one before its gradient is cut. None: no bound.
        kind: "half_mse", or "mse" without the factor ½.
        aggregation: See `jaxrl_llm.losses.aggregate`, also for the arguments that follow.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        max_length: Constant of the aggregation "seq-mean-token-sum-norm".
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.
        group_ids: Labels `[...]` of the rows, for the group modes.
        count_empty: Whether sequences without a valid token count.

    Returns:
        The loss, a float32 scalar, and metrics over the valid tokens: `vf/clip_frac` (tokens whose clipped error is
        strictly the larger one), `value/mean`, `value/returns_mean` and `value/explained_variance`. The last is an
        `ExplainedVariance` record, the others are `Mean` records.

    Raises:
        ValueError: On shapes that do not fit, a mask that is not bool, an unknown kind, or a clip without old values.

    Source: Schulman et al. 2017, "PPO" (1707.06347); Ziegler et al. 2019 (1909.08593).
    """
    check_choice("kind", kind, ValueLossKind)
    mask = check_mask(mask, values=values, old_values=old_values, returns=returns)
    values, returns = fill_masked(values, mask), fill_masked(returns, mask)
    old = None if old_values is None else fill_masked(old_values, mask)
    errors = clipped_value_error(values, old, returns, clip=clip)
    losses = 0.5 * errors if kind == "half_mse" else errors
    loss = aggregate(
        losses,
        mask,
        mode=aggregation,
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )

    values, returns = jax.lax.stop_gradient((values, returns))
    clipped = jax.lax.stop_gradient(errors) > (values - returns) ** 2
    metrics = {
        "vf/clip_frac": Mean.of(clipped, mask),
        "value/mean": Mean.of(values, mask),
        "value/returns_mean": Mean.of(returns, mask),
        "value/explained_variance": ExplainedVariance.of(values, returns, mask),
    }
    return loss, metrics


def _near_old(values: Array, old_values: ArrayLike | None, clip: float) -> Array:
    """The values, no farther than `clip` from the old ones."""
    if old_values is None:
        raise ValueError(f"clip is {clip}, but there are no old_values: pass them, or clip=None")
    if isinstance(clip, int | float) and not clip >= 0:
        raise ValueError(f"clip is {clip}: it is a distance from the old value and must not be negative")
    old = jax.lax.stop_gradient(as_float(old_values))
    return jnp.clip(values, old - clip, old + clip)
