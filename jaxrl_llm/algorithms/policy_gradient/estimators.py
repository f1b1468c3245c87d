"""Advantage estimators as frozen records, each a few lines around a function of `jaxrl_llm.advantages`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from jaxrl_llm import advantages as functions
from jaxrl_llm.advantages import (
    AdvantageBaseline,
    AdvantageScale,
    DifficultyAnchor,
    GPGAlphaMode,
    InconsistentVerdict,
    NormalizeOver,
    ThresholdKind,
    ThresholdScale,
)
from jaxrl_llm.algorithms.interfaces import Advantage, Credit, Need, Signals
from jaxrl_llm.checks import at_least, check_fields, not_negative, one_of, positive, share
from jaxrl_llm.records import Mean

PREFIX = "algorithm.advantage"
GFPOMetric = Literal["short", "efficient"]
AnchorRule = Literal["deviation", "moving_average"]


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
