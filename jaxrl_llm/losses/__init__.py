"""Losses as pure functions of arrays, for any JAX code base.

*Terms* map arrays to an array of the same shape (`clipped_surrogate`, `kl_k3`); *named losses* are terms
with a reduction and their paper's defaults (`grpo_loss`), and return `(loss, metrics)`.
"""

from jaxrl_llm.losses.aggregate import (
    AggregationMode,
    aggregate,
    aggregation_normalizer,
    aggregation_weights,
)
from jaxrl_llm.losses.kl import (
    KLEstimator,
    kl_abs,
    kl_k1,
    kl_k1_straight_through,
    kl_k2,
    kl_k3,
    kl_k3_ratio_weighted,
    kl_k3_straight_through,
    kl_penalty,
)
from jaxrl_llm.losses.policy import clipped_surrogate, dapo_loss, dr_grpo_loss, grpo_loss
from jaxrl_llm.losses.ratio import ClipIndicators, clip_indicators, importance_ratio

__all__ = [
    "AggregationMode",
    "ClipIndicators",
    "KLEstimator",
    "aggregate",
    "aggregation_normalizer",
    "aggregation_weights",
    "clip_indicators",
    "clipped_surrogate",
    "dapo_loss",
    "dr_grpo_loss",
    "grpo_loss",
    "importance_ratio",
    "kl_abs",
    "kl_k1",
    "kl_k1_straight_through",
    "kl_k2",
    "kl_k3",
    "kl_k3_ratio_weighted",
    "kl_k3_straight_through",
    "kl_penalty",
]
