"""Advantage estimators as frozen records, each a few lines around a function of `jaxrl_llm.advantages`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxrl_llm import advantages as functions
from jaxrl_llm.advantages import (
    AdvantageBaseline,
    AdvantageScale,
    DifficultyAnchor,
    EntropyNorm,
    GPGAlphaMode,
    InconsistentVerdict,
    NormalizeOver,
    ThresholdKind,
    ThresholdScale,
)
from jaxrl_llm.algorithms.interfaces import Advantage, Credit, Need, Signals
from jaxrl_llm.checks import at_least, check_fields, finite, not_negative, one_of, positive, share
from jaxrl_llm.records import Mean

PREFIX = "algorithm.advantage"
GFPOMetric = Literal["short", "efficient"]
AnchorRule = Literal["deviation", "moving_average"]

# ---- Groups ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GroupAdvantage(Advantage):
    """A = (R − baseline of the group) / (scale + ε); see `jaxrl_llm.advantages.group_advantages`."""

    skips_unscored: ClassVar[bool] = True

    scale: AdvantageScale = "group"
    """Divisor: the group's standard deviation, the batch's, the group's variance, or none."""
    baseline: AdvantageBaseline = "mean"
    """The group's mean, or that of the other samples."""
    ddof: int = 1
    """1 for the unbiased deviation, 0 for the population's."""
    eps: float = 1e-4
    """ε, outside the root."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            PREFIX,
            self,
            scale=one_of(self.scale, AdvantageScale),
            baseline=one_of(self.baseline, AdvantageBaseline),
            ddof=(self.ddof in (0, 1), "be 0 or 1"),
            eps=not_negative(self.eps),
        )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        return dict.fromkeys(("ddof", "eps"), "with scale='none' nothing is divided") if self.scale == "none" else {}

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`."""
        return Credit(
            functions.group_advantages(
                signals.rewards,
                scale=self.scale,
                baseline=self.baseline,
                ddof=self.ddof,
                eps=self.eps,
                mask=signals.scored,
            )
        )


@dataclasses.dataclass(frozen=True)
class OPOAdvantage(Advantage):
    """A = R − Σ length · R / Σ length over the group; see `jaxrl_llm.advantages.opo_advantages`."""

    skips_unscored: ClassVar[bool] = True

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`."""
        return Credit(functions.opo_advantages(signals.rewards, jnp.sum(signals.mask, axis=-1), mask=signals.scored))


@dataclasses.dataclass(frozen=True)
class GPGAdvantage(Advantage):
    """A = α · (R − mean), α making up for groups without a signal; see `jaxrl_llm.advantages.gpg_advantages`."""

    skips_unscored: ClassVar[bool] = True

    alpha_mode: GPGAlphaMode = "valid_groups"
    """What α counts."""

    def __post_init__(self) -> None:
        """Rejects an unknown mode."""
        check_fields(PREFIX, self, alpha_mode=one_of(self.alpha_mode, GPGAlphaMode))

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`."""
        return Credit(functions.gpg_advantages(signals.rewards, alpha_mode=self.alpha_mode, mask=signals.scored))


@dataclasses.dataclass(frozen=True)
class PassAtKAdvantage(Advantage):
    """Only the best sample of a group counts; see `jaxrl_llm.advantages.pass_at_k_advantages`."""

    skips_unscored: ClassVar[bool] = True

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`."""
        return Credit(functions.pass_at_k_advantages(signals.rewards, mask=signals.scored))


@dataclasses.dataclass(frozen=True)
class MaxRLAdvantage(Advantage):
    """A = (R − mean of the group) / (mean of the group + ε); see `jaxrl_llm.advantages.max_rl_advantages`.

    Rewards must not be negative: their mean is read as the chance of success.
    """

    skips_unscored: ClassVar[bool] = True

    eps: float = 1e-6
    """ε."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(PREFIX, self, eps=not_negative(self.eps))

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`."""
        return Credit(functions.max_rl_advantages(signals.rewards, eps=self.eps, mask=signals.scored))


@dataclasses.dataclass(frozen=True)
class GDPOAdvantage(Advantage):
    """Each reward function normalised by itself, then summed and whitened; see `jaxrl_llm.advantages.gdpo_advantages`.

    One that does not apply to a sample has no part in its sum.
    """

    weights: tuple[float, ...] | None = None
    """One a reward function; `None`: those of the reward that is reported (`reward_weights`)."""
    normalize_over: NormalizeOver = "sequences"
    """What the last whitening counts."""

    @property
    def needs(self) -> frozenset[Need]:
        """The reward functions one by one."""
        return frozenset({"by_function"})

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        weights = self.weights
        check_fields(
            PREFIX,
            self,
            weights=(
                weights is None or (any(weights) and all(math.isfinite(weight) for weight in weights)),
                "be None, or finite numbers that are not all 0",
            ),
            normalize_over=one_of(self.normalize_over, NormalizeOver),
        )

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`."""
        rewards, given = signals.feedback.by_function, signals.feedback.weights
        return Credit(
            functions.gdpo_advantages(
                rewards,
                mask=~jnp.isnan(rewards),
                weights=given if self.weights is None else jnp.array(self.weights),
                normalize_over=self.normalize_over,
                lengths=jnp.sum(signals.mask, axis=-1) if self.normalize_over == "tokens" else None,
            )
        )


@dataclasses.dataclass(frozen=True)
class GFPOAdvantage(Advantage):
    """The k best samples of a group by a metric, normalised among themselves; see `gfpo_advantages`."""

    keep: int = 4
    """k: samples of a group that are trained on."""
    metric: GFPOMetric = "short"
    """What is best: the shortest completion, or the most reward per token."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            PREFIX,
            self,
            keep=at_least(self.keep, 2),
            metric=one_of(self.metric, GFPOMetric),
        )

    @property
    def smallest_group(self) -> int:
        """Samples to choose k of."""
        return self.keep

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`, and the samples that are kept."""
        if self.keep > signals.rewards.shape[1]:
            raise ValueError(f"{PREFIX}.keep={self.keep} is more than the {signals.rewards.shape[1]} samples a prompt")
        lengths = jnp.sum(signals.mask, axis=-1)
        metric = -lengths if self.metric == "short" else signals.rewards / jnp.maximum(lengths, 1)
        return Credit(*functions.gfpo_advantages(signals.rewards, metric, keep=self.keep))


@dataclasses.dataclass(frozen=True)
class ThresholdAdvantage(Advantage):
    """Only samples above their group's mean, or the best share of it; see `jaxrl_llm.advantages.threshold_filter`."""

    threshold: ThresholdKind = "hard"
    """hard: above the mean; soft: the best `top_percent` of the group."""
    top_percent: float | None = None
    """Share of a group that "soft" keeps, in percent."""
    scale: ThresholdScale = "none"
    """Whether advantages are divided by the group's deviation."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        soft = self.threshold == "soft"
        percent = self.top_percent
        check_fields(
            PREFIX,
            self,
            threshold=one_of(self.threshold, ThresholdKind),
            scale=one_of(self.scale, ThresholdScale),
            top_percent=(
                0 < percent <= 100 if soft and percent is not None else soft is (percent is not None),
                "be in (0, 100] with threshold='soft', and None with 'hard'",
            ),
        )

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`, and the samples that are kept."""
        return Credit(
            *functions.threshold_filter(
                signals.rewards, threshold=self.threshold, top_percent=self.top_percent, scale=self.scale
            )
        )


@dataclasses.dataclass(frozen=True)
class BRPOAdvantage(Advantage):
    """±1 by a judge's comparison with one sample of the group; see `jaxrl_llm.advantages.brpo_advantages`."""

    inconsistent: InconsistentVerdict = "tie"
    """What a sample is that was preferred in one order alone, or in none of a tie: 0, or "loss", as published, which
    pushes right answers down where most pairs are alike."""
    max_skew: float | None = 0.6
    """Groups whose advantages sum to more than this share of G, either way, are left out; `None`: none are."""

    @property
    def needs(self) -> frozenset[Need]:
        """A judge's verdicts."""
        return frozenset({"verdicts"})

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            PREFIX,
            self,
            inconsistent=one_of(self.inconsistent, InconsistentVerdict),
            max_skew=(True, "") if self.max_skew is None else share(self.max_skew),
        )

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`, and the samples of the groups that are kept."""
        feedback = signals.feedback
        advantages = functions.brpo_advantages(
            feedback.preferred,
            feedback.is_reference,
            preferred_swapped=feedback.preferred_swapped,
            inconsistent=self.inconsistent,
        )
        if self.max_skew is None:
            return Credit(advantages)
        keep = functions.brpo_skew(advantages)[:, None] <= self.max_skew
        return Credit(advantages, jnp.broadcast_to(keep, advantages.shape))


@dataclasses.dataclass(frozen=True)
class OptimalAdvantage(Advantage):
    """A = R − V*, V* of the reference's samples of the same prompt; see `jaxrl_llm.advantages.optimal_advantages`."""

    beta: float = 0.5
    """β of V*: price of a nat."""
    drop_unsolved: bool = True
    """Whether prompts of which the reference's samples all have a reward of 0 are left out."""

    smallest_group = 1

    @property
    def needs(self) -> frozenset[Need]:
        """Rewards of the reference's samples, which the reference draws."""
        return frozenset({"reference", "reference_rewards"})

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(PREFIX, self, beta=positive(self.beta))

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`, and the samples of the prompts that are kept."""
        of_reference = signals.feedback.reference_rewards
        advantages = functions.optimal_advantages(signals.rewards, of_reference, beta=self.beta)
        solved = jnp.any(of_reference != 0, axis=1, keepdims=True)
        keep = jnp.broadcast_to(solved, advantages.shape) if self.drop_unsolved else None
        value = Mean.of(signals.rewards[:, 0] - advantages[:, 0])
        return Credit(advantages, keep, metrics={"a_star_po/value": value})


@dataclasses.dataclass(frozen=True)
class HADWAdvantage(Advantage):
    """A group's advantages weighted by how hard its prompt is for the policy; see `hadw_advantages`.

    Rewards must be in [0, 1]: they are read as the chance of success, before any penalty for length.
    """

    group: GroupAdvantage = GroupAdvantage()
    """The advantages that are weighted."""
    scale: float = 1.3
    """λ: factor on all of them."""
    anchor: AnchorRule = "deviation"
    """How the anchor moves: by the deviation of the last anchors, or as the mean accuracy of the last batches."""
    window: int = 10
    """Anchors, or batches, that it looks back on."""
    eta: float = 1.0
    """Factor on the deviation, which is the share of the way to a batch's accuracy that the anchor goes."""
    min_rate: float = 0.1
    """Least share of the way. At 0, as published, the anchor all but stands once the window is full, while the accuracy
    rises: a slow one slows itself."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            PREFIX,
            self,
            scale=positive(self.scale),
            anchor=one_of(self.anchor, AnchorRule),
            window=at_least(self.window, 1),
            eta=not_negative(self.eta),
            min_rate=share(self.min_rate),
        )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        if self.anchor == "deviation":
            return {}
        return dict.fromkeys(("eta", "min_rate"), f"only with {PREFIX}.anchor='deviation' the anchor has a rate")

    def start(self) -> DifficultyAnchor:
        """The anchor before the first batch."""
        return DifficultyAnchor.init(self.window)

    def __call__(self, signals: Signals, memory: DifficultyAnchor) -> Credit:
        """Advantages `[P, G]`."""
        anchor = memory.prior(jnp.mean(signals.outcomes))
        plain = self.group(signals, ()).advantages
        weighted = functions.hadw_advantages(plain, signals.outcomes, anchor, scale=self.scale)
        return Credit(weighted, metrics={"hadw/anchor": Mean.of(anchor)})

    def remember(self, signals: Signals, memory: DifficultyAnchor) -> DifficultyAnchor:
        """Moves the anchor towards the batch's accuracy."""
        accuracy = jnp.mean(signals.outcomes)
        if self.anchor == "moving_average":
            return memory.update_moving_average(accuracy)
        return memory.update(accuracy, eta=self.eta, min_rate=self.min_rate)


# ---- Groups, with the entropies of the policy --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EntropyAdvantage(Advantage):
    """Settings that GTPO and GRPO-S share: rewards of successes and failures shaped by the policy's entropy."""

    success_weight: float = 1.0
    """Weight of the outcome."""
    entropy_weight: float = 0.1
    """Weight of the entropy's share."""
    success_reward: float = 1.0
    """Reward from which on a completion is a success, whatever its length is punished with."""
    shape_failures: bool = True
    """Whether failures are shaped, too."""
    norm: EntropyNorm = "joint"
    """Whether successes and failures are normalised together or apart ("separate"), as published for GTPO: then half of
    the tokens of successes are pushed down, and the policy forgets what it knew."""
    mixed_groups_only: bool = True
    """Whether a group of successes alone, or of failures alone, has no advantages: DAPO's dynamic sampling, on which
    the paper builds, leaves such groups out, and normalised they would reward entropy and nothing else."""

    @property
    def needs(self) -> frozenset[Need]:
        """Entropies of the policy."""
        return frozenset({"entropy"})

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            PREFIX,
            self,
            success_weight=not_negative(self.success_weight),
            entropy_weight=not_negative(self.entropy_weight),
            success_reward=finite(self.success_reward),
            norm=one_of(self.norm, EntropyNorm),
        )

    def _credit(self, function: Callable[..., jax.Array], signals: Signals) -> Credit:
        won = signals.outcomes >= self.success_reward
        advantages = function(
            signals.entropy,
            won,
            signals.mask,
            success_weight=self.success_weight,
            entropy_weight=self.entropy_weight,
            shape_failures=self.shape_failures,
            norm=self.norm,
            added=signals.rewards - signals.outcomes,
        )
        if self.mixed_groups_only:
            mixed = jnp.any(won, axis=1) & ~jnp.all(won, axis=1)
            advantages = jnp.where(mixed.reshape(-1, *(1,) * (advantages.ndim - 1)), advantages, 0.0)
        return Credit(advantages)


@dataclasses.dataclass(frozen=True)
class GTPOAdvantage(EntropyAdvantage):
    """One advantage a token, from entropy-shaped rewards; see `jaxrl_llm.advantages.gtpo_advantages`."""

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G, Tc]`."""
        return self._credit(functions.gtpo_advantages, signals)


@dataclasses.dataclass(frozen=True)
class GRPOSAdvantage(EntropyAdvantage):
    """One advantage a completion, by its mean entropy; see `jaxrl_llm.advantages.grpo_s_advantages`."""

    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages `[P, G]`."""
        return self._credit(functions.grpo_s_advantages, signals)
