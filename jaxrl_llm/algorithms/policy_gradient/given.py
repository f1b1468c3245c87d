"""Policy gradients of given rows: samples, advantages and log-probs come from elsewhere, such as trees of turns."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from jaxrl_llm.algorithms.offline import Objective
from jaxrl_llm.algorithms.policy_gradient.objective import LearnerBatch, PolicyGradient
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.checks import check_fields, not_negative
from jaxrl_llm.logprobs import TokenScores
from jaxrl_llm.losses import AggregationMode, aggregation_normalizer, echo_loss
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Metrics

OBSERVATION_AGGREGATION: AggregationMode = "seq-mean-token-mean"
"""Each conversation counts alike, however long what was answered is."""


class GivenNormalizers(NamedTuple):
    """Denominators that all micro-batches of one optimizer step share."""

    policy: jax.Array
    observations: jax.Array | None


@dataclasses.dataclass(frozen=True)
class GivenAdvantages(Objective):
    """The policy's loss of a policy gradient with the rows' own `advantages`: an `Objective` of `LearnerBatch`.

    Its estimator is not asked, nor is there a critic: all else (surrogate, aggregation, KL, entropy, correction) is as
    in `make_update_step`. Rows bring `old_logprobs`, unless this is the first optimizer step of what was sampled.
    """

    algorithm: PolicyGradient
    """The objective."""
    temperature: float = 1.0
    """The one that was sampled with; log-probs are scored with it."""
    observation_coef: float = 0.0
    """Weight of the cross-entropy of what was answered to the policy, the rows' `observations` (ECHO: 0.1)."""

    def __post_init__(self) -> None:
        """Rejects what given rows do not tell: how long they may be (of trees their width is what it happens to be).

        Raises:
            ValueError: names the setting.
        """
        if self.algorithm.aggregation == "seq-mean-token-sum-norm" and self.algorithm.max_length is None:
            raise ValueError(
                "algorithm.max_length=None with algorithm.aggregation='seq-mean-token-sum-norm': given rows do not say "
                "how long completions may be; set max_length to that"
            )
        if self.algorithm.keep_sampling_mask:
            raise ValueError(
                "algorithm.keep_sampling_mask=True: given rows do not say what their tokens were drawn from; leave it "
                "out"
            )
        if self.algorithm.watches_router:
            raise ValueError(
                f"algorithm.routing={self.algorithm.routing!r} and algorithm.router={self.algorithm.router}: given "
                "rows are scored by the experts of the model, whose routers are not watched; leave them out"
            )
        check_fields("GivenAdvantages", self, observation_coef=not_negative(self.observation_coef))

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a KL term, or its surrogate reads a reference."""
        return self.algorithm.loss_needs_reference

    @property
    def whole_groups(self) -> bool:
        """Whether the aggregation looks at groups."""
        return self.algorithm.needs_whole_groups

    @property
    def whole_batch(self) -> bool:
        """Whether the surrogate compares the tokens of a batch."""
        return self.algorithm.surrogate.whole_batch

    def normalizer(self, rows: LearnerBatch) -> GivenNormalizers:
        """The denominators of the policy's loss and of that of observations.

        Raises:
            ValueError: observations are to be learned, and the rows bring none.
        """
        of_policy = self.algorithm.normalizer(rows.mask)
        if not self.observation_coef:
            return GivenNormalizers(of_policy, None)
        if rows.observations is None:
            raise ValueError(
                f"observation_coef={self.observation_coef} learns what was answered: pass rows with observations"
            )
        return GivenNormalizers(of_policy, aggregation_normalizer(rows.observations, mode=OBSERVATION_AGGREGATION))

    def scores(self, model: Transformer, params: Params, texts: Any) -> TokenScores:
        """Log-probs and entropies of the tokens, `[P, G, Tc]`."""
        return Scorer(model, self.temperature)(params, texts)

    def loss(self, scores: TokenScores, rows: LearnerBatch, normalizer: GivenNormalizers) -> tuple[jax.Array, Metrics]:
        """The rows' part of the loss, and its metrics."""
        loss, metrics = self.algorithm.loss(scores, rows, normalizer.policy)
        if not self.observation_coef:
            return loss, metrics
        assert rows.observations is not None and normalizer.observations is not None  # `normalizer` has seen to it
        answered, own = echo_loss(
            scores.logprobs,
            rows.observations,
            coef=self.observation_coef,
            aggregation=OBSERVATION_AGGREGATION,
            normalizer=normalizer.observations,
        )
        return loss + answered, metrics | own
