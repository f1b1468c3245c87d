"""Policy-gradient objectives (REINFORCE, PPO, GRPO and their kin) as a frozen record of their parts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages import overlong_penalty
from jaxrl_llm.algorithms.interfaces import Advantage, Algorithm, Need
from jaxrl_llm.algorithms.policy_gradient.estimators import GroupAdvantage
from jaxrl_llm.algorithms.policy_gradient.surrogates import Clipped, PolicyTokens, Reduction, Surrogate
from jaxrl_llm.algorithms.router import RouterLosses
from jaxrl_llm.checks import at_least, changes, check_fields, not_negative, one_of, positive
from jaxrl_llm.logprobs import TokenScores
from jaxrl_llm.losses import (
    AggregationMode,
    CorrectionLevel,
    KLEstimator,
    ValueLossKind,
    aggregation_normalizer,
    entropy_bonus,
    geometric_filter,
    icepop_weights,
    kl_loss,
    mis_weights,
    tis_weights,
    value_loss,
)
from jaxrl_llm.records import Mean, Metrics

CorrectionRule = Literal["tis", "mis", "icepop", "geometric"]
Routing = Literal["own", "compared", "replayed"]


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
    """`[P, G]` or `[P, G, Tc]` float32."""
    sampler_logprobs: jax.Array
    """`[P, G, Tc]` as the sampler reported them: under the distribution that it drew from."""
    seeds: jax.Array
    """`[P]` uint32: for losses that draw."""
    old_logprobs: jax.Array | None = None
    """`[P, G, Tc]` under the policy before this batch's first update; `None`: the policy itself."""
    ref_logprobs: jax.Array | None = None
    """`[P, G, Tc]` under the reference; `None` where no part reads them."""
    model_logprobs: jax.Array | None = None
    """`[P, G, Tc]` as the sampler reported them: under the model at temperature 1, without truncation."""
    values: jax.Array | None = None
    """`[P, G, Tc]` of the critic before this batch's first update."""
    returns: jax.Array | None = None
    """`[P, G, Tc]`: the critic's targets."""
    value_mask: jax.Array | None = None
    """`[P, G, Tc]` bool: where the critic is trained."""
    kept: jax.Array | None = None
    """`[P, G, Tc, k]` the tokens that each was drawn from, where scores are under the distribution over these; see
    `Rollout`."""
    observations: jax.Array | None = None
    """`[P, G, Tc]` bool: tokens that tools or an environment answered, for losses of given rows that learn them."""
    experts: jax.Array | None = None
    """`[P, G, Tc, L, k]`: the experts that computed each token in the sampler; see `Rollout`."""
    prompt_experts: jax.Array | None = None
    """`[P, Tp, L, k]`: the same of prompts."""
    numbers: jax.Array | None = None
    """`[P, G]`: which completions they are in the batch, where something is told of single ones."""
    layout: Any = None
    """Where the texts lie in rows of tokens, if these were laid out ahead (`jaxrl_llm.data.trees`); then prompts are
    not read."""

    def with_own_experts(self) -> LearnerBatch:
        """The rows of which nothing is known of the sampler's experts."""
        return self._replace(experts=None, prompt_experts=None)


@dataclasses.dataclass(frozen=True)
class Correction:
    """Weights for a sampler whose log-probs are not quite the learner's; see `jaxrl_llm.losses.correction`."""

    rule: CorrectionRule = "tis"
    """tis: truncate; mis: mask above w_max; icepop: mask tokens outside the bounds; geometric: drop sequences."""
    level: CorrectionLevel = "token"
    """tis and mis: whether tokens or sequences have weights."""
    w_min: float | None = None
    """Lower bound; `None`: the rule's own."""
    w_max: float | None = None
    """Upper bound; `None`: the rule's own."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            "algorithm.correction",
            self,
            rule=one_of(self.rule, CorrectionRule),
            level=one_of(self.level, CorrectionLevel),
            w_min=positive(self.w_min, optional=True),
            w_max=positive(self.w_max, optional=True),
        )
        if self.w_min is not None and self.w_max is not None and self.w_min >= self.w_max:
            raise ValueError(f"algorithm.correction.w_min={self.w_min} must be below w_max={self.w_max}")

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        return {} if self.rule in ("tis", "mis") else {"level": "only the rules tis and mis have levels"}

    def __call__(self, old_logprobs: jax.Array, sampler_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
        """Weights `[P, G, Tc]`."""
        bounds = {n: v for n, v in (("w_min", self.w_min), ("w_max", self.w_max)) if v is not None}
        arrays = (old_logprobs, sampler_logprobs, mask)
        match self.rule:
            case "tis":
                return tis_weights(*arrays, level=self.level, **bounds)
            case "mis":
                return mis_weights(*arrays, level=self.level, **bounds)
            case "icepop":
                return icepop_weights(*arrays, **bounds)
            case "geometric":
                return geometric_filter(*arrays, **bounds).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class OverlongPenalty:
    """DAPO's soft punishment of long completions; see `jaxrl_llm.advantages.overlong_penalty`."""

    cache: int
    """Tokens before the length limit over which the penalty rises from 0 to `scale`."""
    scale: float = 1.0
    """Penalty at the limit."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields("algorithm.overlong", self, cache=at_least(self.cache, 1), scale=not_negative(self.scale))


@dataclasses.dataclass(frozen=True)
class ValueObjective:
    """How a critic is trained; see `jaxrl_llm.losses.value_loss`."""

    coef: float = 0.1
    """Weight beside the policy's loss, where the two share a trunk; a critic of its own has its own optimizer."""
    clip: float | None = 0.2
    """How far a value may move from that before the batch's first update; `None`: as far as it likes."""
    kind: ValueLossKind = "half_mse"
    """Half the squared error, or all of it."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            "algorithm.value",
            self,
            coef=not_negative(self.coef),
            clip=positive(self.clip, optional=True),
            kind=one_of(self.kind, ValueLossKind),
        )


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Algorithm):
    """surrogate(advantage(rewards)) + kl_coef · KL(policy, reference) − entropy_coef · H, aggregated.

    The published algorithms are settings of it: see `jaxrl_llm.algorithms.policy_gradient.presets`.
    """

    advantage: Advantage = GroupAdvantage()
    """From rewards to advantages."""
    surrogate: Surrogate = Clipped()
    """From advantages and log-probs to the policy's loss."""
    kl_coef: float = 0.0
    """Weight of the KL term in the loss; at 0 it needs no reference."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of the KL term; `k3` is GRPO's, `k3+` has the gradient of the true KL."""
    kl_clip: float | None = 10.0
    """Bound on a token's KL term."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    aggregation: AggregationMode = "seq-mean-token-mean"
    """How token losses become one number."""
    max_length: int | None = None
    """Constant of `seq-mean-token-sum-norm`; `None`: the configured length of completions."""
    mask_truncated: bool = False
    """Leave completions that were cut at the length limit out of the loss (DAPO)."""
    overlong: OverlongPenalty | None = None
    """Lower the reward of completions that come near the length limit (DAPO)."""
    correction: Correction | None = None
    """Weigh tokens by how much likelier the learner finds them than the sampler did."""
    keep_sampling_mask: bool = False
    """Score tokens by the distribution that they were drawn from, renormalised over what sampling.top_k, and after it
    top_p and min_p, had left when they were drawn: log-probs, old and new, of policy and reference, entropies and KL
    (DeepSeek-V3.2's "keep sampling mask"). Otherwise they are scored at the sampling temperature over all tokens."""
    routing: Routing = "own"
    """Which experts compute a token in the learner, where the model has some: those that its own router chooses, or
    those that computed it in the sampler (`replayed`, "R3", Ma et al. 2025), log-probs old and new, of policy and
    reference; their shares are the learner's own, with their gradient. `compared`: its own, and as with `replayed` the
    metric `sampling/routing_mismatch` says for how many tokens and layers both would choose other sets."""
    router: RouterLosses | None = None
    """Balance the load of experts and keep the router's logits small, and tell metrics of it."""
    value: ValueObjective = ValueObjective()
    """How the critic is trained, where the advantage has one."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        allowed = self.surrogate.aggregations
        check_fields(
            "algorithm",
            self,
            kl_coef=not_negative(self.kl_coef),
            kl_estimator=one_of(self.kl_estimator, KLEstimator),
            kl_clip=positive(self.kl_clip, optional=True),
            entropy_coef=not_negative(self.entropy_coef),
            aggregation=one_of(self.aggregation, AggregationMode),
            max_length=at_least(self.max_length, 1, optional=True),
            routing=one_of(self.routing, Routing),
        )
        if not self.needs_critic:
            for path, value in changes(self.value, ValueObjective(), "algorithm.value"):
                raise ValueError(f"{path}={value!r} would have no effect: {self.reader} has no critic; PPO has one")
        if self.overlong is not None and self.advantage.needs & {"by_function", "verdicts"}:
            raise ValueError(
                f"algorithm.overlong={self.overlong} would have no effect: {self.reader} does not read the reward that "
                "it lowers; leave it out"
            )
        if self.overlong is not None and "reference_rewards" in self.advantage.needs:
            raise ValueError(
                f"algorithm.overlong={self.overlong} would lower the rewards of the policy's samples and not those of "
                f"the reference's, with which {self.reader} compares them; leave it out"
            )
        if allowed is not None and self.aggregation not in allowed:
            raise ValueError(
                f"algorithm.aggregation={self.aggregation!r} must be {' or '.join(map(repr, allowed))}: the surrogate "
                f"{type(self.surrogate).__name__} has no other"
            )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        idle = {}
        if not self.kl_coef:
            idle |= dict.fromkeys(("kl_estimator", "kl_clip"), "the loss has no KL; set algorithm.kl_coef above 0, too")
        if self.aggregation != "seq-mean-token-sum-norm":
            idle["max_length"] = "only algorithm.aggregation='seq-mean-token-sum-norm' divides by it"
        return idle

    @property
    def reader(self) -> str:
        """The estimator's name."""
        return type(self.advantage).__name__

    @property
    def smallest_group(self) -> int:
        """That of the estimator."""
        return self.advantage.smallest_group

    @property
    def needs(self) -> frozenset[Need]:
        """What estimator and losses read that costs something."""
        of_loss: frozenset[Need] = frozenset({"reference"} if self.loss_needs_reference else ())
        return self.advantage.needs | of_loss

    @property
    def loss_needs_reference(self) -> bool:
        """Whether surrogate or KL term read log-probs under the reference."""
        return bool(self.kl_coef) or self.surrogate.needs_reference

    @property
    def needs_whole_groups(self) -> bool:
        """Whether the aggregation looks at groups."""
        return self.aggregation.startswith("group")

    @property
    def skips_unscored(self) -> bool:
        """Whether the estimator leaves them out."""
        return self.advantage.skips_unscored

    @property
    def keeps_mask(self) -> bool:
        """As set."""
        return self.keep_sampling_mask

    @property
    def keeps_experts(self) -> bool:
        """Whether they are replayed or compared."""
        return self.routing != "own"

    @property
    def watches_router(self) -> bool:
        """Whether the policy's loss, or a metric beside it, reads what routers did."""
        return self.keeps_experts or self.router is not None

    def start(self) -> Any:
        """The estimator's memory."""
        return self.advantage.start()

    def check_width(self, width: int) -> None:
        """Raises if completions of at most so many tokens are all punished for their length."""
        if self.overlong is not None and self.overlong.cache >= width:
            raise ValueError(
                f"algorithm.overlong.cache={self.overlong.cache} must be less than the longest completion, {width}"
            )

    def shape(self, rewards: jax.Array, lengths: jax.Array, width: int) -> jax.Array:
        """Rewards less the penalty for length; `lengths` are those of their completions, of a shape that broadcasts."""
        if self.overlong is None:
            return rewards
        self.check_width(width)
        return rewards + overlong_penalty(
            lengths, max_length=width, cache=self.overlong.cache, scale=self.overlong.scale
        )

    def normalizer(self, mask: jax.Array) -> jax.Array:
        """The denominator that all micro-batches of one optimizer step share."""
        return aggregation_normalizer(mask, mode=self.aggregation)

    def loss(self, scores: TokenScores, batch: LearnerBatch, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
        """The part of the policy's loss that some rows contribute, and its metrics.

        Args:
            scores: log-probs and entropies under the policy being trained, `[P, G, Tc]`.
            batch: the rows.
            normalizer: denominator over all rows of the optimizer step.
        """
        reduction = Reduction(self.aggregation, normalizer, self.max_length or batch.mask.shape[-1])
        weights, metrics = None, {}
        if self.correction is not None:
            old = jax.lax.stop_gradient(scores.logprobs) if batch.old_logprobs is None else batch.old_logprobs
            weights = self.correction(old, batch.sampler_logprobs, batch.mask)
            metrics["correction/weight_mean"] = Mean.of(weights, batch.mask)
        tokens = PolicyTokens(
            scores.logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.mask,
            weights,
            jax.random.key(batch.seeds[0]),
            batch.ref_logprobs,
        )
        loss, own = self.surrogate(tokens, reduction)
        metrics |= own
        if self.kl_coef:
            assert batch.ref_logprobs is not None  # it says that it needs them
            kl, own = kl_loss(
                scores.logprobs,
                batch.ref_logprobs,
                batch.mask,
                kl_coef=self.kl_coef,
                kl_estimator=self.kl_estimator,
                kl_clip=self.kl_clip,
                old_logprobs=batch.old_logprobs,
                **reduction.arguments,
            )
            loss, metrics = loss + kl, metrics | own
        if self.entropy_coef:
            bonus, own = entropy_bonus(
                scores.entropy, batch.mask, entropy_coef=self.entropy_coef, **reduction.arguments
            )
            return loss + bonus, metrics | own
        return loss, metrics | {"entropy": Mean.of(jax.lax.stop_gradient(scores.entropy), batch.mask)}

    def value_loss(self, values: jax.Array, batch: LearnerBatch, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
        """The part of the critic's loss that some rows contribute, without its weight, and its metrics.

        Args:
            values: of the critic being trained, `[P, G, Tc]`.
            batch: the rows.
            normalizer: number of tokens of all rows of the optimizer step.
        """
        assert batch.returns is not None and batch.value_mask is not None  # advantages of a critic bring them
        return value_loss(
            values,
            batch.values,
            batch.returns,
            batch.value_mask,
            clip=self.value.clip,
            kind=self.value.kind,
            normalizer=normalizer,
        )
