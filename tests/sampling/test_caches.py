"""Attention of slots that have a clock each, and several tokens at once, beside a loop over texts.

Whatever type keys and values are kept in: the loop reads them rounded as they are then, and rounding costs no more than
follows from its steps.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.attention import KeyValue
from jaxrl_llm.sampling.attention import slot_attention
from jaxrl_llm.sampling.caches import Memory, Sizes, Slots

SIZES = Sizes(page=8, block=4, alike=2, slots=8, places=3, prompt_pages=3, tokens=40, drafts=3)
QUERIES, HEADS, KV_HEADS, HEAD_DIM, LAYER = 4, 6, 2, 4, 1
PROMPT_LENGTHS = np.array([19, 3, 24])
SLOTS = Slots(
    active=jnp.arange(8) != 5,
    place=jnp.array([0, 0, 1, 1, 2, 2, 1, 0]),
    prompt_length=jnp.asarray(PROMPT_LENGTHS[[0, 0, 1, 1, 2, 2, 1, 0]]),
    start=jnp.zeros(8, jnp.int32),
)


def rounded(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Entries `[…, H]` as they are kept, and how far off each may be."""
    if dtype == "int8":
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        steps = np.round(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0))
        return steps * scale, np.broadcast_to(scale / 2, x.shape)
    return np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32)), np.abs(x) * float(jnp.finfo(dtype).eps) / 2


def filled(
    rng: np.random.Generator, window: int | None, dtype: str
) -> tuple[Memory, np.ndarray, list[KeyValue], list[KeyValue]]:
    """The memory of slots that kept one to four tokens a turn, their clocks, and what prompts and texts hold."""
    value = jax.ShapeDtypeStruct((KV_HEADS, HEAD_DIM), jnp.dtype(dtype))
    memory = Memory.empty(SIZES, 2, window, value)
    prompts = []
    for place, length in enumerate(PROMPT_LENGTHS):
        pages = rng.normal(size=(2, 2, SIZES.prompt_pages, KV_HEADS, SIZES.page, HEAD_DIM)).astype(np.float32)
        memory = memory.with_prompt(KeyValue(jnp.asarray(pages[0].swapaxes(-1, -2)), jnp.asarray(pages[1])), place)
        prompts.append(KeyValue(*pages[:, LAYER].swapaxes(2, 3).reshape(2, -1, KV_HEADS, HEAD_DIM)[:, :length]))

    texts = rng.normal(size=(2, SIZES.slots, SIZES.tokens, KV_HEADS, HEAD_DIM)).astype(np.float32)
    texts[:, :, 2:20:7, 1] = 0
    write, slot = jax.jit(Memory.with_stretches), np.arange(SIZES.slots)[:, None]
    clock = np.zeros(SIZES.slots, np.int32)
    for turn in range(11):
        kept = np.where(slot[:, 0] == 7, 3, rng.integers(1, 4, SIZES.slots))  # one is far ahead of the others
        kept = np.full(SIZES.slots, QUERIES) if turn == 10 else kept
        places = clock[:, None] + np.arange(QUERIES)
        wrong = np.arange(QUERIES)[:, None, None] >= kept[:, None, None, None]
        new = np.where(wrong, 9.0, texts[:, slot, places]).astype(np.float32)
        memory = write(memory, LAYER, *map(jnp.asarray, new), jnp.asarray(clock))
        clock = clock if turn == 10 else clock + kept
    return memory, clock, prompts, [KeyValue(*pair) for pair in texts.swapaxes(0, 1)]


@pytest.mark.parametrize(
    ("implementation", "dtype", "window", "softcap"),
    [
        *itertools.product(["xla", "pallas_interpret"], ["float32"], [11, 27], [None]),
        *itertools.product(["xla", "pallas_interpret"], ["float32", "int8"], [None], [1.5]),
        ("xla", "int8", 27, None),
        ("xla", "bfloat16", 27, None),
        ("pallas_interpret", "bfloat16", 11, None),
    ],
)
def test_attention_of_several_tokens_of_each_slot(window, softcap, implementation, dtype):
    rng = np.random.default_rng(0)
    memory, clock, prompts, texts = filled(rng, window, dtype)
    assert clock.max() > clock.min() + SIZES.page
    query = rng.normal(size=(SIZES.slots, QUERIES, HEADS, HEAD_DIM)).astype(np.float32)

    value = jax.ShapeDtypeStruct((KV_HEADS, HEAD_DIM), jnp.dtype(dtype))
    attention = slot_attention(implementation, SIZES.page, value, HEADS, queries=QUERIES)

    @jax.jit
    def attend(query: jax.Array, memory: Memory, clock: jax.Array) -> jax.Array:
        walk = attention.walk(SIZES, SLOTS, clock, QUERIES, window)
        return attention.attend(query, memory, LAYER, SLOTS, walk, clock, SIZES, window=window, softcap=softcap)

    mixed = np.asarray(attend(jnp.asarray(query), memory, jnp.asarray(clock)))
    errors = []
    for s in np.flatnonzero(SLOTS.active):
        prompt, text = prompts[SLOTS.place[s]], texts[s]
        for q in range(QUERIES):
            keys, values = (np.concatenate([a, b[: clock[s] + q + 1]]) for a, b in zip(prompt, text, strict=True))
            keys, values = keys[-(window or 0) :], values[-(window or 0) :]
            (kept_keys, off_keys), (kept_values, off_values) = rounded(keys, dtype), rounded(values, dtype)
            for n in range(HEADS):
                kv, asks = n // (HEADS // KV_HEADS), query[s, q, n] / np.sqrt(HEAD_DIM)
                expected = attended(asks, kept_keys[:, kv], kept_values[:, kv], softcap)
                np.testing.assert_allclose(mixed[s, q, n], expected, atol=2e-6)
                # No score is off by more than d, so no weight by more than a factor of exp(2 d).
                d = (off_keys[:, kv] @ np.abs(asks)).max()
                bound = np.expm1(2 * d) * np.abs(values[:, kv]).max(axis=0) + off_values[:, kv].max(axis=0)
                errors.append(np.abs(expected - attended(asks, keys[:, kv], values[:, kv], softcap)))
                assert (errors[-1] <= bound + 2e-6).all()
    assert dtype == "float32" or 1e-3 < np.max(errors) < 0.05


def attended(query: np.ndarray, keys: np.ndarray, values: np.ndarray, softcap: float | None) -> np.ndarray:
    """softmax(keys·query)·values."""
    scores = keys @ query
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()
