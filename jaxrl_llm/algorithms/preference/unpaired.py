"""Preference optimisation of single completions that are labelled good or bad: KTO and BCO."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.algorithms.offline import BatchObjective, Objective
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.checks import check_fields, not_negative, one_of, positive
from jaxrl_llm.losses.bco import RewardShift, ShiftAverage, bco_loss
from jaxrl_llm.losses.kto import KTOVariant, kto_balance, kto_kl, kto_kl_of_other_side, kto_loss
from jaxrl_llm.losses.sequence_logprobs import implicit_reward, sequence_logprobs
from jaxrl_llm.masking import count_true
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Mean, Metrics

KTOBaseline = Literal["mismatched", "other_side"]


class UnpairedBatch(NamedTuple):
    """P prompts with a labelled completion each at 0 and, where KTO is to use it, another prompt's at 1."""

    prompt: Any
    """`[P, Tp]` int32, right-padded."""
    prompt_lengths: Any
    """`[P]` int32."""
    completion: Any
    """`[P, 1 or 2, Tc]` int32, right-padded, the end-of-sequence token included."""
    mask: Any
    """`[P, 1 or 2, Tc]` bool: the completions' tokens. A completion that has none counts for nothing."""
    labels: Any
    """`[P, 1 or 2]` bool: True if the completion is desirable; that of a mismatched one is not read."""
    ref_logprobs: Any = None
    """`[P, 1 or 2, Tc]` under the reference, if they were computed ahead."""
    baseline: Any = None
    """`[P, 1]`: what a reward is compared with. The objective fills it in."""
    layout: Any = None
    """Where the texts lie in rows of tokens, if these were laid out ahead (`jaxrl_llm.data.trees`); then prompts are
    not read."""


class UnpairedCounts(NamedTuple):
    """What all parts of a batch share."""

    samples: jax.Array
    """Number of valid samples."""
    sides: jax.Array
    """`[2]`: the numbers of desirable and of undesirable ones."""


TokenLogprobs = Callable[[UnpairedBatch], jax.Array]
"""From rows to the log-probs `[P, G, Tc]` of their tokens, constants."""


@dataclasses.dataclass(frozen=True)
class KTOObjective(Objective):
    """Kahneman–Tversky optimization; an `Objective` of `UnpairedBatch`.

    The baseline z₀ is of the whole batch, whatever micro-batches there are, and has no gradient. Metrics: see
    `kto_loss`; and `rewards/accuracies`, the share of samples that are on the right side of z₀.
    """

    variant: KTOVariant = "kto"
    """The paper's loss, APO-zero for single completions, or DPO with 0 for the absent side."""
    beta: float = 0.1
    """The larger, the sooner a gain saturates."""
    lambda_d: float = 1.0
    """Weight of desirable samples."""
    lambda_u: float = 1.0
    """Weight of undesirable samples."""
    per_side_mean: bool = False
    """Average each side by itself, then the two."""
    baseline: KTOBaseline = "mismatched"
    """z₀ of "kto": from completions of other prompts, or from the samples with the other label, which is cheaper."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            "objective",
            self,
            variant=one_of(self.variant, KTOVariant),
            beta=positive(self.beta),
            lambda_d=not_negative(self.lambda_d),
            lambda_u=not_negative(self.lambda_u),
            baseline=one_of(self.baseline, KTOBaseline),
        )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        return {} if self.variant == "kto" else {"baseline": "only objective.variant='kto' has a baseline"}

    @property
    def needs_reference(self) -> bool:
        """True."""
        return True

    @property
    def whole_groups(self) -> bool:
        """False: samples do not depend on each other."""
        return False

    @property
    def whole_batch(self) -> bool:
        """False."""
        return False

    def balanced(self, num_desirable: int, num_undesirable: int) -> KTOObjective:
        """The same with the weights of `kto_balance` for so many samples of each kind in the data set."""
        lambda_d, lambda_u = kto_balance(num_desirable, num_undesirable)
        return dataclasses.replace(self, lambda_d=lambda_d, lambda_u=lambda_u)

    def prepared(self, rows: UnpairedBatch, logprobs: TokenLogprobs) -> UnpairedBatch:
        """The samples alone, with z₀ of the whole batch.

        Raises:
            ValueError: there are no mismatched completions to take z₀ from.
        """
        own = _column(rows, 0)
        if self.variant != "kto":
            return own
        if self.baseline == "other_side":
            policy, reference, mask = _sums(own, logprobs(own))
            kl = kto_kl_of_other_side(policy, reference, own.labels, mask=mask)
        elif rows.mask.shape[1] == 2:
            policy, reference, mask = _sums(other := _column(rows, 1), logprobs(other))
            kl = kto_kl(policy, reference, mask=mask & jnp.any(own.mask, axis=-1))
        else:
            raise ValueError(
                f"mask has shape {rows.mask.shape}: KTO's baseline needs another prompt's completion at index 1, "
                "[P, 2, Tc]; or choose baseline='other_side'"
            )
        return own._replace(baseline=jnp.broadcast_to(kl, own.labels.shape))

    def normalizer(self, rows: UnpairedBatch) -> UnpairedCounts:
        """Numbers of valid samples."""
        return _counts(rows)

    def scores(self, model: Transformer, params: Params, texts: Any) -> jax.Array:
        """Log-probs of the completions' tokens."""
        return Scorer(model)(params, texts).logprobs

    def loss(self, scores: jax.Array, rows: UnpairedBatch, normalizer: UnpairedCounts) -> tuple[jax.Array, Metrics]:
        """The rows' part of the loss, and its metrics."""
        policy, reference, mask = _sums(rows, scores)
        value, metrics = kto_loss(
            policy,
            reference,
            rows.labels,
            rows.baseline,
            variant=self.variant,
            beta=self.beta,
            lambda_d=self.lambda_d,
            lambda_u=self.lambda_u,
            per_side_mean=self.per_side_mean,
            mask=mask,
            normalizer=normalizer.sides if self.per_side_mean else normalizer.samples,
        )
        baseline = 0.0 if rows.baseline is None else rows.baseline
        return value, metrics | _accuracy(policy - reference > baseline, rows.labels, mask)


@dataclasses.dataclass(frozen=True)
class BCOObjective(BatchObjective):
    """Binary classifier optimization; an `Objective` of `UnpairedBatch`, which needs no mismatched completions.

    δ is the mean reward of the whole batch before the step, where the paper has a running mean over all batches so
    far: a step keeps no state but the optimizer's. Metrics: see `bco_loss`; and `rewards/accuracies`.
    """

    beta: float = 0.1
    """Inverse temperature."""
    average: ShiftAverage = "samples"
    """δ is the mean over all samples, or the mean of both sides' means."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields("objective", self, beta=positive(self.beta), average=one_of(self.average, ShiftAverage))

    @property
    def needs_reference(self) -> bool:
        """True."""
        return True

    @property
    def whole_groups(self) -> bool:
        """False: samples do not depend on each other."""
        return False

    @property
    def whole_batch(self) -> bool:
        """False."""
        return False

    def prepared(self, rows: UnpairedBatch, logprobs: TokenLogprobs) -> UnpairedBatch:
        """The samples alone, with δ of the whole batch."""
        own = _column(rows, 0)
        policy, reference, mask = _sums(own, logprobs(own))
        rewards = implicit_reward(policy, reference, beta=self.beta)
        shift = RewardShift.empty().update(rewards, own.labels, mask=mask).value(self.average)
        return own._replace(baseline=jnp.broadcast_to(shift, own.labels.shape))

    def normalizer(self, rows: UnpairedBatch) -> UnpairedCounts:
        """Numbers of valid samples."""
        return _counts(rows)

    def scores(self, model: Transformer, params: Params, texts: Any) -> jax.Array:
        """Log-probs of the completions' tokens."""
        return Scorer(model)(params, texts).logprobs

    def loss(self, scores: jax.Array, rows: UnpairedBatch, normalizer: UnpairedCounts) -> tuple[jax.Array, Metrics]:
        """The rows' part of the loss, and its metrics."""
        policy, reference, mask = _sums(rows, scores)
        shift = jnp.zeros(()) if rows.baseline is None else rows.baseline
        value, metrics = bco_loss(
            policy,
            reference,
            rows.labels,
            beta=self.beta,
            reward_shift=shift,
            mask=mask,
            normalizer=normalizer.samples,
        )
        return value, metrics | _accuracy(self.beta * (policy - reference) > shift, rows.labels, mask)


def _column(rows: UnpairedBatch, index: int) -> UnpairedBatch:
    """The rows with one of their completions alone."""
    part, layout = slice(index, index + 1), rows.layout
    return rows._replace(
        completion=rows.completion[:, part],
        mask=rows.mask[:, part],
        labels=rows.labels[:, part],
        ref_logprobs=None if rows.ref_logprobs is None else rows.ref_logprobs[:, part],
        layout=None if layout is None else layout.replace(place=layout.place[:, :, part]),
    )


def _sums(rows: UnpairedBatch, logprobs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probs of completions under the policy and the reference, and which of them are no padding; `[P, G]` each.

    Raises:
        ValueError: the rows have no log-probs under a reference.
    """
    if rows.ref_logprobs is None:
        raise ValueError("this objective reads log-probs under a reference, and the rows have none")
    policy, reference = (sequence_logprobs(x, rows.mask) for x in (logprobs, rows.ref_logprobs))
    return policy, reference, jnp.any(rows.mask, axis=-1)


def _counts(rows: UnpairedBatch) -> UnpairedCounts:
    """Without the mismatched completions, if they are still there."""
    valid, labels = jnp.any(rows.mask[:, :1], axis=-1), rows.labels[:, :1]
    sides = jnp.stack([count_true(valid & labels), count_true(valid & ~labels)])
    return UnpairedCounts(count_true(valid), sides)


def _accuracy(is_above: jax.Array, labels: jax.Array, mask: jax.Array) -> Metrics:
    return {"rewards/accuracies": Mean.of(is_above == labels, mask)}
