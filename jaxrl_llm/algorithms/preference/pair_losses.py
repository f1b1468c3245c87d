"""The losses of preference pairs as parts: frozen records of their hyper-parameters, each a call of one function.

A new one is a record with `__call__`; see `preference_presets` for the settings of the papers.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxrl_llm.algorithms.preference.scored_pairs import PREFIX, PairLoss, ReferenceFreeLoss, ScoredPairs
from jaxrl_llm.checks import check_fields, positive
from jaxrl_llm.losses.aot import aot_loss
from jaxrl_llm.losses.dpo import cdpo_loss, dpo_loss, robust_dpo_loss
from jaxrl_llm.losses.preference import discopop_loss, exo_loss, hinge_loss, ipo_loss
from jaxrl_llm.losses.preference_sides import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_loss, sppo_loss
from jaxrl_llm.losses.preference_terms import FDivergence
from jaxrl_llm.losses.reference_free import NLLOver, OddsLogprob, cpo_loss, orpo_loss, simpo_loss, slic_loss
from jaxrl_llm.masking import count_true, safe_divide
from jaxrl_llm.records import Metrics

# ---- Functions of the margin -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DPO(PairLoss):
    """`dpo_loss`: a classifier whose logit is the implicit reward."""

    beta: float = 0.1
    """The larger, the closer the policy stays to the reference."""
    f_divergence: FDivergence = "reverse_kl"
    """Divergence that ties the policy to the reference."""
    f_alpha: float = 0.5
    """Of the divergence alpha."""
    length_normalized: bool = False
    """Divide each side's log-ratio by its number of tokens."""
    reference_free: bool = False
    """Leave the reference out of the margin."""

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        return {} if self.f_divergence == "alpha" else {"f_alpha": f"only {PREFIX}.f_divergence='alpha' reads it"}

    @property
    def needs_reference(self) -> bool:
        """False if it is left out."""
        return not self.reference_free

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        chosen_lengths, rejected_lengths = pairs.both_lengths if self.length_normalized else (None, None)
        return dpo_loss(
            *((*pairs.policy, None, None) if self.reference_free else pairs.sides),
            beta=self.beta,
            f_divergence=self.f_divergence,
            f_alpha=self.f_alpha,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            **pairs.common,
        )


@dataclasses.dataclass(frozen=True)
class CDPO(PairLoss):
    """`cdpo_loss`: DPO with smoothed labels."""

    label_smoothing: float = 0.1
    """Share of wrong labels, in [0, 0.5)."""
    beta: float = 0.1
    """The larger, the closer the policy stays to the reference."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return cdpo_loss(*pairs.sides, label_smoothing=self.label_smoothing, beta=self.beta, **pairs.common)


@dataclasses.dataclass(frozen=True)
class RobustDPO(PairLoss):
    """`robust_dpo_loss`: DPO that is unbiased where a known share of labels is flipped."""

    label_smoothing: float = 0.1
    """Share of flipped labels, in [0, 0.5)."""
    beta: float = 0.1
    """The larger, the closer the policy stays to the reference."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return robust_dpo_loss(*pairs.sides, label_smoothing=self.label_smoothing, beta=self.beta, **pairs.common)


@dataclasses.dataclass(frozen=True)
class IPO(PairLoss):
    """`ipo_loss`: regression of the margin to 1 / (2 beta). The loss is large: mind the learning rate."""

    beta: float = 0.1
    """The paper's τ."""
    length_normalized: bool = False
    """Divide each side's log-ratio by its number of tokens."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        chosen_lengths, rejected_lengths = pairs.both_lengths if self.length_normalized else (None, None)
        return ipo_loss(
            *pairs.sides,
            beta=self.beta,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            **pairs.common,
        )


@dataclasses.dataclass(frozen=True)
class Hinge(PairLoss):
    """`hinge_loss`: pairs with a margin beyond 1 / beta have no gradient."""

    beta: float = 0.1
    """The larger, the closer the policy stays to the reference."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return hinge_loss(*pairs.sides, beta=self.beta, **pairs.common)


@dataclasses.dataclass(frozen=True)
class EXO(PairLoss):
    """`exo_loss`: the reverse KL from the smoothed label."""

    beta: float = 0.1
    """The larger, the closer the policy stays to the reference."""
    label_smoothing: float = 1e-3
    """Probability of the rejected completion in the label, in (0, 0.5)."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        super().__post_init__()
        check_fields(PREFIX, self, label_smoothing=positive(self.label_smoothing))  # at 0 the divergence is infinite

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return exo_loss(*pairs.sides, beta=self.beta, label_smoothing=self.label_smoothing, **pairs.common)


@dataclasses.dataclass(frozen=True)
class DiscoPOP(PairLoss):
    """`discopop_loss`: DPO blended with an exponential loss."""

    beta: float = 0.05
    """The larger, the closer the policy stays to the reference."""
    tau: float = 0.05
    """Width of the switch between the two."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return discopop_loss(*pairs.sides, beta=self.beta, tau=self.tau, **pairs.common)


@dataclasses.dataclass(frozen=True)
class AOT(PairLoss):
    """`aot_loss`: quantiles of the whole batch instead of pairs, so that micro-batches take a pass more."""

    beta: float = 0.1
    """The larger, the closer the policy stays to the reference."""
    label_smoothing: float = 0.0
    """Share of wrong labels, in [0, 0.5)."""
    paired: bool = True
    """Compare margins with the reference's; False: rewards of chosen with those of rejected completions."""

    @property
    def whole_batch(self) -> bool:
        """True."""
        return True

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics.

        Raises:
            ValueError: the pairs have weights.
        """
        if pairs.weights is not None:
            raise ValueError("AOT compares quantiles, not pairs, and so has no weights: leave WPO out")
        loss, metrics = aot_loss(
            *pairs.sides, beta=self.beta, label_smoothing=self.label_smoothing, paired=self.paired, mask=pairs.mask
        )
        # 1, but in an evaluation, which adds up the means of several batches.
        share = safe_divide(count_true(pairs.mask), pairs.counts.pairs)
        return loss * share, metrics


# ---- Functions of each side ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NCA(PairLoss):
    """`nca_loss`: keeps the chosen completion likely."""

    beta: float = 0.1
    """The larger, the closer the policy stays to the reference."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return nca_loss(*pairs.sides, beta=self.beta, **pairs.common)


@dataclasses.dataclass(frozen=True)
class APOZero(PairLoss):
    """`apo_zero_loss`: the chosen completion up, the rejected one down."""

    beta: float = 0.1
    """The larger, the closer the policy stays to the reference."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return apo_zero_loss(*pairs.sides, beta=self.beta, **pairs.common)


@dataclasses.dataclass(frozen=True)
class APODown(PairLoss):
    """`apo_down_loss`: both completions down, the rejected one further."""

    beta: float = 0.1
    """The larger, the closer the policy stays to the reference."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return apo_down_loss(*pairs.sides, beta=self.beta, **pairs.common)


@dataclasses.dataclass(frozen=True)
class SPPO(PairLoss):
    """`sppo_loss`: regression of each log-ratio to how often its completion wins (`win_probs` of the rows, or 1, 0)."""

    beta: float = 1e-3
    """Inverse of the paper's η."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        wins = (None, None) if pairs.win_probs is None else (pairs.win_probs[:, 0], pairs.win_probs[:, 1])
        return sppo_loss(
            *pairs.sides, beta=self.beta, chosen_win_probs=wins[0], rejected_win_probs=wins[1], **pairs.common
        )


@dataclasses.dataclass(frozen=True)
class BCOPair(PairLoss):
    """`bco_pair_loss`: each side against a fixed shift of the reward."""

    beta: float = 0.1
    """The larger, the closer the policy stays to the reference."""
    reward_shift: float = 0.0
    """δ, which separates good rewards from bad ones."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return bco_pair_loss(*pairs.sides, beta=self.beta, reward_shift=self.reward_shift, **pairs.common)


# ---- Without a reference ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SimPO(ReferenceFreeLoss):
    """`simpo_loss`: the mean log-probability per token is the reward, with a target margin."""

    beta: float = 2.0
    """Scale of the reward."""
    gamma: float = 0.5
    """Target margin of the reward."""
    alpha: float = 0.0
    """Shape of the reward (AlphaPO); 0 is the logarithm."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return simpo_loss(
            *pairs.policy,
            *pairs.both_lengths,
            beta=self.beta,
            gamma=self.gamma,
            alpha=self.alpha,
            **pairs.common,
        )


@dataclasses.dataclass(frozen=True)
class CPO(ReferenceFreeLoss):
    """`cpo_loss`: DPO under a uniform reference, and the likelihood of the chosen completion."""

    beta: float = 0.1
    """The larger, the closer the policy stays to the reference."""
    label_smoothing: float = 0.0
    """Share of wrong labels, in [0, 0.5)."""
    nll_coef: float = 1.0
    """Weight of the likelihood."""
    nll_over: NLLOver = "tokens"
    """Its mean is over all chosen tokens, or over completions, of which a long one then counts no more."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return cpo_loss(
            *pairs.policy,
            pairs.lengths[:, 0],
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            nll_coef=self.nll_coef,
            nll_over=self.nll_over,
            nll_normalizer=pairs.counts.of_likelihood(self.nll_over),
            **pairs.common,
        )


@dataclasses.dataclass(frozen=True)
class SLiC(ReferenceFreeLoss):
    """`slic_loss`: a hinge on log-probabilities, and the likelihood of the chosen completion."""

    margin: float = 1.0
    """Difference of log-probabilities beyond which a pair has no gradient."""
    nll_coef: float = 0.1
    """Weight of the likelihood, per sequence."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return slic_loss(*pairs.policy, margin=self.margin, nll_coef=self.nll_coef, **pairs.common)


@dataclasses.dataclass(frozen=True)
class ORPO(ReferenceFreeLoss):
    """`orpo_loss`: fine-tuning on the chosen completion with a penalty on the odds of the rejected one."""

    odds_coef: float = 0.1
    """Weight of the odds ratio, the paper's λ."""
    odds_logp: OddsLogprob = "mean"
    """Probability of a completion: per token, or of the whole."""
    nll_over: NLLOver = "tokens"
    """The mean of the likelihood term is over all chosen tokens, or over completions."""

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss and its metrics."""
        return orpo_loss(
            *pairs.policy,
            *pairs.both_lengths,
            odds_coef=self.odds_coef,
            odds_logp=self.odds_logp,
            nll_over=self.nll_over,
            nll_normalizer=pairs.counts.of_likelihood(self.nll_over),
            **pairs.common,
        )


# ---- Several at once -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mixture(PairLoss):
    """A weighted sum of losses. Of metrics of one name, that of the first loss is logged."""

    losses: tuple[PairLoss, ...] = (DPO(), BCOPair())
    """What is added up."""
    weights: tuple[float, ...] = (1.0, 1.0)
    """One for each loss."""

    def __post_init__(self) -> None:
        """Rejects a mixture that is none."""
        super().__post_init__()
        if not self.losses or len(self.losses) != len(self.weights):
            raise ValueError(f"{len(self.losses)} losses with {len(self.weights)} weights: give one weight for each")
        sound = any(self.weights) and all(0 <= weight < math.inf for weight in self.weights)
        check_fields(PREFIX, self, weights=(sound, "be finite and not negative, and not all 0"))

    @property
    def needs_reference(self) -> bool:
        """Whether one of them does."""
        return any(loss.needs_reference for loss in self.losses)

    @property
    def whole_batch(self) -> bool:
        """Whether one of them compares pairs."""
        return any(loss.whole_batch for loss in self.losses)

    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The sum, and the metrics."""
        total, metrics = jnp.zeros(()), {}
        for loss, weight in zip(self.losses, self.weights, strict=True):
            value, found = loss(pairs)
            total, metrics = total + weight * value, found | metrics
        return total, metrics
