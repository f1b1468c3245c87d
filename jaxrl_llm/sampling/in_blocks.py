"""Attention of slots in plain JAX: of the caches, only pages in which something is seen are read.

Slots are read a block of neighbours at a time, and of a block only pages in which one of its slots sees something: the
list of them (`Walk`) is made every few tokens, for all layers with the same window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models.kept import Kept
from jaxrl_llm.sampling.caches import Memory, Sizes, Slots

_MASKED = -1e30  # finite, so that a slot that sees nothing gives no NaN
_FAR = 2**30  # a place that the clock never gets to


class Walk(NamedTuple):
    """Which pages are read, by blocks of slots; what is listed beyond a count is none."""

    place: jax.Array
    page: jax.Array
    """`[S/C, C/alike, C · prompt pages]`: pages of prompts that neighbours in a block read, one after another; −1: no
    more."""
    prompt_block: jax.Array
    prompt_turn: jax.Array
    """`[turns]` each: of which block, and which of those pages of each of its neighbours."""
    prompt_count: jax.Array
    own_block: jax.Array
    own_row: jax.Array
    """`[S/C · ring]` each: a row of the ring, for all slots of a block; their pages there may differ."""
    own_count: jax.Array

    @classmethod
    def of(cls, sizes: Sizes, slots: Slots, clock: jax.Array, steps: int, window: int | None) -> Walk:
        """What the next `steps` tokens read, the first of which is written at `clock`, `[S]`."""
        blocks, page, ring = sizes.slots // sizes.block, sizes.page, sizes.ring(window)
        first = slots.start if window is None else jnp.maximum(slots.start, clock - window + 1)
        first, last = first // page, (clock + steps - 1) // page
        pages_on = (jnp.arange(ring) - first[:, None]) % ring  # from the first one to that of a row
        own = slots.active[:, None] & (pages_on <= (last - first)[:, None])
        own_block, own_row, own_count = _listed(jnp.any(own.reshape(blocks, -1, ring), axis=1))

        def alike(x: jax.Array) -> jax.Array:
            return x.reshape(blocks, -1, sizes.alike)

        place, active, length = alike(slots.place), alike(slots.active), alike(slots.prompt_length)
        earlier = jnp.tril(jnp.ones((sizes.alike, sizes.alike), bool), -1)
        again = jnp.any((place[..., :, None] == place[..., None, :]) & active[..., None, :] & earlier, axis=-1)
        begin = jnp.arange(sizes.prompt_pages) * page
        read = (active & ~again)[..., None] & (begin < length[..., None])  # [S/C, C/alike, alike, prompt pages]
        if window is not None:
            age = alike(jnp.where(slots.active, clock - slots.start, _FAR))  # tokens that it has written
            read &= begin + page > length[..., None] + jnp.min(age, axis=-1)[..., None, None] - window
        read = read.reshape(*read.shape[:2], -1)
        order = jnp.argsort(~read, axis=-1)  # stable: those that are read come first
        turns = jnp.max(jnp.sum(read, axis=-1), axis=1)
        prompt_block, prompt_turn, prompt_count = _listed(jnp.arange(read.shape[-1]) < turns[:, None])
        return cls(
            place=jnp.take_along_axis(place, order // sizes.prompt_pages, axis=-1),
            page=jnp.where(jnp.take_along_axis(read, order, axis=-1), order % sizes.prompt_pages, -1),
            prompt_block=prompt_block,
            prompt_turn=prompt_turn,
            prompt_count=prompt_count,
            own_block=own_block,
            own_row=own_row,
            own_count=own_count,
        )


def _listed(mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row and column of what is true in a matrix, and how many these are."""
    row, column = jnp.nonzero(mask, size=mask.size, fill_value=0)
    return row.astype(jnp.int32), column.astype(jnp.int32), jnp.sum(mask, dtype=jnp.int32)


class _Mixed(NamedTuple):
    """An online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) as far as it got."""

    peak: jax.Array
    """`[S, K, Q·N/K]`: the largest score."""
    total: jax.Array
    """`[S, K, Q·N/K]`: the sum of the weights under it."""
    mixed: jax.Array
    """`[S, K, Q·N/K, H]`: the values under these."""

    @classmethod
    def nothing(cls, query: jax.Array, sinks: jax.Array | None) -> _Mixed:
        """Before the first page, for queries `[S, K, Q·N/K, H]`; sinks `[K, Q·N/K]` are in it."""
        numbers, mixed = jnp.zeros(query.shape[:-1], jnp.float32), jnp.zeros(query.shape, jnp.float32)
        if sinks is None:
            return cls(jnp.full_like(numbers, _MASKED), numbers, mixed)
        return cls(numbers + sinks, numbers + 1, mixed)

    def with_page(
        self, at: jax.Array, scores: jax.Array, seen: jax.Array, mix: Callable[[jax.Array], jax.Array]
    ) -> _Mixed:
        """With a page that C slots from `at` on read.

        Args:
            at: the first of the slots.
            scores: `[C, K, Q·N/K, B]`.
            seen: `[C, Q, B]`: which of them count.
            mix: weights in the shape of the scores → the values under them, `[C, K, Q·N/K, H]`.
        """
        seen = jnp.repeat(seen, scores.shape[2] // seen.shape[1], axis=1)[:, None]
        peak, total, mixed = (jax.lax.dynamic_slice_in_dim(x, at, len(scores)) for x in self)
        now = jnp.maximum(peak, jnp.max(jnp.where(seen, scores, _MASKED), axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - now[..., None]), 0.0)
        fade = jnp.exp(peak - now)
        new = now, fade * total + jnp.sum(weights, axis=-1), fade[..., None] * mixed + mix(weights)
        return _Mixed(
            *(jax.lax.dynamic_update_slice_in_dim(x, part, at, axis=0) for x, part in zip(self, new, strict=True))
        )

    @property
    def result(self) -> jax.Array:
        """`[S, K, Q·N/K, H]`; 0 where nothing was seen."""
        return self.mixed / jnp.maximum(self.total, 1e-30)[..., None]


class _Reading(NamedTuple):
    """One layer's attention."""

    query: jax.Array
    """`[S, K, Q·N/K, H]`, scaled."""
    now: jax.Array
    """`[S, Q]`: the queries' places of the clock."""
    position: jax.Array
    """`[S, Q]`: their places in the texts."""
    memory: Memory
    layer: jax.Array
    slots: Slots
    walk: Walk
    sizes: Sizes
    window: int | None
    softcap: float | None

    def with_prompt(self, step: jax.Array, so_far: _Mixed) -> _Mixed:
        """With the pages of prompts that a block reads in a step."""
        walk, sizes = self.walk, self.sizes
        index, turn = walk.prompt_block[step], walk.prompt_turn[step]
        place, number = (x[index, :, turn] for x in (walk.place, walk.page))  # [C/alike]
        at = self.layer, place, jnp.maximum(number, 0)
        page = jax.tree.map(lambda x: x.at[at].get(mode="promise_in_bounds"), self.memory.prompts)  # [C/alike, K, …]

        query = _by_prompt(self._of_block(self.query, index), sizes.alike)
        within = jnp.arange(sizes.page)
        depth = jnp.repeat(jnp.where(number < 0, _FAR, number * sizes.page), sizes.alike)[:, None] + within
        mine = self._of_block(self.slots.place, index) == jnp.repeat(place, sizes.alike)
        seen = (mine[:, None] & (depth < self._of_block(self.slots.prompt_length, index)[:, None]))[:, None]
        if self.window is not None:
            seen &= self._of_block(self.position, index)[..., None] - depth[:, None] < self.window
        return so_far.with_page(
            index * sizes.block,
            _by_slot(self._scores(query, page), sizes.alike),
            seen,
            lambda weights: _by_slot(self._mixed(_by_prompt(weights, sizes.alike), page), sizes.alike),
        )

    def with_own(self, step: jax.Array, so_far: _Mixed) -> _Mixed:
        """With a page of each slot of a block, of its own tokens."""
        index, row = self.walk.own_block[step], self.walk.own_row[step]
        tokens, block, ring = self.sizes.page, self.sizes.block, self.sizes.ring(self.window)

        def read(x: jax.Array) -> jax.Array:
            at = (self.layer, row, index * block, *(0,) * (x.ndim - 3))
            return jax.lax.dynamic_slice(x, at, (1, 1, block, *x.shape[3:]))[0, 0]

        page = jax.tree.map(read, self.memory.own)  # [C, K, …]
        now = self._of_block(self.now, index)
        newest = now[:, -1] // tokens
        written = ((newest - (newest - row) % ring) * tokens)[:, None] + jnp.arange(tokens)  # [C, B]
        age = now[..., None] - written[:, None]  # [C, Q, B]
        seen = (written >= self._of_block(self.slots.start, index)[:, None])[:, None] & (age >= 0)
        if self.window is not None:
            seen &= age < self.window
        scores = self._scores(self._of_block(self.query, index), page)
        return so_far.with_page(index * block, scores, seen, lambda weights: self._mixed(weights, page))

    def _of_block(self, x: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, index * self.sizes.block, self.sizes.block)

    def _product(self, left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left.astype(self.query.dtype), right, preferred_element_type=jnp.float32)

    def _scores(self, query: jax.Array, page: Kept) -> jax.Array:
        """`[…, K, *, B]`; a scale belongs to the whole key, so that the product is what it is applied to."""
        scores = _scaled(self._product(query, page.key), page.key_scale)
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def _mixed(self, weights: jax.Array, page: Kept) -> jax.Array:
        """`[…, K, *, H]`; that of a value is applied to its weight."""
        return self._product(_scaled(weights, page.value_scale), page.value)


def attend_in_flight(
    query: jax.Array,
    memory: Memory,
    layer: jax.Array | int,
    slots: Slots,
    walk: Walk,
    clock: jax.Array,
    sizes: Sizes,
    *,
    sinks: jax.Array | None = None,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """softmax(q·k/√H)·v of each slot's Q tokens over its prompt and its own tokens, page by page.

    By an online softmax, so that no page is read twice. Of a prompt that several slots of a block share, the page is
    read once for all of them.

    Args:
        query: `[S, Q, N, H]`, rotated, of tokens whose keys and values lie at `clock` and the places behind it.
        memory: of layers.
        layer: which of them it is.
        slots: what they decode.
        walk: the pages to be read, made for the same window.
        clock: `[S]`, places of the first of these tokens.
        sizes: of the memory.
        sinks: as of `dense_attention`.
        window: how many tokens a query sees, its own included; `None`: all.
        softcap: c in c·tanh(·/c) on the scores, or `None`.

    Returns:
        `[S, Q, N, H]` in the type of the queries; of idle slots it means nothing.
    """
    count, queries, _, head_dim = query.shape
    kv_heads = memory.own.value.shape[3]
    grouped = query.reshape(count, queries, kv_heads, -1, head_dim) * head_dim**-0.5
    grouped = jnp.moveaxis(grouped, 1, 2).reshape(count, kv_heads, -1, head_dim)
    now = clock[:, None] + jnp.arange(queries)
    position = (slots.prompt_length - slots.start)[:, None] + now
    reading = _Reading(grouped, now, position, memory, jnp.int32(layer), slots, walk, sizes, window, softcap)
    sinks = None if sinks is None else jnp.tile(sinks.reshape(kv_heads, -1), queries)
    so_far = jax.lax.fori_loop(0, walk.prompt_count, reading.with_prompt, _Mixed.nothing(grouped, sinks))
    so_far = jax.lax.fori_loop(0, walk.own_count, reading.with_own, so_far)
    mixed = so_far.result.reshape(count, kv_heads, queries, -1, head_dim)
    return jnp.moveaxis(mixed, 1, 2).reshape(query.shape).astype(query.dtype)


def _scaled(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """`[…, K, *, B]` times `[…, K, B]`."""
    return x if scale is None else x * scale[..., None, :]


def _by_prompt(x: jax.Array, alike: int) -> jax.Array:
    """`[C, K, Q·N/K, *]` → `[C/alike, K, alike · Q·N/K, *]`."""
    x = jnp.swapaxes(x.reshape(-1, alike, *x.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _by_slot(x: jax.Array, alike: int) -> jax.Array:
    """The inverse of `_by_prompt`."""
    x = jnp.swapaxes(x.reshape(*x.shape[:2], alike, -1, x.shape[-1]), 1, 2)
    return x.reshape(-1, *x.shape[2:])
