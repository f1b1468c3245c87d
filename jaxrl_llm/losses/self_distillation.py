"""Self-distillation: a policy learns to say without being told what it would say if it were told more."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.losses.distillation import generalized_jsd
from jaxrl_llm.masking import as_float, check_mask, check_same_shape
from jaxrl_llm.records import Mean, Metrics

_FULL = -1e-7
"""Logarithm of what the likeliest tokens have together, at most: so that what is left has a logarithm."""


def top_k_jsd(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    k: int,
    beta: float = 0.5,
    temperature: float = 1.0,
    tail: bool = True,
) -> Array:
    """The generalized Jensen–Shannon divergence over the student's k likeliest tokens, and one for all others.

        generalized_jsd((p₁, …, pₖ, 1 − Σ p), (q₁, …, qₖ, 1 − Σ q))        tail
        generalized_jsd(p / Σ p, q / Σ q)                                   else

    With the tail it is at most the divergence over the whole vocabulary. Unlike `generalized_jsd`, it can be had of a
    teacher that tells the log-probabilities of some tokens alone.

    Args:
        logits: Logits of the student, `[..., T, V]`.
        teacher_logits: The same of the teacher; a constant.
        k: Tokens, at most V.
        beta: As `generalized_jsd`.
        temperature: Divides the logits of both.
        tail: Whether there is one more for all others; else those that are left are renormalised.

    Returns:
        `[..., T]`, float32, in nats.

    Raises:
        ValueError: On unequal shapes, a k that there are not, and as `generalized_jsd`.

    Source: Hübotter et al. 2026, "Reinforcement Learning via Self-Distillation" (2601.20802).
    """
    check_same_shape(logits=logits, teacher_logits=teacher_logits)
    logits, teacher_logits = as_float(logits), jax.lax.stop_gradient(as_float(teacher_logits))
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k={k} of {logits.shape[-1]} tokens: pass 1 to all of them")
    own, index = jax.lax.top_k(logits / temperature, k)
    own = own - jax.nn.logsumexp(logits / temperature, axis=-1, keepdims=True)
    theirs = jnp.take_along_axis(jax.nn.log_softmax(teacher_logits / temperature), index, axis=-1)
    if tail and k < logits.shape[-1]:
        own, theirs = (jnp.concatenate([x, _rest(x)], axis=-1) for x in (own, theirs))
    return generalized_jsd(own, theirs, beta=beta)  # of log-probs, which it renormalises


def _rest(logprobs: Array) -> Array:
    """Logarithm of what is left, `[..., 1]`."""
    return jnp.log(-jnp.expm1(jnp.minimum(jax.nn.logsumexp(logprobs, axis=-1, keepdims=True), _FULL)))


def sdpo_loss(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    mask: ArrayLike,
    told: ArrayLike,
    *,
    beta: float = 0.5,
    top_k: int | None = None,
    tail: bool = True,
    temperature: float = 1.0,
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
) -> tuple[Array, Metrics]:
    """Self-distillation policy optimization: the policy's samples, drawn to what it would say if it were told more.

        Agg over told completions[ D(π(· | prompt, y<t), teacher(· | prompt with hints, y<t)) ]

    The teacher is the policy itself, or an average of it, which reads the same completion behind a prompt that holds
    feedback or a right answer. With beta = 1 and hints that are demonstrations it is SDFT (Shenfeld et al. 2026,
    2601.19897). Unlike `gkd_loss`, it leaves out completions of which the teacher is told nothing.

    Args:
        logits: Logits that predict the completions' tokens behind the prompt alone, `[..., T, V]`.
        teacher_logits: Those behind the prompt with hints; a constant.
        mask: Bool `[..., T]`, True on the tokens of the completions; whatever is elsewhere is ignored.
        told: Bool `[...]`: the completions of which the teacher is told something.
        beta: 0: KL(teacher ‖ policy), 1: KL(policy ‖ teacher), between: see `generalized_jsd`.
        top_k: See `top_k_jsd`; `None`: over the whole vocabulary.
        tail: See `top_k_jsd`.
        temperature: Divides the logits of both.
        aggregation: See `jaxrl_llm.losses.aggregate`, also for the arguments that follow.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        max_length: Constant of the aggregation "seq-mean-token-sum-norm".
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.
        group_ids: Labels `[...]` of the rows, for the group modes.
        count_empty: Whether sequences without a valid token count.

    Returns:
        The loss, a float32 scalar, 0 where nothing is told; and the metrics `jsd`, the mean divergence per token that
        counts, and `frac_told`.

    Raises:
        ValueError: On shapes that do not fit, a mask that is not bool, and as `generalized_jsd` and `top_k_jsd`.

    Source: Hübotter et al. 2026, "Reinforcement Learning via Self-Distillation" (2601.20802).
    """
    logits, teacher_logits, mask = jnp.asarray(logits), jnp.asarray(teacher_logits), check_mask(mask)
    told = jnp.asarray(told)
    check_same_shape(logits=logits, teacher_logits=teacher_logits)
    if logits.shape[:-1] != mask.shape or told.shape != mask.shape[:-1]:
        raise ValueError(
            f"logits has shape {logits.shape}, mask {mask.shape} and told {told.shape}: pass [..., T, V] with [..., T] "
            "and [...]"
        )
    mask = check_mask(mask & told[..., None])
    own, theirs = (jnp.where(mask[..., None], x, 0) for x in (logits, teacher_logits))
    if top_k is None:
        divergence = generalized_jsd(own, theirs, beta=beta, temperature=temperature)
    else:
        divergence = top_k_jsd(own, theirs, k=top_k, beta=beta, temperature=temperature, tail=tail)
    loss = aggregate(
        divergence,
        mask,
        mode=aggregation,
        normalizer=normalizer,
        max_length=max_length,
        segment_ids=segment_ids,
        group_ids=group_ids,
        count_empty=count_empty,
    )
    return loss, {"jsd": Mean.of(jax.lax.stop_gradient(divergence), mask), "frac_told": Mean.of(told)}
