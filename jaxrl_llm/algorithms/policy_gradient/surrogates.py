"""Policy losses as frozen records, each a few lines around a function of `jaxrl_llm.losses`."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar, NamedTuple, TypedDict

import jax

from jaxrl_llm import losses as functions
from jaxrl_llm.checks import check_fields, finite, not_negative, one_of, positive, share
from jaxrl_llm.losses import AggregationMode, BinaryDivergence, RatioLevel, SoftGate
from jaxrl_llm.records import Metrics

PREFIX = "algorithm.surrogate"
Loss = tuple[jax.Array, Metrics]


class PolicyTokens(NamedTuple):
    """What a policy loss reads of some rows."""

    logprobs: jax.Array
    """`[P, G, Tc]` under the policy that is trained."""
    old_logprobs: jax.Array | None
    """`[P, G, Tc]` under the policy before the batch's first update; `None`: the policy itself."""
    advantages: jax.Array
    """`[P, G]` or `[P, G, Tc]`."""
    mask: jax.Array
    """`[P, G, Tc]` bool: the tokens that are trained."""
    weights: jax.Array | None
    """`[P, G, Tc]`: constant factors, or `None`."""
    key: jax.Array
    """For losses that draw."""
    ref_logprobs: jax.Array | None = None
    """`[P, G, Tc]` under the reference, where the loss or its KL term reads them."""

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
        """The first four, in the order of the arguments of a policy loss."""
        return self.logprobs, self.old_logprobs, self.advantages, self.mask


class ReductionArguments(TypedDict):
    """How a loss names what `Reduction` holds."""

    aggregation: AggregationMode
    normalizer: jax.Array
    max_length: int


class Reduction(NamedTuple):
    """How token losses become one number."""

    mode: AggregationMode
    normalizer: jax.Array
    """The denominator that all rows of one optimizer step share."""
    max_length: int

    @property
    def arguments(self) -> ReductionArguments:
        """Those of a loss that exists with every aggregation; the others take the normalizer alone."""
        return {"aggregation": self.mode, "normalizer": self.normalizer, "max_length": self.max_length}


class ClipArguments(TypedDict):
    """How a loss names its range around a ratio of 1."""

    clip_low: float | None
    clip_high: float | None


class Surrogate(abc.ABC):
    """A policy loss: a frozen record of its settings, and a pure function of tokens."""

    aggregations: ClassVar[tuple[AggregationMode, ...] | None] = None
    """The aggregations that it exists with; `None`: all."""
    whole_batch: ClassVar[bool] = False
    """Whether it compares the tokens of a batch, so that there can be no micro-batches."""
    on_policy: ClassVar[bool] = False
    """Whether it has no ratio to the policy that sampled, so that a batch makes one optimizer step and no more."""
    needs_reference: ClassVar[bool] = False
    """Whether it reads log-probs under the reference."""

    @abc.abstractmethod
    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""


@dataclasses.dataclass(frozen=True)
class Clip(Surrogate):
    """Settings that surrogates with a range around a ratio of 1 share."""

    clip_low: float | None = 0.2
    """Distance of the ratio's lower bound from 1; `None` for no bound."""
    clip_high: float | None = 0.2
    """Distance of the ratio's upper bound from 1; `None` for no bound."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        high = self.clip_high
        check_fields(
            PREFIX,
            self,
            clip_low=self._lower_bound(),
            clip_high=(high is None or 0 <= high < math.inf, "be None, or a distance from 1 that is not negative"),
        )

    def _lower_bound(self) -> tuple[bool, str]:
        """The condition on `clip_low`: from 1 on, no ratio is so small."""
        low = self.clip_low
        return low is None or 0 <= low < 1, "be None, or a distance from 1 that is at least 0 and below 1"

    @property
    def bounds(self) -> ClipArguments:
        """The range, as a loss names it."""
        return {"clip_low": self.clip_low, "clip_high": self.clip_high}


@dataclasses.dataclass(frozen=True)
class Clipped(Clip):
    """max(−A·r, −A·clip(r, 1 − clip_low, 1 + clip_high)) of each token; see `jaxrl_llm.losses.grpo_loss`."""

    dual_clip: float | None = None
    """Bound on the loss of tokens with a negative advantage, in units of −A."""
    ratio_cap: float | None = None
    """Cap on the unclipped ratio (two-sided clipping)."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        super().__post_init__()
        high, cap = self.clip_high, self.ratio_cap
        check_fields(
            PREFIX,
            self,
            dual_clip=(self.dual_clip is None or 1 < self.dual_clip < math.inf, "be None, or above 1"),
            ratio_cap=(
                cap is None or (high is not None and 1 + high < cap < math.inf),
                "be None, or above 1 + clip_high",
            ),
        )

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.grpo_loss(
            *tokens.arrays,
            **self.bounds,
            dual_clip=self.dual_clip,
            ratio_cap=self.ratio_cap,
            kl_coef=0,
            weights=tokens.weights,
            **reduction.arguments,
        )


@dataclasses.dataclass(frozen=True)
class LogProb(Surrogate):
    """−A · log-prob of each token, without a ratio: REINFORCE, GPG; see `jaxrl_llm.losses.reinforce_loss`."""

    on_policy = True

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.reinforce_loss(
            tokens.logprobs,
            tokens.advantages,
            tokens.mask,
            weights=tokens.weights,
            **reduction.arguments,
        )


@dataclasses.dataclass(frozen=True)
class SoftGated(Surrogate):
    """SAPO: a smooth gate in place of the clip; see `jaxrl_llm.losses.sapo_loss`."""

    tau_pos: float = 1.0
    """Steepness for advantages above 0."""
    tau_neg: float = 1.05
    """Steepness for the others."""
    gate: SoftGate = "sigmoid"
    """Shape of the gate."""
    gate_scale: bool = True
    """Scale the gate so that its slope at a ratio of 1 is 1."""
    ratio_level: RatioLevel = "token"
    """Whose ratio it is: each token's, or that of the sequence, as GSPO's."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            PREFIX,
            self,
            tau_pos=positive(self.tau_pos),
            tau_neg=positive(self.tau_neg),
            gate=one_of(self.gate, SoftGate),
            ratio_level=one_of(self.ratio_level, RatioLevel),
        )

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.sapo_loss(
            *tokens.arrays,
            tau_pos=self.tau_pos,
            tau_neg=self.tau_neg,
            gate=self.gate,
            gate_scale=self.gate_scale,
            ratio_level=self.ratio_level,
            weights=tokens.weights,
            **reduction.arguments,
        )


@dataclasses.dataclass(frozen=True)
class CISPO(Surrogate):
    """−sg(clip(r, w_min, w_max)) · A · log-prob: every token keeps a gradient; see `jaxrl_llm.losses.cispo_loss`."""

    w_min: float = 0.0
    """Least weight."""
    w_max: float = 5.0
    """Largest weight, as such and not as a distance from 1."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            PREFIX,
            self,
            w_min=not_negative(self.w_min),
            w_max=(self.w_min < self.w_max < math.inf, "be larger than w_min, and finite"),
        )

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.cispo_loss(
            *tokens.arrays,
            w_min=self.w_min,
            w_max=self.w_max,
            weights=tokens.weights,
            **reduction.arguments,
        )


# ---- Tokens that would move the policy too far -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DPPO(Surrogate):
    """Tokens are left out by how far their probability has moved; see `jaxrl_llm.losses.dppo_loss`."""

    delta_low: float
    """Bound for advantages that are not above 0. No default is confirmed."""
    delta_high: float
    """Bound for advantages above 0."""
    divergence: BinaryDivergence = "tv"
    """Measure of the distance."""
    log_ratio_coef: float = 0.0
    """Weight of the squared log-ratio to the policy that sampled."""

    aggregations = ("token-mean",)

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            PREFIX,
            self,
            delta_low=not_negative(self.delta_low),
            delta_high=not_negative(self.delta_high),
            divergence=one_of(self.divergence, BinaryDivergence),
            log_ratio_coef=not_negative(self.log_ratio_coef),
        )

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.dppo_loss(
            *tokens.arrays,
            delta_low=self.delta_low,
            delta_high=self.delta_high,
            divergence=self.divergence,
            log_ratio_coef=self.log_ratio_coef,
            weights=tokens.weights,
            normalizer=reduction.normalizer,
        )


@dataclasses.dataclass(frozen=True)
class CovarianceClipped(Clip):
    """Clip-Cov: some tokens that would lower the entropy most are left out; see `jaxrl_llm.losses.clip_cov_loss`."""

    clip_low: float | None = 1.0
    clip_high: float | None = 1.0
    fraction: float = 2e-4
    """Share of the tokens."""
    cov_low: float = 1.0
    """Least covariance of a token that may be left out."""
    cov_high: float = 5.0
    """Largest one."""

    aggregations = ("token-mean",)
    whole_batch = True

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        super().__post_init__()
        check_fields(
            PREFIX,
            self,
            fraction=share(self.fraction),
            cov_low=finite(self.cov_low),
            cov_high=(self.cov_low < self.cov_high < math.inf, "be larger than cov_low, and finite"),
        )

    def _lower_bound(self) -> tuple[bool, str]:
        low = self.clip_low
        return low is None or 0 <= low <= 1, "be None, or a distance from 1 between 0 and 1"

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.clip_cov_loss(
            *tokens.arrays,
            tokens.key,
            fraction=self.fraction,
            cov_low=self.cov_low,
            cov_high=self.cov_high,
            **self.bounds,
            weights=tokens.weights,
            normalizer=reduction.normalizer,
        )


@dataclasses.dataclass(frozen=True)
class CovariancePenalized(Surrogate):
    """KL-Cov: a penalty on the tokens that would lower the entropy most; see `jaxrl_llm.losses.kl_cov_loss`."""

    fraction: float = 2e-4
    """Share of the tokens."""
    kl_coef: float = 1.0
    """Weight of the penalty."""

    aggregations = ("token-mean",)
    whole_batch = True

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(PREFIX, self, fraction=share(self.fraction), kl_coef=not_negative(self.kl_coef))

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.kl_cov_loss(
            *tokens.arrays,
            fraction=self.fraction,
            kl_coef=self.kl_coef,
            weights=tokens.weights,
            normalizer=reduction.normalizer,
        )
