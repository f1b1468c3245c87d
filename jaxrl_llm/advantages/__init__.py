"""Advantage estimators and reward shaping as pure functions of arrays: scores and rewards in, advantages out."""

from jaxrl_llm.advantages.difficulty import (
    DifficultyAnchor,
    hadw_advantages,
    hadw_weights,
    mean_accuracy_of_mixed_groups,
)
from jaxrl_llm.advantages.entropy import EntropyNorm, grpo_s_advantages, grpo_s_rewards, gtpo_advantages, gtpo_rewards
from jaxrl_llm.advantages.filters import (
    FilteredAdvantages,
    ThresholdKind,
    ThresholdScale,
    gfpo_adaptive_keep,
    gfpo_advantages,
    gfpo_mask,
    keep_mixed_groups,
    threshold_filter,
)
from jaxrl_llm.advantages.gae import GAE, MaskedTokens, bootstrap_truncated, gae
from jaxrl_llm.advantages.group import AdvantageBaseline, AdvantageScale, group_advantages, zero_std_groups
from jaxrl_llm.advantages.kl_control import adaptive_kl_coef
from jaxrl_llm.advantages.multi_reward import gdpo_advantages
from jaxrl_llm.advantages.optimal import optimal_advantages, optimal_values
from jaxrl_llm.advantages.pairwise import InconsistentVerdict, brpo_advantages, brpo_skew, draw_reference
from jaxrl_llm.advantages.process import (
    StepRewardKind,
    dense_step_rewards,
    find_step_ends,
    implicit_process_rewards,
    min_form_weights,
    process_advantages,
    step_of_token,
    steps_to_tokens,
)
from jaxrl_llm.advantages.reinforce import (
    EmaBaseline,
    NormalizeOver,
    reinforce_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
)
from jaxrl_llm.advantages.relative import (
    GPGAlphaMode,
    PassAtKScale,
    gpg_advantages,
    gpg_alpha,
    max_rl_advantages,
    opo_advantages,
    pass_at_k_advantages,
)
from jaxrl_llm.advantages.remax import remax_advantages, remax_code_returns
from jaxrl_llm.advantages.rloo import rloo_advantages, rloo_token_advantages
from jaxrl_llm.advantages.roles import RoleAdvantages, hierarchical_advantages, rae_advantages
from jaxrl_llm.advantages.selection import (
    StepAggregation,
    Vote,
    aggregate_step_scores,
    best_of_n,
    select_beams,
    weighted_vote,
)
from jaxrl_llm.advantages.shaping import (
    RewardKLEstimator,
    ScorePosition,
    mask_after_last,
    overlong_penalty,
    rlhf_reward,
    shape_rewards,
)
from jaxrl_llm.advantages.token_baseline import optimal_token_baseline_advantages

__all__ = [
    "GAE",
    "AdvantageBaseline",
    "AdvantageScale",
    "DifficultyAnchor",
    "EmaBaseline",
    "EntropyNorm",
    "FilteredAdvantages",
    "GPGAlphaMode",
    "InconsistentVerdict",
    "MaskedTokens",
    "NormalizeOver",
    "PassAtKScale",
    "RewardKLEstimator",
    "RoleAdvantages",
    "ScorePosition",
    "StepAggregation",
    "StepRewardKind",
    "ThresholdKind",
    "ThresholdScale",
    "Vote",
    "adaptive_kl_coef",
    "aggregate_step_scores",
    "best_of_n",
    "bootstrap_truncated",
    "brpo_advantages",
    "brpo_skew",
    "dense_step_rewards",
    "draw_reference",
    "find_step_ends",
    "gae",
    "gdpo_advantages",
    "gfpo_adaptive_keep",
    "gfpo_advantages",
    "gfpo_mask",
    "gpg_advantages",
    "gpg_alpha",
    "group_advantages",
    "grpo_s_advantages",
    "grpo_s_rewards",
    "gtpo_advantages",
    "gtpo_rewards",
    "hadw_advantages",
    "hadw_weights",
    "hierarchical_advantages",
    "implicit_process_rewards",
    "keep_mixed_groups",
    "mask_after_last",
    "max_rl_advantages",
    "mean_accuracy_of_mixed_groups",
    "min_form_weights",
    "opo_advantages",
    "optimal_advantages",
    "optimal_token_baseline_advantages",
    "optimal_values",
    "overlong_penalty",
    "pass_at_k_advantages",
    "process_advantages",
    "rae_advantages",
    "reinforce_advantages",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "remax_code_returns",
    "rlhf_reward",
    "rloo_advantages",
    "rloo_token_advantages",
    "select_beams",
    "shape_rewards",
    "step_of_token",
    "steps_to_tokens",
    "threshold_filter",
    "weighted_vote",
    "zero_std_groups",
]
