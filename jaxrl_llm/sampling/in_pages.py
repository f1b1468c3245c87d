"""Attention of slots by the TPU kernel that reads listed pages: `attend_in_flight` in one call that reads less.

Neighbours are a unit: a prompt's page is read once for all of them that decode its completions. Of its own pages each
slot has those read in which that very slot sees something, whereas a block of `attend_in_flight` reads what any of its
slots sees.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.models.kernels.pages import Pages, Rows, attend_to_pages
from jaxrl_llm.sampling.caches import Memory, Sizes, Slots
from jaxrl_llm.sharding import MESH_AXES, spec

_ROWS = 32
"""Rows of a unit, about: more cost more in masks than they save in reading."""
_STEP_BYTES = 2**19
"""What the keys of the pages of a step take, about: less cost more in turns than in reading."""
_AT_A_TIME = 8
_MOST_PAGES = 100_000  # two integers each, of 1 MiB of scalar memory


def neighbours(slots: int, rows: int) -> int:
    """Slots of a unit, a divisor of all, whose tokens are `rows` rows each for every kv head."""
    return max(n for n in range(1, slots + 1) if slots % n == 0 and (n == 1 or n * rows <= _ROWS))


def pages_at_a_time(page_bytes: int) -> int:
    """Pages of a step, of whose keys one has so many bytes on a device."""
    return min(_AT_A_TIME, max(1, _STEP_BYTES // page_bytes))


def pages_of(
    sizes: Sizes, slots: Slots, clock: jax.Array, steps: int, window: int | None, *, near: int, at_a_time: int
) -> Pages:
    """What the next `steps` tokens of each slot read, the first of which is written at its `clock` `[S]`.

    Args:
        sizes: of the memory.
        slots: what they decode.
        clock: `[S]`.
        steps: tokens.
        window: how many tokens a query sees, its own included; `None`: all.
        near: slots of a unit, see `neighbours`.
        at_a_time: pages of a step.

    Raises:
        ValueError: the list does not fit the scalar memory.
    """
    page, ring = sizes.page, sizes.ring(window)
    own_pages = ring + 1 + (steps - 1) // page  # steps may begin new ones
    most = sizes.slots // near * -(-near * (sizes.prompt_pages + own_pages) // at_a_time) * at_a_time
    if most > _MOST_PAGES:
        raise ValueError(
            f"{sizes.slots} slots of {sizes.prompt_pages} + {own_pages} pages of {page} tokens: a list of {most} "
            f"pages, of which the kernel can hold {_MOST_PAGES}; use fewer sampling.slots or sampling.attention='xla'"
        )

    def by_unit(x: jax.Array) -> jax.Array:
        return x.reshape(-1, near, *x.shape[1:])

    # Of prompts: by the first of the neighbours that decode one, what any of these sees.
    place, active, length = by_unit(slots.place), by_unit(slots.active), by_unit(slots.prompt_length)
    same = (place[:, :, None] == place[:, None]) & active[:, :, None] & active[:, None]  # [U, near, near]
    again = jnp.any(same & jnp.tril(jnp.ones((near, near), bool), -1), axis=-1)
    number = jnp.arange(sizes.prompt_pages)
    sees = jnp.broadcast_to(number * page < length[..., None], (*place.shape, sizes.prompt_pages))
    if window is not None:
        oldest = by_unit(slots.prompt_length + clock - slots.start) - window + 1
        sees &= (number + 1) * page > oldest[..., None]
    sees = jnp.any(same[..., None] & sees[:, None], axis=2) & ~again[..., None]
    prompt = place[..., None] * 2**16 + number

    first = slots.start if window is None else jnp.maximum(slots.start, clock - window + 1)
    written = (first // page)[:, None] + jnp.arange(own_pages)
    own = slots.active[:, None] & (written <= ((clock + steps - 1) // page)[:, None])
    where = -1 - (written % ring * 2**16 + jnp.arange(sizes.slots)[:, None])

    def of_unit(prompts: jax.Array, own: jax.Array) -> jax.Array:
        prompts = jnp.broadcast_to(prompts, sees.shape)
        return jnp.concatenate([x.reshape(len(place), -1) for x in (prompts, own)], axis=1)

    return Pages.listed(of_unit(sees, own), of_unit(prompt, where), of_unit(number * page, written * page), at_a_time)


def attend_in_pages(
    query: jax.Array,
    memory: Memory,
    layer: jax.Array | int,
    slots: Slots,
    pages: Pages,
    clock: jax.Array,
    sizes: Sizes,
    *,
    sinks: jax.Array | None = None,
    window: int | None,
    softcap: float | None,
    interpret: Any = False,
) -> jax.Array:
    """`attend_in_flight` on a TPU, over the pages of `pages_of`; same arguments and result otherwise.

    Heads are split over `tensor` where the ambient mesh has it.
    """
    attend = functools.partial(_attend, window=window, softcap=softcap, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    free = set(MESH_AXES).intersection(mesh.auto_axes)
    if not free:
        return attend(query, memory, jnp.int32(layer), slots, pages, clock, sinks)
    heads, caches, whole = (spec(mesh, axes) for axes in ((None, None, _HEADS, None), (None, None, None, _HEADS), ()))
    return jax.shard_map(
        attend,
        in_specs=(heads, caches, whole, whole, whole, whole, spec(mesh, (_HEADS,))),
        out_specs=heads,
        axis_names=free,
        check_vma=False,  # a Pallas kernel does not tell over which axes its results differ
    )(query, memory, jnp.int32(layer), slots, pages, clock, sinks)


_HEADS = "heads_activation"


def _attend(
    query: jax.Array,
    memory: Memory,
    layer: jax.Array,
    slots: Slots,
    pages: Pages,
    clock: jax.Array,
    sinks: jax.Array | None,
    *,
    window: int | None,
    softcap: float | None,
    interpret: Any,
) -> jax.Array:
    """The heads of one device."""
    count, queries, heads, head_dim = query.shape
    kv_heads = memory.own.key.shape[3]
    near = neighbours(count, queries * heads // kv_heads)
    by_slot = (count // near, near, queries, kv_heads, heads // kv_heads, head_dim)
    grouped = jnp.moveaxis((query * head_dim**-0.5).reshape(by_slot), 3, 1)
    now = clock[:, None] + jnp.arange(queries)
    since = 0 if window is None else now - window + 1

    def row(x: jax.Array | int) -> jax.Array:
        x = jnp.broadcast_to(jnp.asarray(x, jnp.int32), now.shape)
        return jnp.repeat(x.reshape(count // near, -1), heads // kv_heads, axis=1)

    length, start, active = (x[:, None] for x in (slots.prompt_length, slots.start, slots.active))
    rows = Rows(
        first=row(slots.place[:, None]),
        first_from=row(0 if window is None else since + length - start),
        first_to=row(jnp.where(active, length, 0)),
        second=row(jnp.arange(count)[:, None]),
        second_from=row(jnp.maximum(since, start)),
        second_to=row(jnp.where(active, now + 1, 0)),
    )
    mixed = attend_to_pages(
        grouped.reshape(count // near, kv_heads, -1, head_dim),
        rows,
        memory.prompts,
        memory.own,
        layer,
        pages,
        sinks=None if sinks is None else jnp.tile(sinks.reshape(kv_heads, -1), near * queries),
        softcap=softcap,
        interpret=interpret,
    )
    return jnp.moveaxis(mixed.reshape(*grouped.shape), 1, 3).reshape(query.shape)
