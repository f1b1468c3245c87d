"""Grouped-query attention over a prompt and, beside it, the completions that share it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"
"""Name of attention's outputs and log-sum-exps for remat policies (`jax.ad_checkpoint.checkpoint_name`)."""

_MASKED = -1e30  # finite, so that a row without any key gives finite weights and gradients


class KeyValue(NamedTuple):
    """Keys (rotated) and values of tokens, laid out so that attention is plain row-major matrix products."""

    key: jax.Array
    """`[..., K, H, T]`."""
    value: jax.Array
    """`[..., K, T, H]`."""

    @classmethod
    def of(cls, key: jax.Array, value: jax.Array) -> KeyValue:
        """From `[..., T, K, H]` as the projections give them."""
        return cls(jnp.moveaxis(key, -3, -1), jnp.swapaxes(value, -3, -2))


class Visibility(NamedTuple):
    """Which keys a query sees, one integer a key: those with key_place ≤ place < end.

    Tokens of a tree (a prompt and its completions, a conversation and its branches, several prompts one after another)
    lie in depth-first order: `end` is one past the last token of the key's subtree. A causal row and packed rows are
    trees, too. A sliding window acts on depth, which is also the rotary position. Padding is a tree of its own, token
    by token (`end` = place + 1), so that every query sees itself at least.

    Queries and keys are the same tokens, or queries are some of them (one device's part of a row).
    """

    place: jax.Array
    """`[B, Tq]` int32: where the queries lie in their rows."""
    depth: jax.Array
    """`[B, Tq]` int32: how many tokens are above each in its tree."""
    key_place: jax.Array
    """`[B, Tk]` int32."""
    key_depth: jax.Array
    """`[B, Tk]` int32."""
    end: jax.Array
    """`[B, Tk]` int32."""

    @classmethod
    def of_rows(cls, depth: jax.Array, end: jax.Array, place: jax.Array | None = None) -> Visibility:
        """That of whole rows `[B, T]`, token by token; `place` where they lie, if not one after another."""
        if place is None:
            place = jnp.broadcast_to(jnp.arange(depth.shape[1], dtype=jnp.int32), depth.shape)
        return cls(place, depth, place, depth, end)

    def mask(self, window: int | None) -> jax.Array:
        """The same as an array, bool `[B, Tq, Tk]`; with a window, only keys less than so many levels above."""
        query, key, end = self.place[:, :, None], self.key_place[:, None], self.end[:, None]
        seen = (key <= query) & (query < end)
        return seen if window is None else seen & (self.depth[:, :, None] - self.key_depth[:, None] < window)


def dense_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visibility,
    *,
    sinks: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(q·k/√H)·v over the keys that each query sees: the reference, with all scores in memory.

    Args:
        query: `[B, Tq, N, H]`, rotated.
        key: `[B, Tk, K, H]`, rotated; query head n reads key head n // (N/K).
        value: `[B, Tk, K, H]`.
        visible: which keys each query sees.
        sinks: `[N]` float32 of each head, or `None`: a score beside those of the keys, whose value is 0.
        window: how many levels of the tree a query sees, its own included; `None`: all.
        softcap: c in c·tanh(·/c) on the scores, or `None`.

    Returns:
        `[B, Tq, N, H]` in the type of the queries; softmax in float32.
    """
    return attend(query, KeyValue.of(key, value), visible.mask(window), sinks=sinks, softcap=softcap)


class SharedPrompt(NamedTuple):
    """The shape of rows that are each a prompt and, after it, its G completions, padding included: Tp + G·Tc tokens.

    G = 0 stands for plain causal rows of Tp tokens.
    """

    prompt_width: int
    group: int
    width: int

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, Tp + G·Tc, …]` → `[B, Tp, …]` and `[B, G, Tc, …]`."""
        of_prompt, own = jax.lax.split(x, (self.prompt_width, self.group * self.width), axis=1)
        return of_prompt, own.reshape(len(x), self.group, self.width, *x.shape[2:])


def dense_shared_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visibility,
    shared: SharedPrompt,
    *,
    sinks: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """`dense_attention` of whole rows whose shape is known: completions have no scores with each other.

    Arguments as for `dense_attention`, and the shape of the rows.
    """
    (of_prompt, own), (prompt_depth, own_depth) = shared.split(query), shared.split(visible.depth)
    causal = causal_mask(prompt_depth, prompt_depth, window)
    prompt, memory = zip(*(shared.split(x) for x in (key, value)), strict=True)
    to_shared = attend(of_prompt, KeyValue.of(*prompt), causal, sinks=sinks, softcap=softcap)
    if not shared.group:
        return to_shared
    is_prompt = (visible.end[:, : shared.prompt_width] > shared.prompt_width)[:, None, None]  # [B, 1, 1, Tp]
    if window is not None:
        is_prompt = is_prompt & causal_mask(own_depth, prompt_depth[:, None], window)
    times = jnp.arange(shared.width)[None, None]
    own_mask, keys = causal_mask(times, times, window), (KeyValue.of(*prompt), KeyValue.of(*memory))
    mixed = attend_shared(own, *keys, is_prompt, own_mask, sinks=sinks, softcap=softcap)
    return jnp.concatenate([to_shared, mixed.reshape(len(query), -1, *mixed.shape[3:])], axis=1)


def causal_mask(query_positions: jax.Array, key_positions: jax.Array, window: int | None) -> jax.Array:
    """Which keys a query sees: itself and earlier ones, the last `window` of them.

    Args:
        query_positions: `[..., Tq]` int.
        key_positions: `[..., Tk]` int.
        window: number of visible positions, or `None` for all.

    Returns:
        bool `[..., Tq, Tk]`.
    """
    query, key = query_positions[..., :, None], key_positions[..., None, :]
    return query >= key if window is None else (query >= key) & (query - key < window)


def _logits(scores: jax.Array, mask: jax.Array, softcap: float | None) -> jax.Array:
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(mask, scores, _MASKED)


def attend(
    query: jax.Array, memory: KeyValue, mask: jax.Array, *, sinks: jax.Array | None = None, softcap: float | None
) -> jax.Array:
    """softmax(q·k/√H)·v within each row; softmax in float32.

    Args:
        query: `[B, Tq, N, H]`.
        memory: of Tk tokens a row; query head n reads key head n // (N/K).
        mask: bool `[B, Tq, Tk]`.
        sinks: as of `dense_attention`.
        softcap: c in c·tanh(·/c) on the scores, or `None`.

    Returns:
        `[B, Tq, N, H]`.
    """
    batch, length, heads, head_dim = query.shape
    grouped = _by_kv_head(query, memory.value.shape[-3])  # [B, K, Tq, N/K, H]
    scores = _product(grouped, memory.key)
    scores = _logits(scores, mask[:, None, :, None, :], softcap)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        beside = jnp.broadcast_to(_sinks_by_kv_head(sinks, memory.value.shape[-3])[..., None], (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, beside], axis=-1), axis=-1)[..., :-1]
    mixed = _product(weights.astype(query.dtype), memory.value)
    mixed = jnp.swapaxes(mixed, 1, 2).reshape(batch, length, heads, head_dim)
    return checkpoint_name(mixed.astype(query.dtype), ATTENTION)


def attend_shared(
    query: jax.Array,
    prompt: KeyValue,
    own: KeyValue,
    prompt_mask: jax.Array,
    own_mask: jax.Array,
    *,
    sinks: jax.Array | None = None,
    softcap: float | None,
) -> jax.Array:
    """Attention of G completions to the prompt that they share and to their own tokens: one softmax over both.

    The prompt's keys are read once for the G completions. Computing the two blocks of scores apart, under a
    common maximum, avoids a copy of the concatenated scores.

    Args:
        query: `[P, G, Tq, N, H]`.
        prompt: keys and values of Tp tokens of each prompt.
        own: keys and values of Tk tokens of each completion.
        prompt_mask: bool `[P, 1 or G, 1 or Tq, Tp]`.
        own_mask: bool `[P or 1, G or 1, Tq, Tk]`.
        sinks: as of `dense_attention`.
        softcap: c in c·tanh(·/c) on the scores, or `None`.

    Returns:
        `[P, G, Tq, N, H]`.
    """
    prompts, group, length, heads, head_dim = query.shape
    grouped = _by_kv_head(query, own.value.shape[-3])  # [P, G, K, Tq, N/K, H]
    to_prompt = _product(jnp.swapaxes(grouped, 1, 2), prompt.key, rows=3)  # [P, K, G, Tq, N/K, Tp]
    to_own = _product(grouped, own.key)  # [P, G, K, Tq, N/K, Tk]
    to_prompt = _logits(to_prompt, prompt_mask[:, None, :, :, None, :], softcap)
    to_own = _logits(to_own, own_mask[:, :, None, :, None, :], softcap)

    peak = jnp.maximum(jnp.swapaxes(jnp.max(to_prompt, axis=-1), 1, 2), jnp.max(to_own, axis=-1))
    if sinks is not None:
        sinks = _sinks_by_kv_head(sinks, own.value.shape[-3])
        peak = jnp.maximum(peak, sinks)
    peak = jax.lax.stop_gradient(peak)  # [P, G, K, Tq, N/K]
    to_prompt = jnp.exp(to_prompt - jnp.swapaxes(peak, 1, 2)[..., None])
    to_own = jnp.exp(to_own - peak[..., None])
    total = jnp.swapaxes(jnp.sum(to_prompt, axis=-1), 1, 2) + jnp.sum(to_own, axis=-1)
    total = total if sinks is None else total + jnp.exp(sinks - peak)

    mixed = jnp.swapaxes(_product(to_prompt.astype(query.dtype), prompt.value, rows=3), 1, 2)
    mixed = (mixed + _product(to_own.astype(query.dtype), own.value)) / total[..., None]
    mixed = jnp.swapaxes(mixed, 2, 3).reshape(prompts, group, length, heads, head_dim)
    return checkpoint_name(mixed.astype(query.dtype), ATTENTION)


def _sinks_by_kv_head(sinks: jax.Array, kv_heads: int) -> jax.Array:
    """`[N]` → `[K, 1, N/K]`: beside `[…, K, Tq, N/K]`, that is queries by the head that they read."""
    return sinks.reshape(kv_heads, 1, -1)


def _by_kv_head(query: jax.Array, kv_heads: int) -> jax.Array:
    """`[..., Tq, N, H]` → `[..., K, Tq, N/K, H]`, divided by √H."""
    *lead, length, heads, head_dim = query.shape
    grouped = query.reshape(*lead, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    return jnp.moveaxis(grouped, -3, -4)


def _product(left: jax.Array, right: jax.Array, *, rows: int = 2) -> jax.Array:
    """Matrix product in float32 over the last axes, the `rows` axes before the last of `left` taken as one."""
    flat = left.reshape(*left.shape[: -rows - 1], -1, left.shape[-1])
    product = jnp.matmul(flat, right, preferred_element_type=jnp.float32)
    return product.reshape(*left.shape[:-1], right.shape[-1])
