"""Smooth gates on the importance ratio in place of a clip: SAPO."""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import check_positive, policy_rows, ratio_metrics
from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.losses.ratio import importance_ratio
from jaxrl_llm.losses.sequence import sequence_log_ratio
from jaxrl_llm.masking import as_float, check_choice, per_token, segment_first
from jaxrl_llm.records import Metrics

SoftGate = Literal["sigmoid", "sech2", "sech2_literal"]
RatioLevel = Literal["token", "sequence"]


def soft_gate(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    gate: SoftGate = "sigmoid",
    gate_scale: bool = True,
) -> Array:
    """The gate f of a token, to be multiplied by −A: its gradient fades as the ratio leaves 1, on either side.

        σ(τ (r − 1)) · 4/τ                        "sigmoid"; τ = tau_pos if A > 0, else tau_neg
        sg(r sech²(τ (r − 1) / 2)) logprobs       "sech2"
        sech²(τ (r − 1) / 2)                      "sech2_literal"

    The first two have the gradient r sech²(τ (r − 1) / 2) ∇logprobs, which is ∇logprobs at r = 1; the values have no
    meaning of their own. "sech2_literal" is the formula of some secondary literature: its gradient at r = 1 is 0, so
    that a policy learns nothing from its own samples, and it warns. Unlike `clipped_surrogate`, no token is cut off.

    Args:
        logprobs: As `clipped_surrogate`.
        old_logprobs: As `clipped_surrogate`.
        advantages: As `clipped_surrogate`; only their sign matters here.
        tau_pos: Steepness for tokens with A > 0.
        tau_neg: Steepness for the others; larger, so that they fade sooner.
        gate: Which of the three.
        gate_scale: False leaves the factor 4/τ of "sigmoid" out; the gradient at r = 1 is then τ/4 times as large.

    Returns:
        `[..., T]`; not masked.

    Raises:
        ValueError: On shapes that do not fit, an unknown gate, or a steepness that is not positive.

    Source: Gao et al. 2025, "Soft adaptive policy optimization" (2511.20347).
    """
    check_positive(tau_pos=tau_pos, tau_neg=tau_neg)
    ratio = importance_ratio(logprobs, old_logprobs)
    tau = jnp.where(per_token(ratio, advantages=advantages) > 0, tau_pos, tau_neg).astype(ratio.dtype)
    # σ(x) σ(−x) = sech²(x/2) / 4, and does not overflow.
    rise = jax.nn.sigmoid(tau * (ratio - 1))
    match gate:
        case "sigmoid":
            return rise * 4 / tau if gate_scale else rise
        case "sech2":
            slope = 4 * rise * jax.nn.sigmoid(tau * (1 - ratio))
            return jax.lax.stop_gradient(ratio * slope) * as_float(logprobs)
        case "sech2_literal":
            warnings.warn(
                'the gate "sech2_literal" has gradient 0 at ratio 1: on its own samples a policy learns nothing; '
                'use "sech2", which has the intended gradient',
                stacklevel=2,
            )
            return 4 * rise * jax.nn.sigmoid(tau * (1 - ratio))
    raise ValueError(f"unknown gate {gate!r}: choose one of {', '.join(get_args(SoftGate))}")


def sapo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    gate: SoftGate = "sigmoid",
    gate_scale: bool = True,
    ratio_level: RatioLevel = "token",
    weights: ArrayLike | None = None,
    aggregation: AggregationMode = "seq-mean-token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """Soft adaptive policy optimization: a smooth gate on each token's ratio in place of the clip.

        Agg[ −A σ(τ (r − 1)) · 4/τ ]        τ = tau_pos if A > 0, else tau_neg

    Agg is the mean over sequences of the mean over their tokens. The gate has the value 2/τ at r = 1, so that this
    loss cannot be compared with others by its value. Unlike `grpo_loss`, a token that has moved far loses weight
    gradually, and one that moved against its advantage loses weight, too.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        tau_pos: See `soft_gate` for the four settings of the gate.
        tau_neg: As `tau_pos`.
        gate: As `tau_pos`.
        gate_scale: As `tau_pos`.
        ratio_level: "token", or "sequence" for the ratio of `gspo_loss`, which all tokens of a sequence share.
        weights: As `grpo_loss`.
        aggregation: As `grpo_loss`.
        normalizer: As `grpo_loss`.
        max_length: As `grpo_loss`.
        segment_ids: As `grpo_loss`.
        group_ids: As `grpo_loss`.
        count_empty: As `grpo_loss`.

    Returns:
        The loss, a float32 scalar, and the metrics of `grpo_loss` that are about the ratio.

    Raises:
        ValueError: As `grpo_loss` and `soft_gate`.

    Source: Gao et al. 2025, "Soft adaptive policy optimization" (2511.20347).
    """
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    check_choice("ratio_level", ratio_level, RatioLevel)
    ratio, log_ratio, first = rows.inputs, None, None
    if ratio_level == "sequence":
        first = segment_first(rows.mask, segment_ids)
        log_ratio = sequence_log_ratio(rows.logprobs, rows.old_logprobs, rows.mask, segment_ids=segment_ids)
        ratio = log_ratio, jnp.zeros_like(log_ratio), rows.advantages
    gates = soft_gate(*ratio, tau_pos=tau_pos, tau_neg=tau_neg, gate=gate, gate_scale=gate_scale)
    loss = aggregate(
        rows.weigh(-rows.advantages * gates),
        rows.mask,
        mode=aggregation,
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )
    return loss, ratio_metrics(rows, log_ratio, first)
