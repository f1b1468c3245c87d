"""Log-probabilities and entropies of tokens, from logits or, in chunks, from hidden states.

From hidden states no `[tokens, vocabulary]` array ever exists: the logits of one slice of the vocabulary are
made at a time, in the forward pass and again in the backward pass. Slices of the vocabulary, rather than of
time, because each slice of the head's gradient is then written once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK_LOGITS = 2**21
"""Logits in one chunk when `chunk_size` is not given: 8 MiB in float32, about what a cache holds."""

MIN_CHUNK = 512
"""Vocabulary entries in one chunk, at least, when `chunk_size` is not given: narrower products are slow."""


class TokenScores(NamedTuple):
    """Scores of the given tokens, both float32 `[..., T]`."""

    logprobs: jax.Array
    """log π(token), in nats."""
    entropy: jax.Array
    """H(π) of the distribution that the token was drawn from, in nats."""


def scores_from_logits(logits: jax.Array, tokens: jax.Array, *, temperature: float = 1.0) -> TokenScores:
    """Log p(x) = z_x/τ − logΣ exp(z/τ) and H = logΣ exp(z/τ) − Σ p·z/τ.

    Args:
        logits: `[..., T, V]`; entry t scores `tokens[..., t]` (already aligned). −∞ marks an impossible token.
        tokens: `[..., T]` int.
        temperature: τ > 0, the one that the tokens were sampled with.

    Returns:
        `TokenScores` `[..., T]` in float32.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {logits.shape} must have the shape of tokens {tokens.shape} plus a vocabulary axis")
    scaled = logits.astype(jnp.float32) / temperature
    normalizer = jax.nn.logsumexp(scaled, axis=-1)
    chosen = jnp.take_along_axis(scaled, tokens[..., None], axis=-1)[..., 0]
    probabilities = jnp.exp(scaled - normalizer[..., None])
    mean = jnp.sum(probabilities * jnp.where(jnp.isneginf(scaled), 0.0, scaled), axis=-1)
    return TokenScores(chosen - normalizer, normalizer - mean)


def token_scores(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
) -> TokenScores:
    """Scores of `tokens` from the hidden states that predict them, in chunks along the vocabulary.

    z = head·hidden (soft-capped: c·tanh(z/c)), then as `scores_from_logits`. Differentiable in `hidden`
    and `head` through both outputs. Products are taken in the type of `hidden`, the rest in float32.

    Args:
        hidden: `[..., T, D]`; state t predicts `tokens[..., t]`.
        head: `[V, D]`.
        tokens: `[..., T]` int in [0, V).
        temperature: τ > 0.
        logit_softcap: c, or `None`.
        chunk_size: vocabulary entries per chunk; `None` chooses by `CHUNK_LOGITS` and `MIN_CHUNK`.

    Returns:
        `TokenScores` `[..., T]`.

    Raises:
        ValueError: shapes do not fit, or the temperature or the chunk size is not positive.
    """
    if hidden.shape[:-1] != tokens.shape or head.ndim != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(f"hidden {hidden.shape}, head {head.shape} [V, D] and tokens {tokens.shape} do not fit")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy scores are those at 1.0")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 vocabulary entry, got {chunk_size}")
    vocabulary = head.shape[0]
    size = min(vocabulary, chunk_size or max(MIN_CHUNK, CHUNK_LOGITS // max(1, tokens.size)))
    slices = _Slices(vocabulary, -(-vocabulary // size), head.dtype, float(temperature), logit_softcap)
    return _scores(slices, hidden, head, tokens)


class _Slices(NamedTuple):
    """How the vocabulary is cut: slice j holds the entries j, j + count, j + 2·count and so on.

    Strided slices keep a vocabulary that is sharded over devices sharded within each slice.
    """

    vocabulary: int
    count: int
    head_dtype: jnp.dtype
    temperature: float
    softcap: float | None

    @property
    def size(self) -> int:
        return -(-self.vocabulary // self.count)

    def split(self, head: jax.Array) -> jax.Array:
        """`[V, D]` → `[count, size, D]`, zeros where the last slices are short."""
        head = jnp.pad(head, ((0, self.size * self.count - self.vocabulary), (0, 0)))
        return jnp.moveaxis(head.reshape(self.size, self.count, -1), 1, 0)

    def join(self, slices: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        return jnp.moveaxis(slices, 0, 1).reshape(self.size * self.count, -1)[: self.vocabulary]

    def entries(self, index: jax.Array) -> jax.Array:
        """Vocabulary entries of one slice, `[size]`; those ≥ V do not exist."""
        return jnp.arange(self.size) * self.count + index

    def bend(self, raw: jax.Array) -> jax.Array:
        """Soft cap and temperature."""
        if self.softcap is None:
            return raw / self.temperature
        return jnp.tanh(raw / self.softcap) * (self.softcap / self.temperature)

    def logits(self, hidden: jax.Array, weight: jax.Array, index: jax.Array) -> jax.Array:
        """Logits of one slice `[..., size]`; a finite, vanishing value where an entry does not exist."""
        raw = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
        bent = self.bend(raw)
        if self.size * self.count == self.vocabulary:
            return bent
        return jnp.where(self.entries(index) < self.vocabulary, bent, -1e30)

    def slope(self, logits: jax.Array) -> jax.Array | float:
        """Derivative of `bend` in terms of its value."""
        if self.softcap is None:
            return 1.0 / self.temperature
        bent = jnp.clip(logits * (self.temperature / self.softcap), -1.0, 1.0)  # finite where no entry exists
        return (1.0 - jnp.square(bent)) / self.temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(slices: _Slices, hidden: jax.Array, head: jax.Array, tokens: jax.Array) -> TokenScores:
    return _forward(slices, hidden, head, tokens)[0]


def _forward(
    slices: _Slices, hidden: jax.Array, head: jax.Array, tokens: jax.Array
) -> tuple[TokenScores, tuple[jax.Array, ...]]:
    head = head.astype(hidden.dtype)

    def accumulate(carry: tuple[jax.Array, ...], chunk: tuple[jax.Array, jax.Array]) -> tuple:
        peak, total, moment, chosen = carry  # max z, Σ exp(z − max), Σ exp(z − max)·(z − max), z of the token
        weight, index = chunk
        logits = slices.logits(hidden, weight, index)
        is_token = slices.entries(index) == tokens[..., None]
        chosen += jnp.sum(jnp.where(is_token, logits, 0.0), axis=-1)
        higher = jnp.maximum(peak, jnp.max(logits, axis=-1))
        shifted = logits - higher[..., None]
        weights = jnp.exp(shifted)
        fade, drop = jnp.exp(peak - higher), peak - higher
        moment = fade * (moment + drop * total) + jnp.sum(weights * shifted, axis=-1)
        return (higher, fade * total + jnp.sum(weights, axis=-1), moment, chosen), None

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    chunks = (slices.split(head), jnp.arange(slices.count))
    (peak, total, moment, chosen), _ = jax.lax.scan(accumulate, (zeros - 1e30, zeros, zeros, zeros), chunks)
    log_total = jnp.log(total)
    scores = TokenScores(chosen - peak - log_total, log_total - moment / total)
    return scores, (hidden, head, tokens, peak + log_total, scores.entropy)


def _backward(slices: _Slices, saved: tuple[jax.Array, ...], cotangent: TokenScores) -> tuple:
    hidden, head, tokens, normalizer, entropy = saved
    to_logprob, to_entropy = (x[..., None] for x in cotangent)

    def one(to_hidden: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weight, index = chunk
        logits = slices.logits(hidden, weight, index)
        logprobs = logits - normalizer[..., None]
        # ∂log p(x)/∂z = 1[x] − p and ∂H/∂z = −p·(log p + H)
        pull = to_logprob + to_entropy * (logprobs + entropy[..., None])
        is_token = slices.entries(index) == tokens[..., None]
        gradient = jnp.where(is_token, to_logprob, 0.0) - jnp.exp(logprobs) * pull
        gradient = (gradient * slices.slope(logits)).astype(hidden.dtype)
        to_hidden += jnp.einsum("...v,vd->...d", gradient, weight, preferred_element_type=jnp.float32)
        return to_hidden, _outer_product(hidden, gradient).T

    start = jnp.zeros(hidden.shape, jnp.float32)
    to_hidden, to_head = jax.lax.scan(one, start, (slices.split(head), jnp.arange(slices.count)))
    return to_hidden.astype(hidden.dtype), slices.join(to_head).astype(slices.head_dtype), None


def _outer_product(hidden: jax.Array, gradient: jax.Array) -> jax.Array:
    """Sums hidden ⊗ gradient over tokens, `[D, size]`, in float32.

    Of the two operands XLA's CPU product transposes the left one: better the narrow, ready-made states. It has no
    such product of bfloat16 operands at all (jaxlib 0.10: "Unsupported element type for DotThunk"), so that there
    they are widened first.
    """

    def product(hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        return jnp.einsum("...d,...v->dv", hidden, gradient, preferred_element_type=jnp.float32)

    def widened(hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        return product(hidden.astype(jnp.float32), gradient.astype(jnp.float32))

    return jax.lax.platform_dependent(hidden, gradient, cpu=widened, default=product)


_scores.defvjp(_forward, _backward)
