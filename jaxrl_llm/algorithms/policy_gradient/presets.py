"""What distinguishes the published algorithms, as one table of settings.

Defaults are those of the papers, as `docs/objectives.md` has them, but for three that do not learn as published
(`gtpo`, `brpo`, `ha_dw`: each says which flag gives the paper's reading). `--preset=NAME` of an experiment begins with
one, and any flag of it can be changed: `--preset=dapo --algorithm.surrogate.clip-high=0.3`.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxrl_llm.algorithms.interfaces import Algorithm
from jaxrl_llm.algorithms.policy_gradient.entropy_estimators import GRPOSAdvantage, GTPOAdvantage
from jaxrl_llm.algorithms.policy_gradient.estimators import (
    BRPOAdvantage,
    GDPOAdvantage,
    GFPOAdvantage,
    GPGAdvantage,
    GroupAdvantage,
    HADWAdvantage,
    MaxRLAdvantage,
    OPOAdvantage,
    OptimalAdvantage,
    PassAtKAdvantage,
    ThresholdAdvantage,
)
from jaxrl_llm.algorithms.policy_gradient.given import GivenAdvantages
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.role_estimators import HierarchicalAdvantage, RAEAdvantage
from jaxrl_llm.algorithms.policy_gradient.sequence_surrogates import (
    VESPO,
    AdvantageRegression,
    GeometricMeanClipped,
    LengthWeightedSequenceClipped,
    SequenceClipped,
    SequenceTokenClipped,
)
from jaxrl_llm.algorithms.policy_gradient.shaped_estimators import (
    GAEAdvantage,
    ReinforceAdvantage,
    ReinforcePlusPlusAdvantage,
    ReinforcePlusPlusBaselineAdvantage,
    ReMaxAdvantage,
    RLOOAdvantage,
)
from jaxrl_llm.algorithms.policy_gradient.surrogates import (
    CISPO,
    DPPO,
    Clipped,
    CovarianceClipped,
    CovariancePenalized,
    LogProb,
    SoftGated,
)
from jaxrl_llm.algorithms.preference.online import OnlinePreference
from jaxrl_llm.algorithms.preference.presets import dpo

# ---- REINFORCE, PPO --------------------------------------------------------------------------------


def reinforce() -> PolicyGradient:
    """REINFORCE (Williams 1992): log-probs times the reward less a running mean of earlier rewards."""
    return PolicyGradient(
        advantage=ReinforceAdvantage(baseline_decay=0.9), surrogate=LogProb(), aggregation="seq-mean-token-sum"
    )


def remax() -> PolicyGradient:
    """ReMax (Li et al. 2023, 2310.10505): the reward of the greedy completion is the baseline."""
    return PolicyGradient(advantage=ReMaxAdvantage(), surrogate=LogProb(), aggregation="seq-mean-token-sum")


def rloo() -> PolicyGradient:
    """RLOO (Ahmadian et al. 2024, 2402.14740): the mean of the other samples is the baseline; KL 0.05 in the reward."""
    return PolicyGradient(advantage=RLOOAdvantage(kl_coef=0.05), surrogate=LogProb(), aggregation="seq-mean-token-sum")


def reinforce_plus_plus() -> PolicyGradient:
    """REINFORCE++ (Hu 2025, 2501.03262): rewards to go less the KL, whitened over the batch; PPO's clip, no critic."""
    return PolicyGradient(advantage=ReinforcePlusPlusAdvantage(kl_coef=0.01), aggregation="token-mean")


def reinforce_plus_plus_baseline() -> PolicyGradient:
    """REINFORCE++-baseline (Hu 2025, 2501.03262): centred by group, whitened over the batch; some k2."""
    return PolicyGradient(
        advantage=ReinforcePlusPlusBaselineAdvantage(), kl_coef=1e-5, kl_estimator="k2", aggregation="token-mean"
    )


def ppo() -> PolicyGradient:
    """PPO (Schulman et al. 2017, 1707.06347) as in RLHF: a critic, GAE(1, 0.95), KL 0.05 in the reward."""
    return PolicyGradient(advantage=GAEAdvantage(kl_coef=0.05), aggregation="token-mean")


# ---- GRPO and its kin ------------------------------------------------------------------------------


def grpo() -> PolicyGradient:
    """GRPO (Shao et al. 2024, 2402.03300): group z-score, mean over sequences of token means, k3 with β 0.04."""
    return PolicyGradient(kl_coef=0.04, kl_estimator="k3", aggregation="seq-mean-token-mean")


def dr_grpo() -> PolicyGradient:
    """Dr. GRPO (Liu et al. 2025, 2503.20783): no division by deviation nor by length, no KL."""
    return PolicyGradient(advantage=GroupAdvantage(scale="none"), aggregation="seq-mean-token-sum-norm")


def dapo() -> PolicyGradient:
    """DAPO's objective (Yu et al. 2025, 2503.14476): higher upper clip, one mean over all tokens, no KL.

    Its dynamic sampling is `training.dynamic_sampling`, its soft punishment of length `algorithm.overlong`.
    """
    return PolicyGradient(surrogate=Clipped(clip_high=0.28), aggregation="token-mean", mask_truncated=True)


def lite_ppo() -> PolicyGradient:
    """Lite PPO (Liu et al. 2025, 2508.08221): centred by group, scaled by the batch; one mean over all tokens."""
    return PolicyGradient(advantage=GroupAdvantage(scale="batch"), aggregation="token-mean")


def gspo() -> PolicyGradient:
    """GSPO (Zheng et al. 2025, 2507.18071): one ratio a sequence, clipped at 3e-4 and 4e-4."""
    return PolicyGradient(surrogate=SequenceClipped())


def gspo_token() -> PolicyGradient:
    """GSPO-token (Zheng et al. 2025, 2507.18071): the sequence's ratio, the token's gradient."""
    return PolicyGradient(surrogate=SequenceTokenClipped())


def luspo() -> PolicyGradient:
    """LUSPO (2602.05261): GSPO's loss of each sequence times its length."""
    return PolicyGradient(surrogate=LengthWeightedSequenceClipped(), aggregation="seq-mean-token-sum")


def sapo() -> PolicyGradient:
    """SAPO (2511.20347): a smooth gate in place of the clip, steeper for negative advantages."""
    return PolicyGradient(surrogate=SoftGated())


def gmpo() -> PolicyGradient:
    """GMPO (Zhao et al. 2025, 2507.20673): the geometric mean of clipped token ratios."""
    return PolicyGradient(surrogate=GeometricMeanClipped())


def cispo() -> PolicyGradient:
    """CISPO (MiniMax 2025, 2506.13585): the clipped ratio as a constant weight of every token's log-prob."""
    return PolicyGradient(surrogate=CISPO(), aggregation="token-mean")


def gtpo() -> PolicyGradient:
    """GTPO (Tan et al. 2025, 2508.04349): token rewards shaped by the policy's entropy; DAPO's loss.

    Successes and failures are normalised together; as published, apart: `--algorithm.advantage.norm=separate`.
    """
    return PolicyGradient(advantage=GTPOAdvantage(), surrogate=Clipped(clip_high=0.28), aggregation="token-mean")


def grpo_s() -> PolicyGradient:
    """GRPO-S (Tan et al. 2025, 2508.04349): completions shaped by their mean entropy; one ratio a sequence."""
    return PolicyGradient(advantage=GRPOSAdvantage(), surrogate=SequenceClipped(clip_low=0.2, clip_high=0.28))


def gpg() -> PolicyGradient:
    """GPG (Chu et al. 2025, 2504.02546): centred by group, scaled for groups without a signal; no ratio, no KL."""
    return PolicyGradient(advantage=GPGAdvantage(), surrogate=LogProb(), aggregation="token-mean")


def opo() -> PolicyGradient:
    """OPO (Hao et al. 2025, 2505.23585): the length-weighted mean is the baseline; no ratio, no KL."""
    return PolicyGradient(advantage=OPOAdvantage(), surrogate=LogProb(), aggregation="seq-mean-token-sum")


def gfpo() -> PolicyGradient:
    """GFPO (Shrivastava et al. 2025, 2508.09726): of a larger group only the four shortest are trained on."""
    return PolicyGradient(advantage=GFPOAdvantage(keep=4), aggregation="token-mean")


def gdpo() -> PolicyGradient:
    """GDPO (2601.05242): each reward function normalised by itself before they are summed."""
    return PolicyGradient(advantage=GDPOAdvantage(), aggregation="token-mean")


def pass_at_k() -> PolicyGradient:
    """Pass@k (2503.19595): only the best sample of a group has an advantage."""
    return PolicyGradient(advantage=PassAtKAdvantage(), aggregation="token-mean")


def max_rl() -> PolicyGradient:
    """MaxRL (Tajwar et al. 2026, 2602.02710): centred by group, divided by its mean: the likelihood of a success."""
    return PolicyGradient(advantage=MaxRLAdvantage(), aggregation="token-mean")


def a_star_po() -> PolicyGradient:
    """A*-PO (Brantley et al. 2025, 2505.20686): log-ratios to the reference fitted to R − V*, V* of its own samples."""
    return PolicyGradient(
        advantage=OptimalAdvantage(), surrogate=AdvantageRegression(), aggregation="seq-mean-token-sum"
    )


def ha_dw() -> PolicyGradient:
    """HA-DW (2601.08521) on GRPO: advantages weighted by how hard a prompt is compared with the run's history.

    The history's anchor keeps up with it; as published, a slow one slows itself: `--algorithm.advantage.min-rate=0`.
    """
    return PolicyGradient(advantage=HADWAdvantage(), aggregation="seq-mean-token-mean")


def brpo() -> PolicyGradient:
    """BRPO (Jia et al. 2025, 2506.00103): ±1 by a judge's comparison with one sample of the group; DAPO's loss.

    A tie is a tie; as published, it is a loss: `--algorithm.advantage.inconsistent=loss`.
    """
    return PolicyGradient(advantage=BRPOAdvantage(), surrogate=Clipped(clip_high=0.28), aggregation="token-mean")


def grpo_threshold() -> PolicyGradient:
    """Only samples above their group's mean, by the log-prob of the whole sequence: biased, near to RAFT."""
    return PolicyGradient(advantage=ThresholdAdvantage(), surrogate=LogProb(), aggregation="seq-mean-token-sum")


# ---- Losses that look after the entropy or the trust region -----------------------------------------


def clip_cov() -> PolicyGradient:
    """Clip-Cov (Cui et al. 2025, 2505.22617): leaves out a few tokens that would lower the entropy most."""
    return PolicyGradient(surrogate=CovarianceClipped(), aggregation="token-mean")


def kl_cov() -> PolicyGradient:
    """KL-Cov (Cui et al. 2025, 2505.22617): a penalty on a few tokens that would lower the entropy most."""
    return PolicyGradient(surrogate=CovariancePenalized(), aggregation="token-mean")


def dppo(delta_low: float, delta_high: float) -> PolicyGradient:
    """DPPO (2602.04879): leaves out tokens whose probability has moved too far; no bounds are confirmed."""
    return PolicyGradient(surrogate=DPPO(delta_low=delta_low, delta_high=delta_high), aggregation="token-mean")


def dppo_log2() -> PolicyGradient:
    """DPPO (Qi et al. 2026, 2602.04879) as prime-rl trains: bounds of 0.2, a squared log-ratio, centred by group."""
    return PolicyGradient(
        advantage=GroupAdvantage(scale="none"),
        surrogate=DPPO(delta_low=0.2, delta_high=0.2, log_ratio_coef=1e-3),
        aggregation="token-mean",
    )


def vespo() -> PolicyGradient:
    """VESPO (2602.10693): a smooth weight of the whole sequence's ratio."""
    return PolicyGradient(surrogate=VESPO(), aggregation="token-mean")


# ---- Conversations with tools, from elsewhere -----------------------------------------------------------


def echo() -> GivenAdvantages:
    """ECHO (Shrivastava et al. 2026, 2605.24517): GRPO of what the policy said, and some `echo_loss` of the answers."""
    return GivenAdvantages(PolicyGradient(), observation_coef=0.1)


# ---- Several roles ----------------------------------------------------------------------------------


def rae() -> PolicyGradient:
    """RAE (Liu et al. 2025, 2506.24119, SPIRAL): REINFORCE with a running baseline for each role of the policy."""
    return PolicyGradient(advantage=RAEAdvantage(), surrogate=LogProb(), aggregation="seq-mean-token-sum")


def hierarchical_grpo() -> PolicyGradient:
    """Hierarchical GRPO (prime-rl 2026): solvers of one problem, and proposals of one task, compared by themselves."""
    return PolicyGradient(advantage=HierarchicalAdvantage(), aggregation="token-mean")


# ---- Pairs of its own samples ------------------------------------------------------------------------


def online_dpo() -> OnlinePreference:
    """On-line DPO (Guo et al. 2024, 2402.04792): the best and the worst sample of each prompt are a pair of DPO."""
    return OnlinePreference(dpo())


POLICY_GRADIENTS: tuple[Callable[[], PolicyGradient], ...] = (
    reinforce,
    remax,
    rloo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    ppo,
    grpo,
    dr_grpo,
    dapo,
    lite_ppo,
    gspo,
    gspo_token,
    luspo,
    sapo,
    gmpo,
    cispo,
    gtpo,
    grpo_s,
    gpg,
    opo,
    gfpo,
    gdpo,
    pass_at_k,
    max_rl,
    a_star_po,
    ha_dw,
    brpo,
    grpo_threshold,
    clip_cov,
    kl_cov,
    dppo_log2,
    vespo,
)
"""Those whose advantages weigh log-probs, as far as they need no further setting."""

OF_GIVEN_ROWS: tuple[Callable[[], GivenAdvantages], ...] = (echo,)
"""Objectives of rows with what was answered in them, for `make_offline_step`."""

OF_ROLES: tuple[Callable[[], PolicyGradient], ...] = (rae, hierarchical_grpo)
"""Those that read columns of the data, for `--preset`."""

PRESETS: tuple[Callable[[], Algorithm], ...] = (*POLICY_GRADIENTS, online_dpo)
"""All that need no further setting and no further data, for `--preset` and for comparisons."""
