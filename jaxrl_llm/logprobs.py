"""Log-probabilities and entropies of tokens, from logits or, in chunks, from hidden states.

From hidden states no large `[tokens, vocabulary]` array ever exists: the logits of one slice of the vocabulary are
made at a time, in the forward pass and, but for what a fixed amount of memory holds, again in the backward pass.
Slices of the vocabulary, rather than of time, because each slice of the head's gradient is then written once.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.masking import fill_unusable
from jaxrl_llm.sharding import dealt_again, gathered

CHUNK_LOGITS = 2**21
"""Logits in one chunk when `chunk_size` is not given: 8 MiB in float32, about what a cache holds."""

MIN_CHUNK = 512
"""Vocabulary entries in one chunk, at least, when `chunk_size` is not given: narrower products are slow."""

KEPT_LOGITS = 2**26
"""Logits that the forward pass keeps for the backward pass when `chunk_size` is not given: 256 MiB in float32. The
others are computed again, which takes a fourth product of their size beside the three of a gradient."""

MAX_BLOCKS = 64
"""Parts of the vocabulary that each chunk holds some entries of, where the vocabulary divides by so many: it may be
sharded over as many devices, a power of two."""


_AXES = ("vocab", "embed")

IMPOSSIBLE = -1e30
"""Logit of a token that is never drawn: finite, so that no difference of two of them is NaN."""


class TokenScores(NamedTuple):
    """Scores of the given tokens, both float32 `[..., T]`."""

    logprobs: jax.Array
    """log π(token), in nats."""
    entropy: jax.Array
    """H(π) of the distribution that the token was drawn from, in nats."""


def scores_from_logits(logits: jax.Array, tokens: jax.Array, *, temperature: float = 1.0) -> TokenScores:
    """The log-probability of each token and the entropy of the distribution that it is drawn from, from logits.

        log p(x) = z_x / τ − log Σᵥ exp(zᵥ / τ)
        H = log Σᵥ exp(zᵥ / τ) − Σᵥ pᵥ zᵥ / τ

    τ is the temperature. A token whose logits hold a NaN, +∞ or nothing but −∞ has scores of NaN and passes no gradient
    on: a loss that masks it is as if it were not there. Unlike `token_scores`, it needs the logits of all tokens at
    once.

    Args:
        logits: `[..., T, V]`; entry t scores `tokens[..., t]` (already aligned). −∞ marks an impossible token.
        tokens: `[..., T]` int.
        temperature: τ > 0, the one that the tokens were sampled with.

    Returns:
        `TokenScores` `[..., T]` in float32.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {logits.shape} must have the shape of tokens {tokens.shape} plus a vocabulary axis")
    logits, usable = fill_unusable(logits.astype(jnp.float32))
    scaled = logits / temperature
    normalizer = jax.nn.logsumexp(scaled, axis=-1)
    chosen = jnp.take_along_axis(scaled, tokens[..., None], axis=-1)[..., 0]
    probabilities = jnp.exp(scaled - normalizer[..., None])
    mean = jnp.sum(probabilities * jnp.where(jnp.isneginf(scaled), 0.0, scaled), axis=-1)
    scores = TokenScores(chosen - normalizer, normalizer - mean)
    return jax.tree.map(lambda score: jnp.where(usable, score, jnp.nan), scores)


def token_scores(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    known_tokens: int | None = None,
    kept: jax.Array | None = None,
    chunk_size: int | None = None,
) -> TokenScores:
    """Log-probabilities and entropies from the hidden states that predict the tokens, in chunks of the vocabulary.

        scores_from_logits(z)        z = head · hidden,  or  logit_softcap · tanh(head · hidden / logit_softcap)

    With `kept`, of the distribution over these tokens alone: `scores_of_kept`.

    Differentiable in `hidden` and `head` through both outputs; a token that a loss masks has no part in a gradient,
    whatever its state holds. Products are taken in the type of `hidden`, the rest in float32. Unlike
    `scores_from_logits`, it never holds the logits of many tokens over the whole vocabulary.

    Args:
        hidden: `[..., T, D]`; state t predicts `tokens[..., t]`.
        head: `[V, D]`.
        tokens: `[..., T]` int in [0, V).
        temperature: τ > 0.
        logit_softcap: bound on the logits, or `None`.
        known_tokens: ids from here on are impossible, as if their logits were −∞; `None`: none is.
        kept: `[..., T, k]` int: the tokens that each was drawn from, every one once; negative ones are none. `None`:
            the whole vocabulary.
        chunk_size: vocabulary entries per chunk, at most. `None` chooses by `CHUNK_LOGITS` and `MIN_CHUNK`, and keeps
            `KEPT_LOGITS` for the backward pass.

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
    blocks, rows = _blocks(vocabulary, size)
    held = 0 if chunk_size is not None else KEPT_LOGITS // max(1, tokens.size * blocks * rows)
    slices = _Slices(vocabulary, blocks, rows, held, head.dtype, float(temperature), logit_softcap, known_tokens)
    if kept is None:
        return _scores(slices, hidden, head, tokens)
    if kept.shape[:-1] != tokens.shape:
        raise ValueError(f"kept {kept.shape} must have the shape of tokens {tokens.shape} plus an axis")
    return scores_of_kept(_logits_of(slices, hidden, head, kept), tokens, kept)


def scores_of_kept(logits: jax.Array, tokens: jax.Array, kept: jax.Array) -> TokenScores:
    """Scores under the distribution over the tokens that truncation left, renormalised.

        log p(x) = z_x − log Σᵥ exp(zᵥ)        v over the kept tokens
        H = log Σᵥ exp(zᵥ) − Σᵥ pᵥ zᵥ

    Unlike `scores_from_logits`, it reads the logits of these tokens alone. A token that is not among them scores about
    −10³⁰. Where a logit is NaN, scores are NaN and pass no gradient on.

    Args:
        logits: `[..., T, k]` of the kept tokens, tempered.
        tokens: `[..., T]` int.
        kept: `[..., T, k]` int, as of `token_scores`.

    Returns:
        `TokenScores` `[..., T]` in float32.

    Source: DeepSeek-AI 2025, "DeepSeek-V3.2" (2512.02556), "keep sampling mask".
    """
    logits, usable = fill_unusable(jnp.where(kept >= 0, logits, IMPOSSIBLE))
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    is_token = kept == tokens[..., None]
    chosen = jnp.sum(jnp.where(is_token, logits, 0.0), axis=-1)
    chosen = jnp.where(jnp.any(is_token, axis=-1), chosen, IMPOSSIBLE)
    mean = jnp.sum(jnp.exp(logits - normalizer[..., None]) * logits, axis=-1)
    scores = TokenScores(chosen - normalizer, normalizer - mean)
    return jax.tree.map(lambda score: jnp.where(usable, score, jnp.nan), scores)


def _blocks(vocabulary: int, size: int) -> tuple[int, int]:
    """Number of blocks, and rows of each in one slice of `size` entries at most.

    Blocks and slices are multiples of eight rows where they can be: a TPU stores rows in eights.
    """
    most = min(max(1, size // 8), MAX_BLOCKS)
    blocks = math.gcd(vocabulary // 8 if vocabulary % 8 == 0 else vocabulary, 1 << (most.bit_length() - 1))
    rows = size // blocks
    return blocks, rows - (rows % 8 if rows > 8 else 0)


class _Slices(NamedTuple):
    """How the vocabulary is cut: into `blocks` equal blocks, and slice j holds `rows` entries of each of them.

    A vocabulary that is sharded over a power of two of devices then is sharded within each slice, and a slice is cut
    out of the head, and its gradient written, where it lies. Nothing is copied to make blocks or slices.
    """

    vocabulary: int
    blocks: int
    rows: int
    kept: int
    """Slices whose logits the backward pass finds in memory."""
    head_dtype: jnp.dtype
    temperature: float
    softcap: float | None
    known: int | None
    """Entries from here on are impossible."""

    @property
    def block_size(self) -> int:
        return self.vocabulary // self.blocks

    @property
    def count(self) -> int:
        return -(-self.block_size // self.rows)

    @property
    def even(self) -> bool:
        """Whether no slice overlaps the one before it."""
        return self.block_size % self.rows == 0

    @property
    def kept_indices(self) -> jax.Array:
        return jnp.arange(min(self.kept, self.count))

    @property
    def other_indices(self) -> jax.Array:
        return jnp.arange(min(self.kept, self.count), self.count)

    def start(self, index: jax.Array) -> jax.Array:
        """First row of slice j in each block; the last slice overlaps the one before it if it would be short."""
        return jnp.minimum(index * self.rows, self.block_size - self.rows)

    def bits(self, head: jax.Array) -> jax.Array:
        """`[V, D]` as `[blocks, V / blocks, D]`; half precision as integers.

        Of a bfloat16 array XLA's CPU cannot copy a part without a float32 copy of the whole.
        """
        blocks = head.reshape(self.blocks, self.block_size, -1)
        return jax.lax.bitcast_convert_type(blocks, jnp.uint16) if head.dtype.itemsize == 2 else blocks

    def head(self, bits: jax.Array) -> jax.Array:
        """The inverse of `bits`; `[size, D]` of a slice."""
        return jax.lax.bitcast_convert_type(bits, self.head_dtype).reshape(-1, bits.shape[-1])

    def cut(self, bits: jax.Array, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Weights of one slice in some type, `[size, D]`."""
        part = self.head(jax.lax.dynamic_slice_in_dim(bits, self.start(index), self.rows, axis=1))
        return gathered(part.astype(dtype), *_AXES)

    def paste(self, bits: jax.Array, weight: jax.Array, index: jax.Array) -> jax.Array:
        """The bits of a head with one slice overwritten."""
        weight = dealt_again(weight, *_AXES).astype(self.head_dtype)
        part = self._replace(vocabulary=len(weight)).bits(weight)
        return jax.lax.dynamic_update_slice_in_dim(bits, part, self.start(index), axis=1)

    def entries(self, index: jax.Array) -> jax.Array:
        """Vocabulary entries of one slice, `[size]`."""
        rows = self.start(index) + jnp.arange(self.rows)
        return (jnp.arange(self.blocks)[:, None] * self.block_size + rows).reshape(-1)

    def fresh(self, index: jax.Array) -> jax.Array:
        """Marks the entries of one slice, `[size]`, that no slice before it held."""
        rows = self.start(index) + jnp.arange(self.rows)
        return jnp.tile(rows >= index * self.rows, self.blocks)

    def find(self, entries: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where in one slice entries lie, and whether they are there at all; negative ones are not."""
        block, row = jnp.divmod(entries, self.block_size)
        row = row - self.start(index)
        inside = (entries >= 0) & (row >= 0) & (row < self.rows)
        return jnp.where(inside, block * self.rows + row, 0), inside

    def logits(self, hidden: jax.Array, bits: jax.Array, index: jax.Array) -> jax.Array:
        """Logits of one slice `[..., size]`, soft-capped and divided by the temperature."""
        weight = self.cut(bits, index, hidden.dtype)
        raw = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
        if self.softcap is None:
            logits = raw / self.temperature
        else:
            logits = jnp.tanh(raw / self.softcap) * (self.softcap / self.temperature)
        return logits if self.known is None else jnp.where(self.entries(index) < self.known, logits, IMPOSSIBLE)

    def slope(self, logits: jax.Array) -> jax.Array | float:
        """Derivative of soft cap and temperature in terms of their value."""
        if self.softcap is None:
            return 1.0 / self.temperature
        bounded = jnp.maximum(logits * (self.temperature / self.softcap), -1.0)  # of impossible tokens it is 0
        return (1.0 - jnp.square(bounded)) / self.temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(slices: _Slices, hidden: jax.Array, head: jax.Array, tokens: jax.Array) -> TokenScores:
    return _forward(slices._replace(kept=0), hidden, head, tokens)[0]


def _forward(
    slices: _Slices, hidden: jax.Array, head: jax.Array, tokens: jax.Array
) -> tuple[TokenScores, tuple[jax.Array, ...]]:
    bits = slices.bits(head)

    def accumulate(carry: tuple[jax.Array, ...], index: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        peak, total, moment, chosen = carry  # max z, Σ exp(z − max), Σ exp(z − max)·(z − max), z of the token
        every = slices.logits(hidden, bits, index)
        logits = every if slices.even else jnp.where(slices.fresh(index), every, -1e30)
        is_token = slices.entries(index) == tokens[..., None]
        chosen = jnp.maximum(chosen, jnp.max(jnp.where(is_token, logits, -1e30), axis=-1))
        higher = jnp.maximum(peak, jnp.max(logits, axis=-1))
        shifted = logits - higher[..., None]
        weights = jnp.exp(shifted)
        fade, drop = jnp.exp(peak - higher), peak - higher
        moment = fade * (moment + drop * total) + jnp.sum(weights * shifted, axis=-1)
        return (higher, fade * total + jnp.sum(weights, axis=-1), moment, chosen), every

    def accumulate_only(carry: tuple[jax.Array, ...], index: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        return accumulate(carry, index)[0], None

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    carry = (zeros - 1e30, zeros, zeros, zeros - 1e30)
    carry, kept = jax.lax.scan(accumulate, carry, slices.kept_indices)
    (peak, total, moment, chosen), _ = jax.lax.scan(accumulate_only, carry, slices.other_indices)
    log_total = jnp.log(total)
    scores = TokenScores(chosen - peak - log_total, log_total - moment / total)
    return scores, (hidden, head, tokens, peak + log_total, scores.entropy, kept)


def _backward(slices: _Slices, saved: tuple[jax.Array, ...], cotangent: TokenScores) -> tuple:
    hidden, head, tokens, normalizer, entropy, kept = saved
    to_logprob, to_entropy = (x[..., None] for x in cotangent)
    # What no loss reads may be NaN, and 0 times it would be.
    is_read = (to_logprob != 0) | (to_entropy != 0)
    states = jnp.where(is_read, hidden, 0)
    bits = slices.bits(head)

    def pull(carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array]) -> tuple:
        (to_hidden, to_head), (index, logits) = carry, chunk
        logprobs = logits - normalizer[..., None]
        # ∂log p(x)/∂z = 1[x] − p and ∂H/∂z = −p·(log p + H)
        slope = to_logprob + to_entropy * (logprobs + entropy[..., None])
        is_token = slices.entries(index) == tokens[..., None]
        gradient = jnp.where(is_token, to_logprob, 0.0) - jnp.exp(logprobs) * slope
        gradient = jnp.where(is_read, gradient * slices.slope(logits), 0.0).astype(hidden.dtype)
        weight = slices.cut(bits, index, hidden.dtype)
        if not slices.even:  # what overlaps counts once; below, it is written twice, the same
            weight = jnp.where(slices.fresh(index)[:, None], weight, 0)
        to_hidden += jnp.einsum("...v,vd->...d", gradient, weight, preferred_element_type=jnp.float32)
        return (to_hidden, slices.paste(to_head, outer_product(states, gradient).T, index)), None

    def recompute_and_pull(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple:
        return pull(carry, (index, slices.logits(hidden, bits, index)))

    carry = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(bits))
    carry, _ = jax.lax.scan(pull, carry, (slices.kept_indices, kept))
    (to_hidden, to_head), _ = jax.lax.scan(recompute_and_pull, carry, slices.other_indices)
    return to_hidden.astype(hidden.dtype), slices.head(to_head), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits_of(slices: _Slices, hidden: jax.Array, head: jax.Array, entries: jax.Array) -> jax.Array:
    """Logits `[..., k]` of some entries `[..., k]` of the vocabulary; of negative ones they mean nothing.

    All logits are made, slice by slice, and those of a slice looked up in it: gathering rows of the head instead, k a
    token, would take memory for k·D numbers a token, and its gradient as many scattered sums.
    """
    return _forward_of(slices, hidden, head, entries)[0]


def _forward_of(
    slices: _Slices, hidden: jax.Array, head: jax.Array, entries: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    bits = slices.bits(head)

    def look_up(found: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        place, inside = slices.find(entries, index)
        return jnp.where(inside, jnp.take_along_axis(slices.logits(hidden, bits, index), place, axis=-1), found), None

    logits, _ = jax.lax.scan(look_up, jnp.zeros(entries.shape, jnp.float32), jnp.arange(slices.count))
    return logits, (hidden, head, entries, logits)


def _backward_of(slices: _Slices, saved: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple:
    hidden, head, entries, logits = saved
    is_read = jnp.any((cotangent != 0) & (entries >= 0), axis=-1, keepdims=True)
    states = jnp.where(is_read, hidden, 0)  # as in `_backward`
    slope = jnp.where(is_read, cotangent * slices.slope(logits), 0.0)
    bits = slices.bits(head)

    def pull(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple:
        to_hidden, to_head = carry
        place, inside = slices.find(entries, index)
        gradient = _scattered(jnp.where(inside, slope, 0.0), place, slices.blocks * slices.rows).astype(hidden.dtype)
        weight = slices.cut(bits, index, hidden.dtype)
        if not slices.even:
            weight = jnp.where(slices.fresh(index)[:, None], weight, 0)
        to_hidden += jnp.einsum("...v,vd->...d", gradient, weight, preferred_element_type=jnp.float32)
        return (to_hidden, slices.paste(to_head, outer_product(states, gradient).T, index)), None

    carry = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(bits))
    (to_hidden, to_head), _ = jax.lax.scan(pull, carry, jnp.arange(slices.count))
    return to_hidden.astype(hidden.dtype), slices.head(to_head), None


_logits_of.defvjp(_forward_of, _backward_of)


def _scattered(values: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """`[..., k]` values, summed where they have the same place, as `[..., size]`."""

    def one(values: jax.Array, place: jax.Array) -> jax.Array:
        return jnp.zeros(size, values.dtype).at[place].add(values)

    flat = (x.reshape(-1, x.shape[-1]) for x in (values, place))
    return jax.vmap(one)(*flat).reshape(*values.shape[:-1], size)


def outer_product(left: jax.Array, right: jax.Array, *, dtype: str = "float32") -> jax.Array:
    """Sums left ⊗ right over tokens, `[..., M]` and `[..., N]` to `[M, N]`: the gradient of a weight.

    A device sums its own tokens in float32; `dtype` is the type of that, in which devices add theirs up.

    Of the two operands XLA's CPU product transposes the left one: better the narrow, ready-made states. It has no
    such product of bfloat16 operands at all (jaxlib 0.10: "Unsupported element type for DotThunk"), so that there
    they are widened first.
    """

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum("...m,...n->mn", left, right, preferred_element_type=dtype)

    def widened(left: jax.Array, right: jax.Array) -> jax.Array:
        return product(left.astype(jnp.float32), right.astype(jnp.float32))

    if left.dtype == right.dtype == jnp.float32:
        return product(left, right)
    return jax.lax.platform_dependent(left, right, cpu=widened, default=product)


_scores.defvjp(_forward, _backward)
