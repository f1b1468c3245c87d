"""Preference pairs as the losses of pairs see them: one log-probability for each completion."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict

import jax

from jaxrl_llm.checks import check_fields, finite, not_negative, one_of, positive
from jaxrl_llm.losses.preference_terms import FDivergence
from jaxrl_llm.losses.reference_free import NLLOver, OddsLogprob
from jaxrl_llm.records import Metrics

PREFIX = "objective.pair_loss"


class PairCounts(NamedTuple):
    """What all parts of a batch of pairs share: the denominators."""

    pairs: jax.Array
    """Number of valid pairs."""
    chosen_tokens: jax.Array
    """Number of tokens of their chosen completions."""

    def of_likelihood(self, over: NLLOver) -> jax.Array:
        """The denominator of a mean over the chosen tokens, or over the chosen completions."""
        return self.chosen_tokens if over == "tokens" else self.pairs


class Common(TypedDict):
    """The arguments that every loss of pairs but AOT's has."""

    weights: jax.Array | None
    mask: jax.Array
    normalizer: jax.Array


class ScoredPairs(NamedTuple):
    """P preference pairs under the policy and the reference; the chosen completion is at 0, the rejected one at 1."""

    logprobs: jax.Array
    """`[P, 2]`: log-probs of whole completions under the policy."""
    ref_logprobs: jax.Array | None
    """`[P, 2]`: the same under the reference, if the loss reads one."""
    lengths: jax.Array
    """`[P, 2]` int32: their numbers of tokens."""
    mask: jax.Array
    """`[P]` bool: the pairs that are no padding."""
    weights: jax.Array | None
    """`[P]`: constant factors on the pairs' losses."""
    win_probs: jax.Array | None
    """`[P, 2]`: how often each completion wins, if a judge said so."""
    counts: PairCounts

    @property
    def policy(self) -> tuple[jax.Array, jax.Array]:
        """Log-probs of the chosen and of the rejected completions under the policy, `[P]` each."""
        return self.logprobs[:, 0], self.logprobs[:, 1]

    @property
    def sides(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Those under the policy, then those under the reference.

        Raises:
            ValueError: there is no reference.
        """
        if self.ref_logprobs is None:
            raise ValueError("this loss reads log-probs under a reference, and the rows have none")
        return *self.policy, self.ref_logprobs[:, 0], self.ref_logprobs[:, 1]

    @property
    def both_lengths(self) -> tuple[jax.Array, jax.Array]:
        """Numbers of tokens of the chosen and of the rejected completions, `[P]` each."""
        return self.lengths[:, 0], self.lengths[:, 1]

    @property
    def common(self) -> Common:
        """Mask, weights and denominator."""
        return {"weights": self.weights, "mask": self.mask, "normalizer": self.counts.pairs}


def below_half(value: float) -> tuple[bool, str]:
    """The condition on a share of wrong labels: at one half they say nothing."""
    return 0 <= value < 0.5, "be at least 0 and below 0.5"


_CONDITIONS: Mapping[str, Callable[[Any], tuple[bool, str]]] = MappingProxyType(
    {
        **dict.fromkeys(("beta", "tau"), positive),
        **dict.fromkeys(("gamma", "margin", "nll_coef", "odds_coef"), not_negative),
        **dict.fromkeys(("alpha", "f_alpha", "reward_shift"), finite),
        "label_smoothing": below_half,
        "f_divergence": lambda value: one_of(value, FDivergence),
        "odds_logp": lambda value: one_of(value, OddsLogprob),
        "nll_over": lambda value: one_of(value, NLLOver),
    }
)
"""What a setting may be, by its name: it means the same in every loss that has it."""


@dataclasses.dataclass(frozen=True)
class PairLoss(abc.ABC):
    """A loss of preference pairs with its hyper-parameters."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        check_fields(
            PREFIX, self, **{name: _CONDITIONS[name](settings[name]) for name in settings if name in _CONDITIONS}
        )

    @property
    def needs_reference(self) -> bool:
        """Whether it reads log-probs under a reference."""
        return True

    @property
    def whole_batch(self) -> bool:
        """Whether it compares pairs with each other."""
        return False

    @abc.abstractmethod
    def __call__(self, pairs: ScoredPairs) -> tuple[jax.Array, Metrics]:
        """The loss of these pairs as their part of the whole batch's, and its metrics."""


@dataclasses.dataclass(frozen=True)
class ReferenceFreeLoss(PairLoss):
    """A loss of preference pairs that reads the policy alone."""

    @property
    def needs_reference(self) -> bool:
        """False."""
        return False
