"""Group-relative policy-gradient objectives (GRPO and its kin) as a frozen record of their parts."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, get_args

import jax

from jaxrl_llm.advantages.group import AdvantageBaseline, AdvantageScale, group_advantages
from jaxrl_llm.logprobs import TokenScores
from jaxrl_llm.losses.aggregate import AggregationMode, aggregation_normalizer
from jaxrl_llm.losses.kl import KLEstimator
from jaxrl_llm.losses.policy import grpo_loss
from jaxrl_llm.records import Mean, Metrics


class LearnerBatch(NamedTuple):
    """What the loss of some rows reads. Rows are prompts `[P]`, with G completions each."""

    prompt: jax.Array
    """`[P, Tp]`."""
    prompt_lengths: jax.Array
    """`[P]`."""
    completion: jax.Array
    """`[P, G, Tc]`."""
    mask: jax.Array
    """`[P, G, Tc]` bool: the tokens that are trained."""
    advantages: jax.Array
    """`[P, G]` float32."""
    sampler_logprobs: jax.Array
    """`[P, G, Tc]` as the sampler reported them: under the distribution that it drew from."""
    old_logprobs: jax.Array | None = None
    """`[P, G, Tc]` under the policy before this batch's first update; `None`: the policy itself."""
    ref_logprobs: jax.Array | None = None
    """`[P, G, Tc]` under the reference; `None` where no part reads them."""
    model_logprobs: jax.Array | None = None
    """`[P, G, Tc]` as the sampler reported them: under the model at temperature 1, without truncation."""


def _check(prefix: str, record: object, **conditions: tuple[bool, str]) -> None:
    """Raises ValueError for the first field whose condition does not hold."""
    for field, (holds, wanted) in conditions.items():
        if not holds:
            raise ValueError(f"{prefix}.{field}={getattr(record, field)!r} must {wanted}")


@dataclasses.dataclass(frozen=True)
class GroupAdvantage:
    """A = (R − baseline of the group) / (scale + ε); see `jaxrl_llm.advantages.group_advantages`."""

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
        _check(
            "algorithm.advantage",
            self,
            scale=(self.scale in get_args(AdvantageScale), f"be one of {get_args(AdvantageScale)}"),
            baseline=(self.baseline in get_args(AdvantageBaseline), f"be one of {get_args(AdvantageBaseline)}"),
            ddof=(self.ddof in (0, 1), "be 0 or 1"),
            eps=(0 <= self.eps < math.inf, "not be negative"),
        )

    def __call__(self, rewards: jax.Array) -> jax.Array:
        """Maps rewards `[P, G]` to advantages `[P, G]`."""
        return group_advantages(rewards, scale=self.scale, baseline=self.baseline, ddof=self.ddof, eps=self.eps)


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """Agg[ max(−A·r, −A·clip(r, 1 − clip_low, 1 + clip_high)) + kl_coef · KL(policy, reference) ].

    The published algorithms are settings of it: see `jaxrl_llm.algorithms.presets`.
    """

    advantage: GroupAdvantage = GroupAdvantage()
    """From the rewards of a group to its advantages."""
    clip_low: float | None = 0.2
    """Distance of the ratio's lower bound from 1; `None` for no bound."""
    clip_high: float | None = 0.2
    """Distance of the ratio's upper bound from 1; `None` for no bound."""
    dual_clip: float | None = None
    """Bound on the loss of tokens with a negative advantage, in units of −A."""
    ratio_cap: float | None = None
    """Cap on the unclipped ratio (two-sided clipping)."""
    kl_coef: float = 0.0
    """Weight of the KL term; at 0 no reference is computed nor kept in memory."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of the KL term; `k3` is GRPO's, `k3+` has the gradient of the true KL."""
    kl_clip: float | None = 10.0
    """Bound on a token's KL term."""
    aggregation: AggregationMode = "seq-mean-token-mean"
    """How token losses become one number."""
    max_length: int | None = None
    """Constant of `seq-mean-token-sum-norm`; `None`: the configured length of completions."""
    mask_truncated: bool = False
    """Leave completions that were cut at the length limit out of the loss (DAPO)."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        low, high, cap = self.clip_low, self.clip_high, self.ratio_cap
        _check(
            "algorithm",
            self,
            clip_low=(low is None or low >= 0, "be None, or a distance from 1 that is not negative"),
            clip_high=(high is None or high >= 0, "be None, or a distance from 1 that is not negative"),
            dual_clip=(self.dual_clip is None or self.dual_clip > 1, "be None, or above 1"),
            ratio_cap=(cap is None or (high is not None and cap > 1 + high), "be None, or above 1 + clip_high"),
            kl_coef=(0 <= self.kl_coef < math.inf, "not be negative"),
            kl_estimator=(self.kl_estimator in get_args(KLEstimator), f"be one of {get_args(KLEstimator)}"),
            kl_clip=(self.kl_clip is None or self.kl_clip > 0, "be None, or positive"),
            aggregation=(self.aggregation in get_args(AggregationMode), f"be one of {get_args(AggregationMode)}"),
            max_length=(self.max_length is None or self.max_length >= 1, "be None, or at least 1"),
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probs under a reference."""
        return self.kl_coef != 0

    @property
    def needs_whole_groups(self) -> bool:
        """Whether a group's completions must be in one micro-batch."""
        return self.aggregation.startswith("group")

    def normalizer(self, mask: jax.Array) -> jax.Array:
        """The denominator that all micro-batches of one optimizer step share."""
        return aggregation_normalizer(mask, mode=self.aggregation)

    def loss(self, scores: TokenScores, batch: LearnerBatch, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
        """The part of the loss that some rows contribute, and its metrics.

        Args:
            scores: log-probs and entropies under the policy being trained, `[P, G, Tc]`.
            batch: the rows.
            normalizer: denominator over all rows of the optimizer step.
        """
        loss, metrics = grpo_loss(
            scores.logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.mask,
            ref_logprobs=batch.ref_logprobs,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            ratio_cap=self.ratio_cap,
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            kl_clip=self.kl_clip,
            aggregation=self.aggregation,
            normalizer=normalizer,
            max_length=self.max_length or batch.mask.shape[-1],
        )
        return loss, metrics | {"entropy": Mean.of(jax.lax.stop_gradient(scores.entropy), batch.mask)}
