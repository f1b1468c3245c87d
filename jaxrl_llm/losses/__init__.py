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
from jaxrl_llm.losses.aot import aot_loss
from jaxrl_llm.losses.bco import RewardShift, ShiftAverage, bco_loss
from jaxrl_llm.losses.correction import (
    CorrectionLevel,
    effective_sample_size,
    geometric_filter,
    icepop_weights,
    importance_weights,
    mis_weights,
    seq_mask_tis_weights,
    tis_weights,
)
from jaxrl_llm.losses.covariance import clip_cov_loss, kl_cov_loss, token_covariance
from jaxrl_llm.losses.detached import (
    BinaryDivergence,
    cispo_loss,
    divergence_mask,
    dppo_loss,
    vespo_loss,
    vespo_weights,
)
from jaxrl_llm.losses.distillation import (
    generalized_jsd,
    generalized_jsd_from_hidden,
    gkd_loss,
    on_policy_distillation_advantages,
)
from jaxrl_llm.losses.dpo import cdpo_loss, dpo_loss, robust_dpo_loss
from jaxrl_llm.losses.entropy import EntropyControl, entropy_bonus, update_entropy_control
from jaxrl_llm.losses.gates import RatioLevel, SoftGate, sapo_loss, soft_gate
from jaxrl_llm.losses.geometric_mean import gmpo_loss
from jaxrl_llm.losses.kl import (
    KLDirection,
    KLEstimator,
    kl_abs,
    kl_exact,
    kl_k1,
    kl_k1_straight_through,
    kl_k2,
    kl_k3,
    kl_k3_ratio_weighted,
    kl_k3_straight_through,
    kl_penalty,
)
from jaxrl_llm.losses.kl_loss import kl_loss
from jaxrl_llm.losses.kto import KTOVariant, kto_balance, kto_kl, kto_kl_of_other_side, kto_loss
from jaxrl_llm.losses.observation import echo_loss
from jaxrl_llm.losses.online import (
    NashKLLevel,
    PairLabels,
    label_pairs,
    nash_md_loss,
    nash_md_mixture_logprobs,
    xpo_loss,
)
from jaxrl_llm.losses.policy import dapo_loss, dr_grpo_loss, grpo_loss, ppo_loss
from jaxrl_llm.losses.preference import discopop_loss, exo_loss, hinge_loss, ipo_loss
from jaxrl_llm.losses.preference_sides import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_loss, sppo_loss
from jaxrl_llm.losses.preference_terms import (
    FDivergence,
    cdpo_term,
    discopop_term,
    dpo_term,
    exo_term,
    f_divergence_score,
    hinge_term,
    ipo_term,
    robust_dpo_term,
)
from jaxrl_llm.losses.process_reward import NeutralSteps, prm_loss, step_labels, step_probability
from jaxrl_llm.losses.ratio import ClipIndicators, clip_indicators, clipped_surrogate, importance_ratio
from jaxrl_llm.losses.reference_free import OddsLogprob, cpo_loss, log_odds, orpo_loss, simpo_loss, slic_loss
from jaxrl_llm.losses.regression import a_star_po_loss
from jaxrl_llm.losses.reinforce import dro_loss, dro_surrogate, gpg_loss, reinforce_loss, threshold_grpo_loss
from jaxrl_llm.losses.rejection import RejectionLevel, RejectionStatistic, rejection_mask
from jaxrl_llm.losses.reward import bradley_terry_loss, bt_prob, last_token_score, normalize_scores, ranking_loss
from jaxrl_llm.losses.router import RouterTokens, load_balance_loss, router_loss, router_tokens
from jaxrl_llm.losses.self_distillation import sdpo_loss, top_k_jsd
from jaxrl_llm.losses.sequence import grpo_s_loss, gspo_loss, gspo_token_loss, luspo_loss, sequence_log_ratio
from jaxrl_llm.losses.sequence_logprobs import implicit_reward, sequence_logprobs, wpo_weights
from jaxrl_llm.losses.supervised import dft_loss, sft_loss
from jaxrl_llm.losses.token_masks import off_policy_sequence_mask, top_entropy_mask
from jaxrl_llm.losses.value import ValueLossKind, clipped_value_error, value_loss

__all__ = [
    "AggregationMode",
    "BinaryDivergence",
    "ClipIndicators",
    "CorrectionLevel",
    "EntropyControl",
    "FDivergence",
    "KLDirection",
    "KLEstimator",
    "KTOVariant",
    "NashKLLevel",
    "NeutralSteps",
    "OddsLogprob",
    "PairLabels",
    "RatioLevel",
    "RejectionLevel",
    "RejectionStatistic",
    "RewardShift",
    "RouterTokens",
    "ShiftAverage",
    "SoftGate",
    "ValueLossKind",
    "a_star_po_loss",
    "aggregate",
    "aggregation_normalizer",
    "aggregation_weights",
    "aot_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bco_pair_loss",
    "bradley_terry_loss",
    "bt_prob",
    "cdpo_loss",
    "cdpo_term",
    "cispo_loss",
    "clip_cov_loss",
    "clip_indicators",
    "clipped_surrogate",
    "clipped_value_error",
    "cpo_loss",
    "dapo_loss",
    "dft_loss",
    "discopop_loss",
    "discopop_term",
    "divergence_mask",
    "dpo_loss",
    "dpo_term",
    "dppo_loss",
    "dr_grpo_loss",
    "dro_loss",
    "dro_surrogate",
    "echo_loss",
    "effective_sample_size",
    "entropy_bonus",
    "exo_loss",
    "exo_term",
    "f_divergence_score",
    "generalized_jsd",
    "generalized_jsd_from_hidden",
    "geometric_filter",
    "gkd_loss",
    "gmpo_loss",
    "gpg_loss",
    "grpo_loss",
    "grpo_s_loss",
    "gspo_loss",
    "gspo_token_loss",
    "hinge_loss",
    "hinge_term",
    "icepop_weights",
    "implicit_reward",
    "importance_ratio",
    "importance_weights",
    "ipo_loss",
    "ipo_term",
    "kl_abs",
    "kl_cov_loss",
    "kl_exact",
    "kl_k1",
    "kl_k1_straight_through",
    "kl_k2",
    "kl_k3",
    "kl_k3_ratio_weighted",
    "kl_k3_straight_through",
    "kl_loss",
    "kl_penalty",
    "kto_balance",
    "kto_kl",
    "kto_kl_of_other_side",
    "kto_loss",
    "label_pairs",
    "last_token_score",
    "load_balance_loss",
    "log_odds",
    "luspo_loss",
    "mis_weights",
    "nash_md_loss",
    "nash_md_mixture_logprobs",
    "nca_loss",
    "normalize_scores",
    "off_policy_sequence_mask",
    "on_policy_distillation_advantages",
    "orpo_loss",
    "ppo_loss",
    "prm_loss",
    "ranking_loss",
    "reinforce_loss",
    "rejection_mask",
    "robust_dpo_loss",
    "robust_dpo_term",
    "router_loss",
    "router_tokens",
    "sapo_loss",
    "sdpo_loss",
    "seq_mask_tis_weights",
    "sequence_log_ratio",
    "sequence_logprobs",
    "sft_loss",
    "simpo_loss",
    "slic_loss",
    "soft_gate",
    "sppo_loss",
    "step_labels",
    "step_probability",
    "threshold_grpo_loss",
    "tis_weights",
    "token_covariance",
    "top_entropy_mask",
    "top_k_jsd",
    "update_entropy_control",
    "value_loss",
    "vespo_loss",
    "vespo_weights",
    "wpo_weights",
    "xpo_loss",
]
