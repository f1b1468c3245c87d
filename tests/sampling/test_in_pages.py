"""Attention by the kernel that reads listed pages: which pages these are, and that it reads no others."""

from __future__ import annotations

import ast
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.kept import Kept
from jaxrl_llm.models.kernels.pages import NO_PAGE, attend_to_pages
from jaxrl_llm.sampling.attention import choose, slot_attention
from jaxrl_llm.sampling.caches import Memory, Sizes, Slots
from jaxrl_llm.sampling.in_pages import neighbours, pages_at_a_time, pages_of

REPOSITORY = Path(__file__).resolve().parents[2]


def drawn(rng: np.random.Generator, sizes: Sizes, longest: int) -> tuple[Slots, np.ndarray]:
    """Slots of prompts of any length that have clocks of their own, one of which is idle."""
    count, lengths = sizes.slots, rng.integers(1, sizes.prompt_pages * sizes.page + 1, sizes.places)
    place, clock = rng.integers(0, sizes.places, count), rng.integers(0, 3 * longest, count).astype(np.int32)
    slots = Slots(
        active=jnp.asarray(np.arange(count) != 1),
        place=jnp.asarray(place),
        prompt_length=jnp.asarray(lengths[place]),
        start=jnp.asarray(np.maximum(0, clock - rng.integers(0, longest, count)).astype(np.int32)),
    )
    return slots, clock


def seen(sizes: Sizes, slots: Slots, clock: np.ndarray, steps: int, window: int | None, slot: int) -> dict[Any, int]:
    """By a loop over tokens, the pages in which a slot sees something, and where they begin."""
    pages, length, start = {}, int(slots.prompt_length[slot]), int(slots.start[slot])
    for now in range(clock[slot], clock[slot] + steps):
        position = length + now - start
        for other in range(max(0, position - (window or 10**9) + 1), position + 1):
            if other < length:
                number = other // sizes.page
                pages["prompt", int(slots.place[slot]), number] = number * sizes.page
            else:
                number = (start + other - length) // sizes.page
                pages["own", number % sizes.ring(window), slot, number] = number * sizes.page
    return pages


@pytest.mark.parametrize(("near", "at_a_time", "steps"), [(1, 3, 3), (4, 2, 11), (8, 1, 1)])
@pytest.mark.parametrize("window", [None, 5, 21])
def test_pages_are_those_in_which_a_slot_sees_something(near, at_a_time, steps, window):
    """Each once for all neighbours; a unit that sees nothing has an empty step."""
    sizes = Sizes(page=4, block=2, alike=1, slots=8, places=3, prompt_pages=4, tokens=30, drafts=0)
    slots, clock = drawn(np.random.default_rng(0), sizes, 30 - steps)
    pages = jax.jit(lambda slots, clock: pages_of(sizes, slots, clock, steps, window, near=near, at_a_time=at_a_time))(
        slots, clock
    )
    count, unit = int(pages.count), np.asarray(pages.unit)
    assert (unit[count:] == 8 // near).all()
    listed: list[list[Any]] = [[] for _ in range(8 // near)]
    for step in range(count):
        for number in range(step * at_a_time, (step + 1) * at_a_time):
            at, begin = int(pages.place[number]), int(pages.begin[number])
            if begin == NO_PAGE:
                continue
            own, at = at < 0, at if at >= 0 else -1 - at
            where = ("own", at >> 16, at & 0xFFFF, begin // 4) if own else ("prompt", at >> 16, at & 0xFFFF)
            listed[unit[step]].append((where, begin))
    for group in range(8 // near):
        expected: dict[Any, int] = {}
        for slot in range(group * near, (group + 1) * near):
            expected |= seen(sizes, slots, clock, steps, window, slot) if slots.active[slot] else {}
        assert len(listed[group]) == len(expected)
        assert dict(listed[group]) == expected
    assert count == sum(max(1, -(-len(group) // at_a_time)) for group in listed)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_no_other_page_is_read(dtype: str):
    """They hold no numbers, or scales that are none; heads of 64, whose values are read turned around.

    A sink takes its share of what is seen, also of a slot that sees nothing.
    """
    rng, window = np.random.default_rng(1), 300
    sizes = Sizes(page=128, block=1, alike=1, slots=4, places=2, prompt_pages=3, tokens=500, drafts=0)
    slots, clock = drawn(rng, sizes, 490)
    value = jax.ShapeDtypeStruct((1, 64), jnp.dtype(dtype))

    def some(x: jax.Array) -> np.ndarray:
        if x.dtype == jnp.int8:
            return rng.integers(-127, 128, x.shape).astype(np.int8)
        return rng.normal(scale=0.01 if dtype == "int8" else 1, size=x.shape).astype(np.float32)

    memory = jax.tree.map(some, Memory.empty(sizes, 2, window, value))
    query = jnp.asarray(rng.normal(size=(4, 1, 2, 64)), jnp.float32)
    sinks = jnp.array([1.0, 4.0]) if dtype == "float32" else None
    read: dict[Any, int] = {}
    for slot in np.flatnonzero(slots.active):
        read |= seen(sizes, slots, clock, 1, window, int(slot))

    def poisoned(x: np.ndarray, kind: str) -> jax.Array:
        mask = np.zeros(x.shape[:3], bool)
        for where in read:
            if where[0] == kind:
                mask[1, where[1], where[2]] = True
        assert 0 < mask[1].mean() < 1
        if x.dtype == np.int8:
            return jnp.asarray(x)
        return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 3)), x, jnp.nan)

    def attend(implementation: Any, memory: Memory) -> np.ndarray:
        attention = slot_attention(implementation, 128, value, heads=2)
        return np.asarray(
            jax.jit(
                lambda memory, slots, clock: attention.attend(
                    query,
                    memory,
                    1,
                    slots,
                    attention.walk(sizes, slots, clock, 1, window),
                    clock,
                    sizes,
                    sinks=sinks,
                    window=window,
                    softcap=None,
                )
            )(memory, slots, clock)
        )

    sparse = Memory(
        *(
            jax.tree.map(functools.partial(poisoned, kind=kind), part)
            for part, kind in zip(memory, ("prompt", "own"), strict=True)
        )
    )
    found = attend("pallas_interpret", sparse)
    assert (found[1] == 0).all()
    active = np.asarray(slots.active)
    np.testing.assert_allclose(found[active], attend("xla", memory)[active], atol=2e-6)


def test_units_and_steps():
    assert [neighbours(slots, 2) for slots in (1, 6, 32, 31, 256)] == [1, 6, 16, 1, 16]
    assert neighbours(8, 64) == 1
    assert [pages_at_a_time(size) for size in (2**12, 2**17, 2**18, 2**20)] == [8, 4, 2, 1]


def test_what_cannot_be_read_is_refused():
    assert choose("auto", 128) == "xla"
    assert choose("pallas_interpret", 8) == "pallas_interpret"
    with pytest.raises(ValueError, match=r"sampling\.attention='pallas' .* on cpu with pages of 128"):
        choose("pallas", 128)
    sizes = Sizes(page=128, block=8, alike=8, slots=1024, places=32, prompt_pages=8, tokens=32_768, drafts=0)
    slots, clock = Slots(*[jnp.zeros(1024, jnp.int32)] * 4), jnp.zeros(1024, jnp.int32)
    with pytest.raises(ValueError, match=r"1024 slots of 8 \+ 258 pages of 128 tokens: .* fewer sampling\.slots"):
        pages_of(sizes, slots, clock, 8, None, near=8, at_a_time=8)
    pages: Any = None
    empty = Kept(jnp.zeros((1, 1, 1, 1, 8, 96)), jnp.zeros((1, 1, 1, 1, 96, 8)))
    with pytest.raises(ValueError, match="pages of 96 tokens"):
        attend_to_pages(jnp.zeros((1, 1, 8, 8)), pages, empty, empty, 0, pages)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, TPUs' compiler, is not installed")
@pytest.mark.parametrize("generation", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_without_a_copy_of_the_caches(generation: str):
    """Of 32 slots' keys and values, 136 MiB in each of two layers, for heads of all sizes and both types."""
    line = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import jax, jax.numpy as jnp
        from jaxrl_llm.launch.plan.slices import slice_devices
        from jax.sharding import AxisType
        from jaxrl_llm.sampling.attention import slot_attention
        from jaxrl_llm.sampling.caches import Memory, Sizes, Slots
        mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=slice_devices(sys.argv[2])[:1])
        sizes = Sizes(page=128, block=1, alike=1, slots=32, places=32, prompt_pages=8, tokens=1024, drafts=0)

        def temporaries(kv_heads, heads, size, queries, dtype="bfloat16", cache=None, sinks=None, **ways):
            window = ways.setdefault("window", None)
            array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
            value, dtype = array(kv_heads, size, dtype=jnp.dtype(cache or dtype)), jnp.dtype(dtype)
            memory = jax.eval_shape(lambda: Memory.empty(sizes, 2, window, value))
            def layers(query, token, memory, slots, clock):
                attention = slot_attention("auto", 128, value, heads, queries=queries)
                pages = attention.walk(sizes, slots, clock, 8, window)
                def layer(carry, number):
                    query, memory = carry
                    memory = memory.with_tokens(number, token, token, clock[0])
                    return (attention.attend(query, memory, number, slots, pages, clock, sizes, sinks=sinks,
                                             **{"softcap": None, **ways}), memory), None
                return jax.lax.scan(layer, (query, memory), jnp.arange(2))[0]
            query = array(32, queries, heads, size, dtype=dtype)
            slots = Slots(array(32, dtype=jnp.bool_), array(32), array(32), array(32))
            with jax.set_mesh(mesh):
                lowered = jax.jit(layers, donate_argnums=2).lower(
                    query, array(32, kv_heads, size, dtype=dtype), memory, slots, array(32))
            assert "attend_to_pages" in lowered.as_text()
            return lowered.compile().memory_analysis().temp_size_in_bytes

        print([
            temporaries(4, 8, 128, 1),
            temporaries(8, 16, 64, 1),
            temporaries(2, 16, 64, 1, window=128, sinks=jnp.arange(16.0)),
            temporaries(2, 4, 256, 3, window=300, softcap=50.0),
            temporaries(2, 4, 128, 1, dtype="float32"),
            temporaries(2, 4, 128, 1, dtype="float32", cache="bfloat16"),
            temporaries(8, 16, 128, 1, cache="int8"),
            temporaries(4, 8, 64, 3, cache="int8", window=300),
        ])
    """
    command = [sys.executable, "-c", line, str(REPOSITORY / "tpu_scripts"), generation]
    told = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stderr
    assert max(ast.literal_eval(told.stdout)) < 32 * 2**20
