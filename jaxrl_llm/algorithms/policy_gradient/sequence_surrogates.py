"""Policy losses with one ratio for a whole sequence, as frozen records."""

from __future__ import annotations

import dataclasses

from jaxrl_llm import losses as functions
from jaxrl_llm.algorithms.policy_gradient.surrogates import PREFIX, Clip, Loss, PolicyTokens, Reduction, Surrogate
from jaxrl_llm.checks import check_fields, not_negative, positive


@dataclasses.dataclass(frozen=True)
class SequenceClipped(Clip):
    """GSPO: one ratio a sequence, the geometric mean of its tokens'; see `jaxrl_llm.losses.gspo_loss`."""

    clip_low: float | None = 3e-4
    clip_high: float | None = 4e-4
    length_normalize: bool = True
    """The n-th root of the product of the tokens' ratios; without it, the product."""

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.gspo_loss(
            *tokens.arrays,
            **self.bounds,
            length_normalize=self.length_normalize,
            weights=tokens.weights,
            **reduction.arguments,
        )


@dataclasses.dataclass(frozen=True)
class SequenceTokenClipped(Clip):
    """GSPO-token: the sequence's ratio in value, the token's in gradient; see `jaxrl_llm.losses.gspo_token_loss`."""

    clip_low: float | None = 3e-4
    clip_high: float | None = 4e-4

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.gspo_token_loss(
            *tokens.arrays,
            **self.bounds,
            weights=tokens.weights,
            **reduction.arguments,
        )


@dataclasses.dataclass(frozen=True)
class LengthWeightedSequenceClipped(Clip):
    """LUSPO: GSPO's loss of each sequence times its length; see `jaxrl_llm.losses.luspo_loss`."""

    clip_low: float | None = 2e-3
    clip_high: float | None = 2.5e-3

    aggregations = ("seq-mean-token-sum",)

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.luspo_loss(
            *tokens.arrays,
            **self.bounds,
            weights=tokens.weights,
            normalizer=reduction.normalizer,
        )


@dataclasses.dataclass(frozen=True)
class GeometricMeanClipped(Clip):
    """GMPO: tokens clipped in log space, then their geometric mean; see `jaxrl_llm.losses.gmpo_loss`."""

    clip_low: float | None = 0.4
    """Distance of the lower bound of the ratio's logarithm from 0; `None` for no bound."""
    clip_high: float | None = 0.4
    """Distance of its upper bound from 0; `None` for no bound."""

    aggregations = ("seq-mean-token-mean",)

    def _lower_bound(self) -> tuple[bool, str]:
        return not_negative(self.clip_low, optional=True)

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.gmpo_loss(
            *tokens.arrays,
            **self.bounds,
            weights=tokens.weights,
            normalizer=reduction.normalizer,
        )


@dataclasses.dataclass(frozen=True)
class VESPO(Surrogate):
    """A smooth, detached weight of the whole sequence's ratio; see `jaxrl_llm.losses.vespo_loss`."""

    k_pos: float = 2.0
    """Exponent of the ratio for advantages above 0."""
    lam_pos: float = 3.0
    """Decay for advantages above 0."""
    k_neg: float = 3.0
    """Exponent of the ratio for the others."""
    lam_neg: float = 2.0
    """Decay for the others."""

    aggregations = ("token-mean",)

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        names = [field.name for field in dataclasses.fields(self)]
        check_fields(PREFIX, self, **{name: not_negative(getattr(self, name)) for name in names})

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        return functions.vespo_loss(
            *tokens.arrays,
            k_pos=self.k_pos,
            lam_pos=self.lam_pos,
            k_neg=self.k_neg,
            lam_neg=self.lam_neg,
            weights=tokens.weights,
            normalizer=reduction.normalizer,
        )


@dataclasses.dataclass(frozen=True)
class AdvantageRegression(Surrogate):
    """A*-PO: (β log(π / reference) − A)² of each sequence; see `jaxrl_llm.losses.a_star_po_loss`."""

    beta: float = 1e-3
    """β: price of a nat."""

    aggregations = ("seq-mean-token-sum",)
    on_policy = True
    needs_reference = True

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(PREFIX, self, beta=positive(self.beta))

    def __call__(self, tokens: PolicyTokens, reduction: Reduction) -> Loss:
        """The rows' part of the loss, and its metrics."""
        assert tokens.ref_logprobs is not None  # it says that it needs them
        return functions.a_star_po_loss(
            tokens.logprobs,
            tokens.ref_logprobs,
            tokens.advantages,
            tokens.mask,
            beta=self.beta,
            weights=tokens.weights,
            normalizer=reduction.normalizer,
        )
