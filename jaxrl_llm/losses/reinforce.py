"""Policy gradients without an importance ratio: REINFORCE, GPG, threshold filtering and DRO."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._rows import check_not_negative, policy_rows, ratio_metrics
from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.losses.sequence import gspo_loss
from jaxrl_llm.masking import as_float, check_mask, check_same_shape, per_token
from jaxrl_llm.records import Metrics


def reinforce_loss(
    logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    aggregation: AggregationMode = "seq-mean-token-sum",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """The score-function estimator: the policy gradient as it stands.

        Agg[ −A logprobs ]        by default  mean over sequences of  −A Σₜ logprobsₜ

    With A = R − baseline it is the sequence form, also of ReMax (whose baseline is the reward of the greedy
    completion) and of RLOO (that of the other samples). With rewards to go as A, `[..., T]`, and the aggregation
    "token-mean" it is the token form. Dividing a sequence by its length would change the estimator. Unlike
    `ppo_loss` without a clip, it has no ratio, so that tokens of an older policy bias it; on tokens of the policy
    itself the two have the same gradient.

    Args:
        logprobs: Log-probabilities of the completions' tokens under the policy that sampled them, `[..., T]`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        weights: As `grpo_loss`.
        aggregation: As `grpo_loss`.
        normalizer: As `grpo_loss`.
        max_length: As `grpo_loss`.
        segment_ids: As `grpo_loss`.
        group_ids: As `grpo_loss`.
        count_empty: As `grpo_loss`.

    Returns:
        The loss, a float32 scalar, and no metrics, since there is no ratio.

    Raises:
        ValueError: As `grpo_loss`.

    Source: Williams 1992, "Simple statistical gradient-following algorithms"; ReMax: Li et al. 2023 (2310.10505).
    """
    rows = policy_rows(logprobs, None, advantages, mask, weights=weights, segment_ids=segment_ids)
    loss = aggregate(
        rows.weigh(-rows.advantages * rows.logprobs),
        rows.mask,
        mode=aggregation,
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )
    return loss, {}


def gpg_loss(
    logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Group policy gradient: one mean over all tokens of the plain policy gradient, without ratio, clip and KL.

        Σ −A logprobs / number of valid tokens

    Here A = α (R − mean of the group), where α makes up for the groups that teach nothing. Unlike
    `reinforce_loss`, which sums over a sequence and averages over sequences, it averages over tokens.

    Args:
        logprobs: As `reinforce_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        weights: As `grpo_loss`.
        normalizer: As `grpo_loss`.
        segment_ids: As `grpo_loss`; the loss is the same with and without.

    Returns:
        As `reinforce_loss`.

    Raises:
        ValueError: As `grpo_loss`.

    Source: Chu et al. 2025, "GPG: a simple and strong reinforcement learning baseline" (2504.02546).
    """
    return reinforce_loss(
        logprobs,
        advantages,
        mask,
        weights=weights,
        aggregation="token-mean",
        normalizer=normalizer,
        segment_ids=segment_ids,
    )


def threshold_grpo_loss(
    logprobs: ArrayLike,
    advantages: ArrayLike,
    keep: ArrayLike,
    mask: ArrayLike,
    *,
    clip: float | None = None,
    old_logprobs: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """The policy gradient of the samples that a threshold has kept, such as those better than their group's mean.

        mean over kept sequences of  −A Σₜ logprobsₜ
        mean over kept sequences of  max(−A s, −A clip(s, 1 − clip, 1 + clip))        with `clip`

    Here s = exp(Σₜ log r) is the ratio of the whole sequence, and A is centred by the mean of *all* samples of the
    group. Kept are, by one rule, those above the mean, by another the best share of each group. Unlike
    `reinforce_loss`, it learns from successes alone, and is biased as a policy gradient: near to rejection-sampling
    fine-tuning with the advantage as a weight.

    Args:
        logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        keep: Bool, the samples that are kept: `[...]`, or `[..., T]` (with `segment_ids`).
        mask: As `grpo_loss`.
        clip: Half-width of the clip range of the sequence's ratio. None: no ratio and no clip.
        old_logprobs: As `grpo_loss`; read with `clip` only.
        weights: As `grpo_loss`.
        normalizer: Number of kept sequences in the whole batch, if these rows are a part of it.
        segment_ids: As `grpo_loss`.

    Returns:
        The loss, 0 if nothing is kept, and metrics: with `clip`, as `gspo_loss`; without, none.

    Raises:
        ValueError: As `grpo_loss`, and if `keep` is not bool.

    Source: a reading of GRPO (Shao et al. 2024, 2402.03300) in secondary literature.
    """
    mask = check_mask(mask, logprobs=logprobs)
    keep = jnp.asarray(keep)
    if keep.dtype != bool:
        raise ValueError(f"keep must be bool, but has dtype {keep.dtype}: pass keep != 0")
    kept = mask & per_token(mask, packed=segment_ids is not None, keep=keep)
    if clip is None:
        return reinforce_loss(
            logprobs, advantages, kept, weights=weights, normalizer=normalizer, segment_ids=segment_ids
        )
    return gspo_loss(
        logprobs,
        old_logprobs,
        advantages,
        kept,
        clip_low=clip,
        clip_high=clip,
        length_normalize=False,
        weights=weights,
        normalizer=normalizer,
        segment_ids=segment_ids,
    )


def dro_surrogate(
    logprobs: ArrayLike, old_logprobs: ArrayLike | None, advantages: ArrayLike, *, beta: float = 1.0
) -> Array:
    """The per-token loss of DRO: the policy gradient with a quadratic penalty on the log-ratio.

        −(A logprobs − beta/2 (logprobs − old_logprobs)²)

    The gradient −(A − beta log r) ∇logprobs turns round where the token has moved by A / beta. Unlike
    `clipped_surrogate`, it pulls a token back that has gone too far, instead of letting go of it.

    Args:
        logprobs: As `clipped_surrogate`.
        old_logprobs: As `clipped_surrogate`.
        advantages: As `clipped_surrogate`.
        beta: Weight of the penalty.

    Returns:
        `[..., T]`; not masked.

    Raises:
        ValueError: On shapes that do not fit or a negative `beta`.

    Source: Richemond et al. 2024, "Offline regularised reinforcement learning" (2405.19107), token by token as in verl.
    """
    check_not_negative(beta=beta)
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    logprobs = as_float(logprobs)
    old = jax.lax.stop_gradient(logprobs if old_logprobs is None else as_float(old_logprobs))
    advantages = jax.lax.stop_gradient(as_float(per_token(logprobs, advantages=advantages)))
    return 0.5 * beta * (logprobs - old) ** 2 - advantages * logprobs


def dro_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    beta: float = 1.0,
    weights: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """The policy gradient with a quadratic penalty on each token's log-ratio, in place of a ratio and a clip.

        Σ −(A logprobs − beta/2 (logprobs − old_logprobs)²) / number of valid tokens

    Unlike `gpg_loss`, whose gradient never ends, a token comes to rest where it has moved by A / beta.

    Args:
        logprobs: As `grpo_loss`.
        old_logprobs: As `grpo_loss`.
        advantages: As `grpo_loss`.
        mask: As `grpo_loss`.
        beta: Weight of the penalty.
        weights: As `grpo_loss`; they multiply the penalty, too.
        normalizer: As `grpo_loss`.
        segment_ids: As `grpo_loss`; the loss is the same with and without.

    Returns:
        The loss, a float32 scalar, and the metrics of `grpo_loss` that are about the ratio.

    Raises:
        ValueError: As `grpo_loss`, and on a negative `beta`.

    Source: Richemond et al. 2024, "Offline regularised reinforcement learning" (2405.19107), token by token as in verl.
    """
    rows = policy_rows(logprobs, old_logprobs, advantages, mask, weights=weights, segment_ids=segment_ids)
    losses = rows.weigh(dro_surrogate(*rows.inputs, beta=beta))
    return aggregate(losses, rows.mask, mode="token-mean", normalizer=normalizer), ratio_metrics(rows)
