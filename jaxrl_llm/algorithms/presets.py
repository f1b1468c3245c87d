"""What distinguishes the published algorithms, as one table of settings."""

from __future__ import annotations

from jaxrl_llm.algorithms.policy_gradient import GroupAdvantage, PolicyGradient


def grpo() -> PolicyGradient:
    """GRPO (Shao et al. 2024, 2402.03300): group z-score, mean over sequences of token means, k3 with β 0.04."""
    return PolicyGradient(kl_coef=0.04, kl_estimator="k3", aggregation="seq-mean-token-mean")


def dr_grpo() -> PolicyGradient:
    """Dr. GRPO (Liu et al. 2025, 2503.20783): no division by deviation nor by length, no KL."""
    return PolicyGradient(advantage=GroupAdvantage(scale="none"), aggregation="seq-mean-token-sum-norm")


def dapo() -> PolicyGradient:
    """DAPO's objective (Yu et al. 2025, 2503.14476): higher upper clip, one mean over all tokens, no KL."""
    return PolicyGradient(clip_high=0.28, aggregation="token-mean", mask_truncated=True)
