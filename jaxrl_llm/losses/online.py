"""Preference learning from the policy's own samples, judged as it learns: online DPO, XPO, Nash-MD.

Online DPO (OAIF, Guo et al. 2024, 2402.04792) is no loss of its own: sample two completions of each prompt, judge them,
and give `dpo_loss` (or `ipo_loss`) what `label_pairs` picks:

    pairs = label_pairs(rewards)  # [P, G], as the sequence log-probs
    loss, metrics = dpo_loss(*pairs.select(logprobs), *pairs.select(ref_logprobs), mask=pairs.mask)
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._pairs import mean_over
from jaxrl_llm.losses._rows import check_not_negative
from jaxrl_llm.losses.aggregate import aggregate
from jaxrl_llm.losses.dpo import dpo_loss
from jaxrl_llm.masking import (
    as_float,
    check_choice,
    check_mask,
    check_same_shape,
    count_true,
    fill_masked,
    mask_or_all,
    per_token,
    segment_first,
    segment_total,
)
from jaxrl_llm.records import Mean, Metrics

NashKLLevel = Literal["token", "sequence"]


class PairLabels(NamedTuple):
    """Which two samples of each group form a pair."""

    chosen: Array
    """int32 `[...]`, the index of the best sample along the last axis."""
    rejected: Array
    """int32 `[...]`, the index of the worst."""
    mask: Array
    """bool `[...]`, False where a group has fewer than two valid samples."""

    def select(self, x: ArrayLike) -> tuple[Array, Array]:
        """The elements of `x`, `[..., G]`, that belong to the chosen and to the rejected samples, `[...]` each."""
        chosen, rejected = (
            jnp.take_along_axis(jnp.asarray(x), index[..., None], axis=-1)[..., 0]
            for index in (self.chosen, self.rejected)
        )
        return chosen, rejected


def label_pairs(rewards: ArrayLike, *, mask: ArrayLike | None = None) -> PairLabels:
    """Picks the best and the worst of each group of samples as a preference pair.

        chosen = the first argmax,  rejected = the last argmin

    so that of two equal samples the first is the chosen one, and that the two are never the same.

    Unlike `group_advantages`, it uses the order of the rewards alone.

    Args:
        rewards: `[..., G]`, a group along the last axis; G = 2 for online DPO.
        mask: Bool `[..., G]`, False for samples that could not be judged. None: all count.

    Returns:
        `PairLabels`, `[...]` each.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Guo et al. 2024, "Direct language model alignment from online AI feedback" (2402.04792); ties as in TRL.
    """
    mask = mask_or_all(mask, rewards=rewards)
    chosen = jnp.argmax(fill_masked(rewards, mask, -jnp.inf), axis=-1)
    rejected = mask.shape[-1] - 1 - jnp.argmin(fill_masked(rewards, mask, jnp.inf)[..., ::-1], axis=-1)
    return PairLabels(chosen, rejected, count_true(mask, -1) >= 2)


def xpo_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    ref_chosen_logprobs: ArrayLike,
    ref_rejected_logprobs: ArrayLike,
    ref_sample_logprobs: ArrayLike,
    *,
    alpha: ArrayLike = 1e-5,
    beta: ArrayLike = 0.1,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Exploratory preference optimization: online DPO with a bonus for leaving what the reference writes.

        mean over pairs of  −log σ(beta h) + alpha · log π(y_ref)

    One completion of each pair is the policy's sample and the other, y_ref, the reference's; either may be chosen.

    Unlike `dpo_loss`, it makes the policy forget the reference's samples, an optimism that keeps it exploring.

    Args:
        chosen_logprobs: As `dpo_loss`.
        rejected_logprobs: As `dpo_loss`.
        ref_chosen_logprobs: As `dpo_loss`.
        ref_rejected_logprobs: As `dpo_loss`.
        ref_sample_logprobs: Log-probabilities *under the policy* of the samples of the reference, `[...]`.
        alpha: Weight of the bonus.
        beta: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`, and the metric `logps/ref_sample`.

    Raises:
        ValueError: As `dpo_loss`.

    Source: Xie et al. 2024, "Exploratory preference optimization" (2405.21046).
    """
    check_not_negative(alpha=alpha)
    check_same_shape(chosen_logprobs=chosen_logprobs, ref_sample_logprobs=ref_sample_logprobs)
    args = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    loss, metrics = dpo_loss(*args, beta=beta, mask=mask, normalizer=normalizer)
    valid = mask_or_all(mask, ref_sample_logprobs=ref_sample_logprobs)
    bonus = mean_over(as_float(ref_sample_logprobs), valid, normalizer=normalizer)
    metrics["logps/ref_sample"] = Mean.of(jax.lax.stop_gradient(as_float(ref_sample_logprobs)), valid)
    return loss + alpha * bonus, metrics


def nash_md_loss(
    logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    win_probs: ArrayLike,
    mask: ArrayLike,
    *,
    kl_coef: ArrayLike = 0.1,
    kl_level: NashKLLevel = "token",
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Nash mirror descent: policy gradient on the probability of beating a mixture of policy and reference.

        mean over sequences of  −(P − ½) Σₜ log π(yₜ) + kl_coef · K
        token:     K = Σₜ sg(dₜ) log π(yₜ)        dₜ = log π(yₜ) − log π_ref(yₜ)
        sequence:  K = Σₜ sg(dₜ) · Σₜ log π(yₜ)

    y is a sample of the policy, P the judged probability that it beats a sample of `nash_md_mixture_logprobs`. K is a
    score-function estimator: its value says nothing, its expected gradient is that of the KL from the reference;
    "sequence" is the full one, "token" (TRL's) drops a token's influence on the KL of those after it.

    Unlike `xpo_loss`, the judge compares with a regularized opponent, to reach a Nash equilibrium; no pair is trained.

    Args:
        logprobs: Log-probabilities of the completions' tokens under the policy, `[..., T]`.
        ref_logprobs: The same under the reference, `[..., T]`; constants.
        win_probs: P in [0, 1], `[...]` (with `segment_ids`, `[..., T]`); constants.
        mask: Bool `[..., T]`, True on the tokens of completions.
        kl_coef: Weight of the KL, the paper's τ and TRL's `beta`.
        kl_level: Which K.
        normalizer: Number of sequences of the whole batch, if these rows are a part of it. None: the number here.
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.

    Returns:
        The loss, a float32 scalar, and the metrics `kl`, the mean of d over tokens, and `win_prob`, that
        of P over sequences.

    Raises:
        ValueError: On unequal shapes, a mask that is not bool, or an unknown level.

    Source: Munos et al. 2023, "Nash learning from human feedback" (2312.00886).
    """
    check_choice("kl_level", kl_level, NashKLLevel)
    check_not_negative(kl_coef=kl_coef)
    mask = check_mask(mask, logprobs=logprobs, ref_logprobs=ref_logprobs, segment_ids=segment_ids)
    policy = fill_masked(logprobs, mask)
    win_probs = per_token(mask, packed=segment_ids is not None, win_probs=win_probs)
    win_probs = jax.lax.stop_gradient(fill_masked(win_probs, mask))
    d = jax.lax.stop_gradient(policy - fill_masked(ref_logprobs, mask))
    d_of_term = d if kl_level == "token" else segment_total(d, mask, segment_ids)
    losses = (0.5 - win_probs + kl_coef * d_of_term) * policy
    loss = aggregate(losses, mask, mode="seq-mean-token-sum", normalizer=normalizer, segment_ids=segment_ids)
    return loss, {"kl": Mean.of(d, mask), "win_prob": Mean.of(win_probs, segment_first(mask, segment_ids))}


def nash_md_mixture_logprobs(logits: ArrayLike, ref_logits: ArrayLike, *, mixture_coef: ArrayLike = 0.5) -> Array:
    """The opponent of Nash-MD: the geometric mixture of policy and reference, token by token.

        log softmax(mixture_coef · z_ref + (1 − mixture_coef) · z)

    Unlike the mixture of sequence distributions that the theory asks for, it can be sampled from.

    Args:
        logits: Those of the policy, z, `[..., V]`.
        ref_logits: Those of the reference, `[..., V]`.
        mixture_coef: 0 is the policy (self-play), 1 the reference.

    Returns:
        Log-probabilities `[..., V]`.

    Raises:
        ValueError: On unequal shapes.

    Source: Munos et al. 2023, "Nash learning from human feedback" (2312.00886).
    """
    check_same_shape(logits=logits, ref_logits=ref_logits)
    return jax.nn.log_softmax(mixture_coef * as_float(ref_logits) + (1 - mixture_coef) * as_float(logits))
