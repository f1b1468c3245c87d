"""From log-probabilities of tokens to those of sequences, which the preference losses work on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._pairs import check_together
from jaxrl_llm.losses._rows import check_not_negative, check_positive
from jaxrl_llm.masking import as_float, check_mask, check_same_shape, fill_masked, masked_mean, safe_divide


def sequence_logprobs(
    logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    average: bool = False,
    ld_alpha: ArrayLike | None = None,
    shared_lengths: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> Array:
    """Log-probability of each completion, the sum over its tokens.

        Σₜ log π(yₜ | x, y_<ₜ)        or, with ld_alpha,  Σ_{t ≤ shared} log π(yₜ) + ld_alpha Σ_{t > shared} log π(yₜ)

    The mask leaves the prompt out and keeps the token that ends the sequence. Desensitized to length (LD-DPO), what
    the longer completion of a pair has beyond the length of the shorter one counts less.

    Unlike `sft_loss`, which averages over tokens, a long completion has a large sum, and the preference losses mean
    it so; those that want the mean per token take the lengths (the `sum` of the mask) as well.

    Args:
        logprobs: Log-probabilities of the tokens, `[..., T]`.
        mask: Bool `[..., T]`, True on the tokens of completions.
        average: Divide the sum by the number of the completion's tokens.
        ld_alpha: Weight, in [0, 1], of the tokens beyond `shared_lengths`. None: 1.
        shared_lengths: `[...]` (`[..., S]` with segments): the smaller number of tokens of the pair's two completions.
        segment_ids: Integers `[..., T]` where rows hold packed sequences: the sequence, 0 to S − 1, of each token. A
            token with another id counts nowhere.
        num_segments: S, with `segment_ids`.

    Returns:
        `[...]`, or `[..., S]` with segments; 0 for a sequence without tokens.

    Raises:
        ValueError: On shapes that do not fit, or one of two arguments that go together.

    Source: ld_alpha: Liu et al. 2024, "Length desensitization in DPO" (2409.06411).
    """
    mask = check_mask(mask, logprobs=logprobs, segment_ids=segment_ids)
    check_together(ld_alpha=ld_alpha, shared_lengths=shared_lengths)
    check_together(segment_ids=segment_ids, num_segments=num_segments)
    check_not_negative(ld_alpha=ld_alpha)
    # [..., T, S]: which tokens are whose, with S = 1 where a row is one sequence.
    member = mask[..., None]
    if segment_ids is not None and num_segments is not None:
        member &= jnp.asarray(segment_ids)[..., None] == jnp.arange(num_segments)
    values = fill_masked(logprobs, mask)[..., None]
    if ld_alpha is not None and shared_lengths is not None:
        shared = jnp.asarray(shared_lengths) if segment_ids is not None else jnp.asarray(shared_lengths)[..., None]
        if shared.shape != member.shape[:-2] + member.shape[-1:]:
            raise ValueError(
                f"shared_lengths has shape {np.shape(shared_lengths)}, but mask has shape {mask.shape}: "
                "pass one length for each sequence"
            )
        beyond = jnp.cumsum(member, axis=-2) > shared[..., None, :]
        values = jnp.where(beyond, ld_alpha * values, values)
    sums = jnp.sum(jnp.where(member, values, 0.0), axis=-2)
    sums = safe_divide(sums, jnp.sum(member, axis=-2)) if average else sums
    return sums if segment_ids is not None else sums[..., 0]


def implicit_reward(logprobs: ArrayLike, ref_logprobs: ArrayLike, *, beta: ArrayLike = 0.1) -> Array:
    """The reward for which a policy is optimal under a KL penalty to its reference.

        beta (log π(y | x) − log π_ref(y | x))        up to beta log Z(x), the same for all completions of a prompt

    What DPO learns: a preference-trained policy is a reward model, for tokens (of token log-probs) as for sequences.

    Unlike `kl_k1`, which is its log-ratio as a cost to be kept small, it is a score: for best-of-n, labelling, logging.

    Args:
        logprobs: Log-probabilities under the policy, any shape.
        ref_logprobs: The same under the reference; a constant.
        beta: Strength of the KL penalty.

    Returns:
        The shape of `logprobs`. Only differences between completions of one prompt have a meaning.

    Raises:
        ValueError: On unequal shapes.

    Source: Rafailov et al. 2023, "Direct preference optimization" (2305.18290).
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_positive(beta=beta)
    return (as_float(logprobs) - jax.lax.stop_gradient(as_float(ref_logprobs))) * beta


def wpo_weights(logprobs: ArrayLike, log_sum_squared_probs: ArrayLike, mask: ArrayLike) -> Array:
    """How likely the policy would be to write a completion itself: weights that make old pairs look on-policy.

        w(y) = exp( meanₜ [log π(yₜ) − log Σᵥ π(v)²] )        a pair's weight is w(chosen) w(rejected)

    The product goes into `weights` of any loss of pairs. The second term makes a token of typical probability weigh 1.

    Unlike an importance ratio, it knows nothing of the policy that wrote the completion.

    Args:
        logprobs: Log-probabilities of the tokens under the policy, `[..., T]`.
        log_sum_squared_probs: log Σᵥ π(v)² over the vocabulary at each position, `[..., T]`:
            `logsumexp(2 * log_softmax(logits), axis=-1)`.
        mask: Bool `[..., T]`, True on the tokens of the completion.

    Returns:
        `[...]`, a constant (no gradient); 1 for a completion without tokens.

    Raises:
        ValueError: On unequal shapes.

    Source: Zhou et al. 2024, "WPO" (2406.11827).
    """
    mask = check_mask(mask, logprobs=logprobs, log_sum_squared_probs=log_sum_squared_probs)
    aligned = fill_masked(logprobs, mask) - fill_masked(log_sum_squared_probs, mask)
    return jax.lax.stop_gradient(jnp.exp(masked_mean(aligned, mask, -1)))
