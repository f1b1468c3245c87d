"""Grouped-query attention over a prompt and, beside it, the completions that share it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row without any key gives finite weights and gradients


class KeyValue(NamedTuple):
    """Keys and values ``[..., T, K, H]``, rotated and ready to attend to."""

    key: jax.Array
    value: jax.Array


def causal_mask(query_positions: jax.Array, key_positions: jax.Array, window: jax.Array | None) -> jax.Array:
    """Which keys a query sees: itself and earlier ones, the last ``window`` of them.

    Args:
        query_positions: ``[..., Tq]`` int.
        key_positions: ``[..., Tk]`` int.
        window: scalar number of visible positions, or ``None`` for all.

    Returns:
        bool ``[..., Tq, Tk]``.
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def _logits(scores: jax.Array, mask: jax.Array, softcap: float | None) -> jax.Array:
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(mask, scores, _MASKED)


def attend(query: jax.Array, memory: KeyValue, mask: jax.Array, *, softcap: float | None) -> jax.Array:
    """softmax(q·k/√H)·v within each row; softmax in float32.

    Args:
        query: ``[B, Tq, N, H]``.
        memory: keys and values ``[B, Tk, K, H]``; query head n reads key head n // (N/K).
        mask: bool ``[B, Tq, Tk]``.
        softcap: c in c·tanh(·/c) on the scores, or ``None``.

    Returns:
        ``[B, Tq, N, H]``.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = memory.key.shape[-2]
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    scores = jnp.einsum("btknh,bskh->bktns", query, memory.key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(_logits(scores, mask[:, None, :, None, :], softcap), axis=-1)
    mixed = jnp.einsum("bktns,bskh->btknh", weights.astype(query.dtype), memory.value)
    return mixed.reshape(batch, length, heads, head_dim)


def attend_shared(
    query: jax.Array,
    prompt: KeyValue,
    own: KeyValue,
    prompt_mask: jax.Array,
    own_mask: jax.Array,
    *,
    softcap: float | None,
) -> jax.Array:
    """Attention of G completions to the prompt that they share and to their own tokens: one softmax over both.

    The prompt's keys are read once for the G completions. Computing the two blocks of scores apart, under a
    common maximum, avoids a copy of the concatenated scores.

    Args:
        query: ``[P, G, Tq, N, H]``.
        prompt: keys and values ``[P, Tp, K, H]``.
        own: keys and values ``[P, G, Tk, K, H]``.
        prompt_mask: bool ``[P, 1 or G, Tq, Tp]``.
        own_mask: bool ``[P or 1, G or 1, Tq, Tk]``.
        softcap: c in c·tanh(·/c) on the scores, or ``None``.

    Returns:
        ``[P, G, Tq, N, H]``.
    """
    prompts, group, length, heads, head_dim = query.shape
    kv_heads = own.key.shape[-2]
    query = query.reshape(prompts, group, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    to_prompt = jnp.einsum("pgtknh,pskh->pkgtns", query, prompt.key, preferred_element_type=jnp.float32)
    to_own = jnp.einsum("pgtknh,pgskh->pgktns", query, own.key, preferred_element_type=jnp.float32)
    to_prompt = _logits(to_prompt, prompt_mask[:, None, :, :, None, :], softcap)
    to_own = _logits(to_own, own_mask[:, :, None, :, None, :], softcap)

    peak_prompt = jnp.swapaxes(jnp.max(to_prompt, axis=-1), 1, 2)  # [P, G, K, Tq, N/K]
    peak = jax.lax.stop_gradient(jnp.maximum(peak_prompt, jnp.max(to_own, axis=-1)))
    to_prompt = jnp.exp(to_prompt - jnp.swapaxes(peak, 1, 2)[..., None])
    to_own = jnp.exp(to_own - peak[..., None])
    total = jnp.swapaxes(jnp.sum(to_prompt, axis=-1), 1, 2) + jnp.sum(to_own, axis=-1)

    mixed = jnp.einsum(
        "pkgtns,pskh->pgtknh", to_prompt.astype(query.dtype), prompt.value, preferred_element_type=jnp.float32
    )
    mixed += jnp.einsum(
        "pgktns,pgskh->pgtknh", to_own.astype(query.dtype), own.value, preferred_element_type=jnp.float32
    )
    mixed /= jnp.swapaxes(total, 2, 3)[..., None]
    return mixed.astype(query.dtype).reshape(prompts, group, length, heads, head_dim)
