"""Advantage estimators with a penalty for leaving the reference in the reward, and those of whole batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import advantages as functions
from jaxrl_llm.advantages import EmaBaseline, NormalizeOver, RewardKLEstimator
from jaxrl_llm.algorithms.interfaces import Advantage, Credit, Need, Signals
from jaxrl_llm.algorithms.policy_gradient.estimators import PREFIX
from jaxrl_llm.checks import below_one, check_fields, not_negative, one_of, positive, share
from jaxrl_llm.masking import masked_sum, whiten
from jaxrl_llm.records import Mean, Metrics


@dataclasses.dataclass(frozen=True)
class ShapedAdvantage(Advantage):
    """Settings that the estimators with a KL penalty in the reward share; see `jaxrl_llm.advantages.shape_rewards`."""

    kl_coef: float = 0.0
    """Weight of the penalty; at 0 no reference is computed nor kept in memory."""
    kl_estimator: RewardKLEstimator = "k1"
    """Estimator of the penalty."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            PREFIX,
            self,
            kl_coef=not_negative(self.kl_coef),
            kl_estimator=one_of(self.kl_estimator, RewardKLEstimator),
        )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        return {} if self.kl_coef else {"kl_estimator": f"the reward has no KL; set {PREFIX}.kl_coef above 0, too"}

    @property
    def needs(self) -> frozenset[Need]:
        """Log-probs of policy and reference, where there is a penalty."""
        return frozenset({"old", "reference"}) if self.kl_coef else frozenset()


@dataclasses.dataclass(frozen=True)
class RLOOAdvantage(ShapedAdvantage):
    """A = R − mean of the other samples, R less the KL of its completion; see `rloo_advantages`."""

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`."""
        if not self.kl_coef:
            return Credit(functions.group_advantages(signals.rewards, scale="none", baseline="leave_one_out"))
        return Credit(
            functions.rloo_advantages(
                signals.rewards,
                signals.old_logprobs,
                signals.ref_logprobs,
                signals.mask,
                kl_coef=self.kl_coef,
                kl_estimator=self.kl_estimator,
            )
        )


@dataclasses.dataclass(frozen=True)
class ReMaxAdvantage(ShapedAdvantage):
    """A = R − R of the greedy completion of the same prompt; see `jaxrl_llm.advantages.remax_advantages`."""

    smallest_group = 1

    @property
    def needs(self) -> frozenset[Need]:
        """A greedy completion of each prompt as well."""
        return super().needs | frozenset[Need]({"greedy"})

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G, Tc]`."""
        greedy = signals.feedback.greedy
        assert greedy is not None
        return Credit(
            functions.remax_advantages(
                signals.rewards if signals.token_rewards is None else jnp.zeros_like(signals.rewards),
                jnp.broadcast_to(greedy[:, None], signals.rewards.shape),
                signals.mask,
                token_rewards=signals.token_rewards,
                old_logprobs=signals.old_logprobs,
                ref_logprobs=signals.ref_logprobs,
                kl_coef=self.kl_coef,
                kl_estimator=self.kl_estimator,
            )
        )


@dataclasses.dataclass(frozen=True)
class ReinforcePlusPlusAdvantage(ShapedAdvantage):
    """Suffix sums of the shaped rewards, whitened over the batch; see `reinforce_plus_plus_advantages`."""

    smallest_group = 1

    kl_coef: float = 0.01
    gamma: float = 1.0
    """Discount from token to token."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        super().__post_init__()
        check_fields(PREFIX, self, gamma=share(self.gamma))

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G, Tc]`."""
        return Credit(
            functions.reinforce_plus_plus_advantages(
                signals.rewards if signals.token_rewards is None else None,
                signals.mask,
                token_rewards=signals.token_rewards,
                old_logprobs=signals.old_logprobs,
                ref_logprobs=signals.ref_logprobs,
                kl_coef=self.kl_coef,
                kl_estimator=self.kl_estimator,
                gamma=self.gamma,
            )
        )


@dataclasses.dataclass(frozen=True)
class ReinforcePlusPlusBaselineAdvantage(Advantage):
    """A = R − mean of the group, whitened over the batch; see `reinforce_plus_plus_baseline_advantages`."""

    normalize_over: NormalizeOver = "tokens"
    """What the whitening counts."""

    def __post_init__(self) -> None:
        """Rejects an unknown mode."""
        check_fields(PREFIX, self, normalize_over=one_of(self.normalize_over, NormalizeOver))

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`."""
        lengths = jnp.sum(signals.mask, axis=-1) if self.normalize_over == "tokens" else None
        return Credit(
            functions.reinforce_plus_plus_baseline_advantages(
                signals.rewards, lengths=lengths, normalize_over=self.normalize_over
            )
        )


@dataclasses.dataclass(frozen=True)
class ReinforceAdvantage(ShapedAdvantage):
    """Reward-to-go less a baseline; see `jaxrl_llm.advantages.reinforce_advantages`."""

    smallest_group = 1

    gamma: float = 1.0
    """Discount from token to token."""
    baseline_decay: float | None = None
    """Weight of the past in a running mean of rewards, which is the baseline; `None`: no baseline."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        super().__post_init__()
        check_fields(
            PREFIX, self, gamma=share(self.gamma), baseline_decay=below_one(self.baseline_decay, optional=True)
        )

    def start(self) -> EmaBaseline | tuple[()]:
        """The baseline before the first batch."""
        return () if self.baseline_decay is None else EmaBaseline.init()

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G, Tc]`."""
        rewards = shaped_rewards(signals, self.kl_coef, self.kl_estimator)
        baseline = 0.0 if self.baseline_decay is None else memory.value()
        return Credit(functions.reinforce_advantages(rewards, signals.mask, gamma=self.gamma, baseline=baseline))

    def remember(self, signals: Signals, memory: Any) -> Any:
        """Takes the batch into the running mean."""
        if self.baseline_decay is None:
            return memory
        return memory.update(signals.rewards, decay=self.baseline_decay)


@dataclasses.dataclass(frozen=True)
class GAEAdvantage(ShapedAdvantage):
    """Generalised advantages from a critic's values (PPO); see `jaxrl_llm.advantages.gae`."""

    smallest_group = 1

    kl_coef: float = 0.05
    gamma: float = 1.0
    """Discount from token to token."""
    lam: float = 0.95
    """λ: 1 trusts rewards alone, 0 the critic alone."""
    whiten: bool = True
    """Scale the advantages of the batch to mean 0 and variance 1."""
    score_clip: float | None = None
    """Bound on the reward of a completion; where rewards are given by token, on that of a token."""
    missing_eos_penalty: float | None = None
    """Taken off the reward of a completion that was cut."""
    bootstrap_truncated: bool = False
    """Let a completion that was cut be worth, from there on, what the critic says, in place of nothing; see
    `jaxrl_llm.advantages.bootstrap_truncated`."""
    kl_target: float | None = None
    """KL of a completion, in nats, that `kl_coef` is adapted to reach; `None`: it stays as it is."""
    kl_horizon: float = 10_000
    """Completions over which it adapts."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        super().__post_init__()
        check_fields(
            PREFIX,
            self,
            gamma=share(self.gamma),
            lam=share(self.lam),
            score_clip=positive(self.score_clip, optional=True),
            missing_eos_penalty=not_negative(self.missing_eos_penalty, optional=True),
            kl_target=positive(self.kl_target, optional=True),
            kl_horizon=positive(self.kl_horizon),
        )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError(f"{PREFIX}.kl_target={self.kl_target} needs a kl_coef above 0 to start from")

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        fixed = {"kl_horizon": f"the coefficient of the KL is fixed; set {PREFIX}.kl_target, too"}
        return super().without_effect | (fixed if self.kl_target is None else {})

    @property
    def needs(self) -> frozenset[Need]:
        """Values as well."""
        of_critic: frozenset[Need] = frozenset({"values", "final_values"} if self.bootstrap_truncated else {"values"})
        return super().needs | of_critic

    def start(self) -> Any:
        """The coefficient of the first batch, where it is adapted."""
        return () if self.kl_target is None else jnp.float32(self.kl_coef)

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages and returns `[P, G, Tc]`."""
        kl_coef = self.kl_coef if self.kl_target is None else memory
        rewards = shaped_rewards(
            signals,
            kl_coef,
            self.kl_estimator,
            score_clip=self.score_clip,
            missing_eos_penalty=self.missing_eos_penalty,
        )
        if self.bootstrap_truncated:
            rewards = functions.bootstrap_truncated(
                rewards, signals.final_values, signals.finished, signals.mask, gamma=self.gamma
            )
        assert signals.values is not None
        estimate = functions.gae(rewards, signals.values, signals.mask, gamma=self.gamma, lam=self.lam)
        advantages = whiten(estimate.advantages, signals.mask) if self.whiten else estimate.advantages
        metrics: Metrics = {}
        if self.kl_coef:
            metrics = {"objective/kl": Mean.of(_sequence_kl(signals)), "objective/kl_coef": Mean.of(kl_coef)}
        return Credit(advantages, returns=estimate.returns, metrics=metrics)

    def remember(self, signals: Signals, memory: Any) -> Any:
        """Moves the coefficient towards the one that keeps the KL at its target."""
        if self.kl_target is None:
            return memory
        kl = jnp.mean(_sequence_kl(signals))
        return functions.adaptive_kl_coef(
            memory, kl, signals.rewards.size, target=self.kl_target, horizon=self.kl_horizon
        )


def shaped_rewards(
    signals: Signals,
    kl_coef: Any,
    kl_estimator: RewardKLEstimator,
    *,
    score_clip: float | None = None,
    missing_eos_penalty: float | None = None,
) -> jax.Array:
    """Token rewards `[P, G, Tc]`: those that were given, or the completion's at its last token, less the penalty."""
    return functions.shape_rewards(
        signals.rewards if signals.token_rewards is None else None,
        signals.mask,
        token_rewards=signals.token_rewards,
        old_logprobs=signals.old_logprobs,
        ref_logprobs=signals.ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        score_clip=score_clip,
        missing_eos_penalty=missing_eos_penalty,
        finished=signals.finished,
    )


def _sequence_kl(signals: Signals) -> jax.Array:
    """k1 of each completion, summed over its tokens, `[P, G]`."""
    assert signals.old_logprobs is not None and signals.ref_logprobs is not None
    return masked_sum(signals.old_logprobs - signals.ref_logprobs, signals.mask, axis=-1)
