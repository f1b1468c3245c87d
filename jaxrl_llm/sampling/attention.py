"""Which attention slots decode with: one signature, several implementations, chosen by platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models.kernels.pages import LANES, NO_PAGE
from jaxrl_llm.sampling.caches import Sizes, bytes_of
from jaxrl_llm.sampling.in_blocks import Walk, attend_in_flight
from jaxrl_llm.sampling.in_pages import attend_in_pages, neighbours, pages_at_a_time, pages_of
from jaxrl_llm.sampling.logits import SlotAttention
from jaxrl_llm.sharding import head_shards, platform


class Attention(NamedTuple):
    """What is read, and the reading."""

    walk: Callable[..., Any]
    """Sizes, slots, clock, steps, window → the pages that the next steps read; as `Walk.of`."""
    attend: Callable[..., jax.Array]
    """As `attend_in_flight`, with such pages."""


def choose(implementation: SlotAttention, page: int) -> SlotAttention:
    """What `auto` stands for with pages of so many tokens, on what is traced for; others stand for themselves.

    Raises:
        ValueError: a kernel for TPUs, and that is something else, or the pages are too short.
    """
    possible = platform() == "tpu" and page % LANES == 0
    if implementation == "pallas" and not possible:
        raise ValueError(
            f"sampling.attention='pallas' is a kernel for TPUs that reads pages of {LANES} tokens, and this is to run "
            f"on {platform()} with pages of {page}: choose auto, or xla; pallas_interpret is the kernel as plain JAX, "
            "slowly"
        )
    if implementation != "auto":
        return implementation
    return "pallas" if possible else "xla"


def slot_attention(
    implementation: SlotAttention, page: int, value: jax.ShapeDtypeStruct, heads: int, *, queries: int = 1
) -> Attention:
    """The attention of slots.

    Args:
        implementation: which.
        page: B.
        value: of a token in one layer, `[K, H]`, as it is kept.
        heads: N.
        queries: Q, tokens of a slot at once.

    Raises:
        ValueError: as `choose`.
    """
    chosen = choose(implementation, page)
    if chosen == "xla":
        return Attention(Walk.of, attend_in_flight)
    rows = queries * heads // value.shape[0]
    at_a_time = pages_at_a_time(page * bytes_of(value) // head_shards())

    def walk(sizes: Any, *rest: Any) -> Any:
        return pages_of(sizes, *rest, near=neighbours(sizes.slots, rows), at_a_time=at_a_time)

    return Attention(walk, functools.partial(attend_in_pages, interpret=chosen == "pallas_interpret"))


def pages_read(walk: Any, sizes: Sizes) -> jax.Array:
    """How many pages of keys and values, of one slot or one prompt each, an attention reads that is given this walk."""
    if isinstance(walk, Walk):
        return walk.prompt_count * (sizes.block // sizes.alike) + walk.own_count * sizes.block
    return jnp.sum(walk.begin != NO_PAGE)
