"""Keys and values of completions in flight, in pages.

A slot's tokens have their keys and values at places of a clock, and what a completion has written is a stretch of the
clock's time, of which old pages are overwritten. Slots that decode a token each go by one clock, whatever the place in
their texts: a token is then written to the same place of every slot. Slots that decode as many tokens as are good have
a clock each, which is the place in their text. A prompt lies apart, once for all slots that decode its completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models import batch_invariant
from jaxrl_llm.models.attention import KeyValue
from jaxrl_llm.models.kept import Kept, has_scales
from jaxrl_llm.sharding import on_cpu

_BLOCK_BYTES = 2**18
"""What the keys of a block's pages take, about: more are read at a time than a core's cache holds, less cost more in
turns of the loop than in reading."""


def page_tokens() -> int:
    """B of long texts: a row of a TPU's registers; less on a CPU, whose caches are smaller."""
    return 64 if on_cpu() else 128


class Sizes(NamedTuple):
    """Of the caches on one device; all static."""

    page: int
    """B, tokens of a page."""
    block: int
    """C, slots that are read at a time."""
    alike: int
    """Neighbours in a block, a divisor of C, that had better decode completions of the same prompt."""
    slots: int
    """S, a multiple of C; those beyond what was asked for stay idle."""
    places: int
    """R, prompts in flight."""
    prompt_pages: int
    """Of each place."""
    tokens: int
    """Tc, of the longest completion."""
    drafts: int
    """Tokens that a slot writes before it is known whether they stay."""

    @classmethod
    def of(
        cls,
        *,
        slots: int,
        prompts: int,
        group: int,
        prompt_width: int,
        tokens: int,
        page: int,
        token_bytes: int,
        drafts: int = 0,
    ) -> Sizes:
        """Sizes for so many slots.

        Args:
            slots: completions in flight.
            prompts: of the batch.
            group: completions of each.
            prompt_width: Tp.
            tokens: Tc.
            page: B, of long texts.
            token_bytes: of the keys of one token in one layer.
            drafts: tokens that a slot writes before it is known whether they stay.
        """
        page = min(page, _up(max(prompt_width, tokens), 8))
        most = max(1, _BLOCK_BYTES // (page * token_bytes))

        def blocks(alike: int) -> tuple[int, int]:
            """Equal blocks of such neighbours for all slots: how many, and the slots of each."""
            count = -(-slots // (most // alike * alike))
            return count, _up(-(-slots // count), alike)

        few = (n for n in range(min(group, slots, most), 1, -1) if math.prod(blocks(n)) <= slots + max(1, slots // 6))
        alike = next(few, 1)  # more neighbours share what they read; fewer leave fewer slots idle
        count, block = blocks(alike)
        return cls(page, block, alike, count * block, min(prompts, slots), -(-prompt_width // page), tokens, drafts)

    def ring(self, window: int | None) -> int:
        """Pages that a slot has for its own tokens in a layer: for the longest completion, or for a window."""
        seen = self.tokens if window is None else min(self.tokens, window)
        return -(-(seen + self.drafts) // self.page) + 1

    def bytes(self, windows: Iterable[int | None], value: jax.ShapeDtypeStruct) -> int:
        """Of the `Memory` of layers with these windows, of a `value` `[K, H]` a token, as it is kept."""
        pages = sum(self.places * self.prompt_pages + self.slots * self.ring(window) for window in windows)
        return pages * self.page * 2 * bytes_of(value)


def _up(x: int, unit: int) -> int:
    """The next multiple."""
    return -(-x // unit) * unit


def as_kept(value: jax.ShapeDtypeStruct, cache_dtype: str | None) -> jax.ShapeDtypeStruct:
    """A token's value `[K, H]` in the type in which it is kept; `None`: as it is made."""
    return jax.ShapeDtypeStruct(value.shape, jnp.dtype(cache_dtype or value.dtype))


def bytes_of(value: jax.ShapeDtypeStruct) -> int:
    """Of a token's value `[K, H]`, as it is kept: of int8 with the scales. A key takes as many."""
    return value.size * value.dtype.itemsize + value.shape[0] * 4 * has_scales(value.dtype)


class Memory(NamedTuple):
    """What some layers of one kind remember, l of them."""

    prompts: Kept
    """`[l, R, prompt pages]` before the axes of `Kept`, over B tokens each."""
    own: Kept
    """`[l, ring, S]` before them: page e of a slot's clock lies at e mod ring."""

    @classmethod
    def empty(cls, sizes: Sizes, layers: int, window: int | None, value: jax.ShapeDtypeStruct) -> Memory:
        """That before anything was read; of a token a layer keeps a key and a `value` `[K, H]`, in that type."""
        kv_heads, head_dim = value.shape

        def pages(*lead: int) -> Kept:
            heads, scaled = (layers, *lead, kv_heads), has_scales(value.dtype)
            return Kept(
                jnp.zeros((*heads, head_dim, sizes.page), value.dtype),
                jnp.zeros((*heads, sizes.page, head_dim), value.dtype),
                jnp.zeros((*heads, sizes.page), jnp.float32) if scaled else None,
                jnp.zeros((*heads, sizes.page), jnp.float32) if scaled else None,
            )

        return cls(pages(sizes.places, sizes.prompt_pages), pages(sizes.ring(window), sizes.slots))

    def with_prompt(self, read: KeyValue, place: jax.Array) -> Memory:
        """With a prompt's keys and values, `[l, pages]` before the axes of `KeyValue`, at a place."""
        kept = Kept.of(read.key, read.value, self.prompts.key.dtype, key_axis=-2)
        return self._replace(prompts=jax.tree.map(lambda x, new: x.at[:, place].set(new), self.prompts, kept))

    def with_tokens(self, layer: jax.Array | int, key: jax.Array, value: jax.Array, clock: jax.Array) -> Memory:
        """With the keys and values `[S, K, H]` of what all slots decode at one `clock`, a scalar."""
        _, ring, *_, page = self.own.key.shape
        row, offset, zero = clock // page % ring, clock % page, jnp.int32(0)
        at, put = (jnp.int32(layer), row, zero, zero), jax.lax.dynamic_update_slice
        new = Kept.of(key, value, self.own.key.dtype)

        def scaled(pages: jax.Array, scale: jax.Array) -> jax.Array:
            return put(pages, scale[None, None, ..., None], (*at, offset))

        return self._replace(
            own=Kept(
                put(self.own.key, new.key[None, None, ..., None], (*at, zero, offset)),
                put(self.own.value, new.value[None, None, :, :, None], (*at, offset, zero)),
                *jax.tree.map(scaled, self.own[2:], new[2:]),
            )
        )

    def with_stretches(self, layer: jax.Array | int, key: jax.Array, value: jax.Array, clock: jax.Array) -> Memory:
        """With the keys and values `[S, Q, K, H]` of what slots decode from their own `clock` `[S]` on."""
        _, ring, slots, *_, page = self.own.key.shape
        place = clock[:, None] + jnp.arange(key.shape[1])
        row, slot, offset = place // page % ring, jnp.arange(slots)[:, None], place % page
        ways: Any = {"mode": "promise_in_bounds", "unique_indices": True}
        new = Kept.of(key, value, self.own.key.dtype)

        def put(pages: jax.Array, rows: jax.Array) -> jax.Array:
            return pages.at[layer, row, slot, :, offset].set(rows, **ways)

        return self._replace(
            own=Kept(
                self.own.key.at[layer, row, slot, :, :, offset].set(new.key, **ways),
                *jax.tree.map(put, self.own[1:], new[1:]),
            )
        )


class Slots(NamedTuple):
    """What attention has to know of the slots, `[S]` each."""

    active: jax.Array
    """bool: it decodes something."""
    place: jax.Array
    """Where its prompt lies."""
    prompt_length: jax.Array
    """Tokens of that."""
    start: jax.Array
    """The clock at which its first token was, or will be, written."""


def read_by_depth(
    memory: Memory, layer: jax.Array | int, slots: Slots, sizes: Sizes
) -> Callable[[jax.Array], Callable[[jax.Array], tuple[jax.Array, jax.Array]]]:
    """How `attend_by_depth` reads the text of each slot: its prompt and, after it, its own tokens and drafts."""
    ring, last = memory.own.key.shape[1], sizes.slots - 1

    def of_tile(first: jax.Array) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        slot = jnp.minimum((first + jnp.arange(batch_invariant.tile_tokens())) // (1 + sizes.drafts), last)
        place, length, start = (x[slot][:, None] for x in slots[1:])

        def read(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys = batch_invariant.block_keys()
            depth = index * keys + jnp.arange(keys)
            page, within = jnp.divmod(jnp.minimum(depth, sizes.prompt_pages * sizes.page - 1), sizes.page)
            number, offset = jnp.divmod(jnp.maximum(start + depth - length, 0), sizes.page)
            of_prompt, own = (layer, place, page), (layer, number % ring, slot[:, None])
            is_prompt, heads, (prompts, mine) = (depth < length)[..., None, None], slice(None), memory
            return (
                jnp.where(is_prompt, prompts.key[(*of_prompt, ..., within)], mine.key[(*own, ..., offset)]),
                jnp.where(is_prompt, prompts.value[(*of_prompt, heads, within)], mine.value[(*own, heads, offset)]),
            )

        return read

    return of_tile
