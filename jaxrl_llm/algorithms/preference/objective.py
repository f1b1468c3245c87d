"""Preference optimisation of pairs: DPO and its relatives as one objective, which differ in their loss alone."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.algorithms.offline import Objective
from jaxrl_llm.algorithms.preference.pair_losses import DPO
from jaxrl_llm.algorithms.preference.scored_pairs import PairCounts, PairLoss, ScoredPairs
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.checks import check_fields, not_negative, share
from jaxrl_llm.losses.sequence_logprobs import sequence_logprobs, wpo_weights
from jaxrl_llm.losses.supervised import sft_loss
from jaxrl_llm.masking import count_true
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Metrics


class PreferenceBatch(NamedTuple):
    """P prompts, each with a chosen completion at 0 and a rejected one at 1."""

    prompt: Any
    """`[P, Tp]` int32, right-padded."""
    prompt_lengths: Any
    """`[P]` int32."""
    completion: Any
    """`[P, 2, Tc]` int32, right-padded, the end-of-sequence token included."""
    mask: Any
    """`[P, 2, Tc]` bool: the completions' tokens. A pair with a side that has none counts for nothing."""
    ref_logprobs: Any = None
    """`[P, 2, Tc]` under the reference, if they were computed ahead."""
    win_probs: Any = None
    """`[P, 2]`: how often each completion wins against the policy's own, if a judge said so (SPPO)."""
    layout: Any = None
    """Where the texts lie in rows of tokens, if these were laid out ahead (`jaxrl_llm.data.trees`); then prompts are
    not read."""


class PairScores(NamedTuple):
    """What a loss of pairs reads of a forward pass."""

    logprobs: jax.Array
    """`[P, 2, Tc]`."""
    sharp: jax.Array | None
    """`[P, 2, Tc]`, constants: at temperature ½, for WPO."""


@dataclasses.dataclass(frozen=True)
class PreferenceObjective(Objective):
    """Learns which of two completions is the better one; an `Objective` of `PreferenceBatch`.

    Metrics, means over valid pairs: `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`,
    `logps/chosen`, `logps/rejected` of whole completions, and `nll`, the mean over the tokens of chosen ones.
    """

    pair_loss: PairLoss = DPO()
    """The loss and its hyper-parameters."""
    nll_coef: float = 0.0
    """Weight of the likelihood of the chosen completions, per token, beside the loss (`rpo_alpha` elsewhere)."""
    ld_alpha: float | None = None
    """Weight of the tokens that the longer completion of a pair has beyond the shorter one's length (LD-DPO)."""
    weighted: bool = False
    """Weight pairs by how likely the policy would write them itself (WPO). It takes another product with the head."""

    def __post_init__(self) -> None:
        """Rejects coefficients that make no sense."""
        check_fields(
            "objective",
            self,
            nll_coef=not_negative(self.nll_coef),
            ld_alpha=(True, "") if self.ld_alpha is None else share(self.ld_alpha),
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probs under a reference."""
        return self.pair_loss.needs_reference

    @property
    def whole_groups(self) -> bool:
        """True: both completions of a pair are compared."""
        return True

    @property
    def whole_batch(self) -> bool:
        """Whether the loss compares pairs."""
        return self.pair_loss.whole_batch

    def normalizer(self, rows: PreferenceBatch) -> PairCounts:
        """Numbers of valid pairs and of the tokens of their chosen completions."""
        valid, mask = _valid(rows)
        return PairCounts(count_true(valid), count_true(mask[:, 0]))

    def scores(self, model: Transformer, params: Params, texts: Any) -> PairScores:
        """Log-probs of the completions' tokens, and what WPO weights pairs by."""
        sharp = None
        if self.weighted:
            sharp = Scorer(model, temperature=0.5)(jax.lax.stop_gradient(params), texts).logprobs
        return PairScores(Scorer(model)(params, texts).logprobs, sharp)

    def loss(self, scores: PairScores, rows: PreferenceBatch, normalizer: PairCounts) -> tuple[jax.Array, Metrics]:
        """The rows' part of the loss, and its metrics."""
        (valid, mask), logprobs = _valid(rows), scores.logprobs
        reference = rows.ref_logprobs if self.needs_reference else None
        pairs = ScoredPairs(
            logprobs=self._sums(logprobs, mask),
            ref_logprobs=None if reference is None else self._sums(reference, mask),
            lengths=jnp.sum(mask, axis=-1, dtype=jnp.int32),
            mask=valid,
            weights=None if scores.sharp is None else _on_policy_weights(logprobs, scores.sharp, mask),
            win_probs=rows.win_probs,
            counts=normalizer,
        )
        value, metrics = self.pair_loss(pairs)
        nll, likelihood = sft_loss(logprobs[:, 0], mask[:, 0], normalizer=normalizer.chosen_tokens)
        return value + self.nll_coef * nll if self.nll_coef else value, metrics | likelihood

    def _sums(self, logprobs: jax.Array, mask: jax.Array) -> jax.Array:
        """Log-probs of completions, `[P, 2]`."""
        if self.ld_alpha is None:
            return sequence_logprobs(logprobs, mask)
        shared = jnp.min(jnp.sum(mask, axis=-1), axis=1, keepdims=True)
        shared = jnp.broadcast_to(shared, mask.shape[:2])
        return sequence_logprobs(logprobs, mask, ld_alpha=self.ld_alpha, shared_lengths=shared)


def _valid(rows: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
    """The pairs that have both sides, `[P]`, and the tokens of those pairs, `[P, 2, Tc]`.

    Raises:
        ValueError: the rows are no pairs.
    """
    if rows.mask.shape[1] != 2:
        raise ValueError(f"mask has shape {rows.mask.shape}: a preference pair is 2 completions, [P, 2, Tc]")
    valid = jnp.all(jnp.any(rows.mask, axis=-1), axis=-1)
    return valid, rows.mask & valid[:, None, None]


def _on_policy_weights(logprobs: jax.Array, sharp: jax.Array, mask: jax.Array) -> jax.Array:
    """WPO's weights of pairs, `[P]`.

    log Σ π² = logsumexp(2 z) − 2 logsumexp(z) = 2 log π(y) − log π_½(y) of any token y, where π_½ is π at temperature
    ½: no logits need be held.
    """
    weights = wpo_weights(logprobs, 2 * logprobs - sharp, mask)
    return weights[:, 0] * weights[:, 1]
