"""Distillation: a student learns the next-token distributions of a teacher, on given or on its own text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.losses.kl import categorical_kl
from jaxrl_llm.masking import as_float, check_mask, check_same_shape, fill_masked, fill_unusable
from jaxrl_llm.records import Mean, Metrics

CHUNK_LOGITS = 2**24
"""Logits of each model in one chunk when `chunk_size` is not given: 64 MiB in float32."""


def generalized_jsd(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Array:
    """The generalized Jensen–Shannon divergence between a teacher's and a student's next-token distributions.

        β KL(teacher ‖ M) + (1 − β) KL(student ‖ M)        M = β teacher + (1 − β) student
        KL(teacher ‖ student)                              if β = 0, "forward"
        KL(student ‖ teacher)                              if β = 1, "reverse"

    The ends are set apart: the formula itself goes to 0 with β or 1 − β. Unlike `kl_exact`, which it equals there,
    it is bounded in between, also where one of the two deems a token impossible.

    Args:
        logits: Logits of the student, `[..., T, V]`.
        teacher_logits: The same of the teacher; a constant.
        beta: Weight of the teacher, in [0, 1]; a plain number.
        temperature: Divides the logits of both.
        chunk_size: Positions (along T) worked on at a time, so that intermediate float32 arrays exist of these
            alone, in the forward and in the backward pass. None: as many as `CHUNK_LOGITS` allows.

    Returns:
        `[..., T]`, float32, in nats; not masked.

    Raises:
        ValueError: On unequal shapes, a beta outside [0, 1] or a temperature that is not positive.

    Source: Agarwal et al. 2023, "GKD" (2306.13649).
    """
    check_same_shape(logits=logits, teacher_logits=teacher_logits)
    _check(beta, temperature)

    def divergence(student: Array, teacher: Array) -> Array:
        return _jsd_of_logits(student, teacher, beta, temperature)

    teacher_logits = jax.lax.stop_gradient(jnp.asarray(teacher_logits))
    vocabulary = teacher_logits.shape[-1]
    arrays = jnp.asarray(logits), teacher_logits
    return over_positions(divergence, arrays, _chunk(arrays[0], vocabulary, chunk_size))


def generalized_jsd_from_hidden(
    hidden: Array,
    head: Array,
    teacher_hidden: Array,
    teacher_head: Array,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Array:
    """The divergence of `generalized_jsd` from hidden states: the logits of one chunk exist at a time.

        generalized_jsd(hidden · headᵀ, teacher_hidden · teacher_headᵀ)

    Differentiable in `hidden` and `head`. Unlike `generalized_jsd`, it never holds an array `[..., T, V]`; the two
    models may have states of different widths, but one vocabulary.

    Args:
        hidden: Last hidden states of the student, `[..., T, D]`.
        head: Output weights of the student, `[V, D]`.
        teacher_hidden: Those of the teacher, `[..., T, D′]`; a constant.
        teacher_head: `[V, D′]`; a constant.
        beta: As `generalized_jsd`.
        temperature: As `generalized_jsd`.
        chunk_size: As `generalized_jsd`.

    Returns:
        `[..., T]`, float32, in nats; not masked.

    Raises:
        ValueError: On shapes that do not fit, and as `generalized_jsd`.

    Source: Agarwal et al. 2023, "GKD" (2306.13649).
    """
    shapes = (hidden.shape, head.shape, teacher_hidden.shape, teacher_head.shape)
    fit = hidden.shape[:-1] == teacher_hidden.shape[:-1] and head.shape[0] == teacher_head.shape[0]
    if not fit or hidden.shape[-1] != head.shape[-1] or teacher_hidden.shape[-1] != teacher_head.shape[-1]:
        raise ValueError(
            "hidden {}, head {}, teacher_hidden {} and teacher_head {} do not fit: pass [..., T, D], [V, D], "
            "[..., T, D'] and [V, D']".format(*shapes)
        )
    _check(beta, temperature)
    teacher_hidden, teacher_head = jax.lax.stop_gradient((teacher_hidden, teacher_head))
    wide_head = as_float(head)  # so that the parts of its gradient are summed in float32

    def divergence(state: Array, teacher_state: Array) -> Array:
        narrow = wide_head.astype(head.dtype)
        (state, usable), (teacher_state, teacher_usable) = fill_unusable(state), fill_unusable(teacher_state)
        student = jnp.einsum("...d,vd->...v", state, narrow, preferred_element_type=jnp.float32)
        teacher = jnp.einsum("...d,vd->...v", teacher_state, teacher_head, preferred_element_type=jnp.float32)
        return jnp.where(usable & teacher_usable, _jsd_of_logits(student, teacher, beta, temperature), jnp.nan)

    return over_positions(divergence, (hidden, teacher_hidden), _chunk(hidden, head.shape[0], chunk_size))


def gkd_loss(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    mask: ArrayLike,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    aggregation: AggregationMode = "token-mean",
    normalizer: ArrayLike | None = None,
    max_length: float | None = None,
    segment_ids: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    count_empty: bool = False,
    chunk_size: int | None = None,
) -> tuple[Array, Metrics]:
    """Generalized knowledge distillation: the student's distributions are drawn to the teacher's, token by token.

        Agg[ generalized_jsd(student, teacher) ]

    On the teacher's text it is supervised distillation, on the student's own samples (in the paper a share of the
    batches) on-policy distillation. Unlike `on_policy_distillation_advantages`, it needs the logits of the whole
    vocabulary, and its gradient has no sampling noise. With hidden states at hand, aggregate
    `generalized_jsd_from_hidden` instead.

    Args:
        logits: Logits of the student, `[..., T, V]`; nothing else is differentiated.
        teacher_logits: The same of the teacher.
        mask: Bool `[..., T]`, True on the tokens of the completions; whatever is elsewhere is ignored.
        beta: 0: KL(teacher ‖ student), 1: KL(student ‖ teacher), between: see `generalized_jsd`.
        temperature: Divides the logits of both. No factor temperature² makes up for it.
        aggregation: See `jaxrl_llm.losses.aggregate`, also for the arguments that follow.
        normalizer: Denominator of the whole batch, if these rows are a part of it.
        max_length: Constant of the aggregation "seq-mean-token-sum-norm".
        segment_ids: Integers `[..., T]` where rows hold several packed sequences.
        group_ids: Labels `[...]` of the rows, for the group modes.
        count_empty: Whether sequences without a valid token count.
        chunk_size: As `generalized_jsd`.

    Returns:
        The loss, a float32 scalar, and the metric `jsd`, the mean divergence per token.

    Raises:
        ValueError: On shapes that do not fit, a mask that is not bool, and as `generalized_jsd`.

    Source: Agarwal et al. 2023, "GKD" (2306.13649).
    """
    logits, teacher_logits, mask = jnp.asarray(logits), jnp.asarray(teacher_logits), check_mask(mask)
    check_same_shape(logits=logits, teacher_logits=teacher_logits)
    if logits.shape[:-1] != mask.shape:
        raise ValueError(
            f"logits has shape {logits.shape}, but mask has shape {mask.shape}: pass [..., T, V] with [..., T]"
        )
    visible = mask[..., None]
    divergence = generalized_jsd(
        jnp.where(visible, logits, 0),
        jnp.where(visible, teacher_logits, 0),
        beta=beta,
        temperature=temperature,
        chunk_size=chunk_size,
    )
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
    return loss, {"jsd": Mean.of(jax.lax.stop_gradient(divergence), mask)}


def on_policy_distillation_advantages(old_logprobs: ArrayLike, teacher_logprobs: ArrayLike, mask: ArrayLike) -> Array:
    """The advantage of a sampled token by how much likelier the teacher finds it than the student that sampled it.

        A = teacher_logprobs − old_logprobs        and 0 at masked positions

    With the loss of any policy gradient (`ppo_loss`, an importance-weighted one) it descends the reverse KL to the
    teacher. Each token answers for itself alone: nothing that comes later is credited to it (discount 0). Unlike
    `gkd_loss` it needs log-probabilities of sampled tokens only.

    Args:
        old_logprobs: Log-probabilities of the sampled tokens under the policy that sampled them, `[..., T]`.
        teacher_logprobs: The same under the teacher.
        mask: Bool `[..., T]`, True on the tokens of the completions.

    Returns:
        `[..., T]`, float32; a constant.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Lu & Thinking Machines Lab 2025, "On-Policy Distillation".
    """
    mask = check_mask(mask, old_logprobs=old_logprobs, teacher_logprobs=teacher_logprobs)
    return jax.lax.stop_gradient(fill_masked(teacher_logprobs, mask) - fill_masked(old_logprobs, mask))


def _jsd_of_logits(student: Array, teacher: Array, beta: float, temperature: float) -> Array:
    """`generalized_jsd` of logits `[..., V]`, in one piece."""
    (student, usable), (teacher, teacher_usable) = fill_unusable(as_float(student)), fill_unusable(as_float(teacher))
    student, teacher = jax.nn.log_softmax(student / temperature), jax.nn.log_softmax(teacher / temperature)
    return jnp.where(usable & teacher_usable, _jsd_of_logprobs(student, teacher, beta), jnp.nan)


def _jsd_of_logprobs(student: Array, teacher: Array, beta: float) -> Array:
    if beta == 0:
        return categorical_kl(teacher, student)
    if beta == 1:
        return categorical_kl(student, teacher)
    possible = ~(jnp.isneginf(teacher) & jnp.isneginf(student))  # logaddexp(−∞, −∞) has no derivative
    parts = jnp.where(possible, teacher, 0.0) + math.log(beta), jnp.where(possible, student, 0.0) + math.log1p(-beta)
    mixture = jnp.logaddexp(*parts)
    return beta * categorical_kl(teacher, mixture) + (1 - beta) * categorical_kl(student, mixture)


def _chunk(states: Array, vocabulary: int, chunk_size: int | None) -> int:
    """Positions of `[..., T, _]` that are worked on at a time."""
    if chunk_size is None:
        rows = max(1, states.size // max(1, states.shape[-1] * states.shape[-2]))
        return max(1, CHUNK_LOGITS // (rows * vocabulary))
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 position, got {chunk_size}")
    return chunk_size


def over_positions(function: Callable[..., Any], arrays: tuple[Array, ...], chunk_size: int) -> Any:
    """Maps `[..., T, _]` arrays to a tree of `[..., T]`, some positions at a time, computed anew for the gradient.

    Args:
        function: of the arrays, or of what lies at one position of them, `[..., _]`, which it maps to `[...]`.
        arrays: with the same `[..., T]`.
        chunk_size: positions at a time.
    """
    length = arrays[0].shape[-2]
    if chunk_size >= length or arrays[0].size == 0:
        return function(*arrays)
    # Time and not rows: those are what is spread over devices.
    time_first = tuple(jnp.moveaxis(x, -2, 0) for x in arrays)
    one = jax.checkpoint(lambda xs: function(*xs))
    mapped = jax.lax.map(one, time_first, batch_size=chunk_size)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), mapped)


def _check(beta: float, temperature: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}: it is the teacher's weight, in [0, 1]")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
