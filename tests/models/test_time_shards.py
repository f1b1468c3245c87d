"""Rows whose time is split over devices: where tokens lie, that devices have as much to do, and attention on them."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.packing import pack
from jaxrl_llm.models.attention import Visibility, dense_attention
from jaxrl_llm.models.kernels.live_blocks import live_blocks
from jaxrl_llm.models.kernels.seam import attention
from jaxrl_llm.models.rows import Layout, PackedLayout, PaddedLayout
from jaxrl_llm.models.time_shards import dealt_order
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh
from tests.models.trees import Row, lay_out, random_trees, visibility


@pytest.mark.parametrize("tokens", [1, 23, 4096, 9216, 66_560])
@pytest.mark.parametrize("shards", [2, 8, 16])
def test_each_place_is_dealt_once(tokens, shards):
    order = dealt_order(tokens, shards)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))
    assert len(order) % shards == 0
    assert tokens <= len(order) <= max(tokens + tokens // 16, -(-tokens // (2 * shards)) * 2 * shards)


def test_a_row_of_two_rounds_is_the_zigzag():
    """Device c of 4 has chunks c and 7 − c."""
    chunks = dealt_order(8 * 512, 4).reshape(4, 2, 512)
    np.testing.assert_array_equal(chunks[:, :, 0], 512 * np.array([[0, 7], [1, 6], [2, 5], [3, 4]]))
    assert (np.diff(chunks, axis=2) == 1).all()


LONG, SHARDS, BLOCK = 32_768, 8, 512


def packed_row(seed: int) -> Row:
    """Prompts of 300 tokens, each with four completions of lengths that differ much."""
    rng, roots, used = np.random.default_rng(seed), [], 0
    while True:
        lengths = np.clip(rng.lognormal(6.5, 1, 4), 1, 8192).astype(int)
        used += 300 + lengths.sum()
        if used > LONG:
            return lay_out(roots, LONG)
        roots.append((300, [(int(length), []) for length in lengths]))


ROWS = {"one long completion": lay_out([(1024, [(LONG - 1024, [])])], LONG), "packed": packed_row(0)}


def live_on_devices(row: Row, order: np.ndarray) -> np.ndarray:
    """Pairs of blocks that each device computes of a row whose places it holds in this order."""
    depth, end, place = (jnp.asarray(x)[None] for x in (row.depth[order], row.end[order], order))
    visible = Visibility.of_rows(depth, end, place)
    return np.asarray(live_blocks(visible, (BLOCK, BLOCK), None)).reshape(SHARDS, -1).sum(axis=1)


@pytest.mark.parametrize(("name", "most"), [("one long completion", 1.1), ("packed", 1.2)])
def test_devices_have_as_much_to_attend_to(name, most):
    straight, dealt = (live_on_devices(ROWS[name], x) for x in (np.arange(LONG), dealt_order(LONG, SHARDS)))
    assert dealt.sum() == straight.sum()  # no block spans two chunks
    assert dealt.max() <= most * dealt.mean()
    assert straight.max() > 1.3 * straight.mean()


# ---- Layouts ---------------------------------------------------------------------------------------


def layouts() -> dict[str, Layout]:
    rng = np.random.default_rng(0)
    prompt, completion = rng.integers(1, 64, (4, 5)), rng.integers(1, 64, (4, 3, 6))
    prompt_lengths, lengths = rng.integers(1, 6, 4), rng.integers(0, 7, (4, 3))
    arrays = [jnp.asarray(x) for x in (prompt, prompt_lengths, completion, lengths)]
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (2, 23)), axis=1))
    return {
        "padded": PaddedLayout.of(*arrays[:3]),
        "packed": pack(*arrays, tokens=23).layout(jnp.int32(1)),
        "segments": PackedLayout.of_segments(jnp.asarray(rng.integers(1, 64, (2, 23))), segments),
    }


@pytest.mark.parametrize("name", ["padded", "packed", "segments"])
def test_a_dealt_layout_means_the_same(name):
    plain = layouts()[name]
    rows, tokens = plain.rows, plain.rows.tokens.shape[1]
    order = dealt_order(tokens, 4)
    dealt = plain.dealt(order)
    assert len(order) > tokens or name == "padded"

    def laid(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, ((0, 0), (0, len(order) - tokens), *((0, 0),) * (x.ndim - 2)), constant_values=7)
        return filled[:, order]

    np.testing.assert_array_equal(dealt.rows.place, np.tile(order, (len(rows.tokens), 1)))
    back = np.argsort(order)[:tokens]
    for field in ("tokens", "depth", "end"):
        np.testing.assert_array_equal(getattr(dealt.rows, field)[:, back], getattr(rows, field))
    assert (np.asarray(dealt.rows.end) > order).all()

    states = jax.random.normal(jax.random.key(0), (*rows.tokens.shape, 4))
    known = slice(1, None) if name == "segments" else slice(None)  # nothing precedes the first token of a row
    for read in ("before", "at"):
        made, expected = (x.unpack(getattr(x, read)(y)) for x, y in ((dealt, laid(states)), (plain, states)))
        np.testing.assert_array_equal(made[:, :, known], expected[:, :, known])
    np.testing.assert_array_equal(dealt.unpack(dealt.targets), plain.unpack(plain.targets))
    scores = plain.unpack(plain.at(states))
    np.testing.assert_array_equal(dealt.unpack(dealt.pack(scores)), scores)


# ---- On devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["blockwise", "splash_interpret", "dense"])
def test_attention_of_rows_on_eight_devices(implementation):
    """With the gradient of keys and values, which all devices of a row have a part in."""
    rows, length, rng = [random_trees(seed, 64) for seed in range(2)], 64, np.random.default_rng(0)
    query, key, value, gradient = (jnp.asarray(rng.normal(size=(2, length, n, 16)), jnp.float32) for n in (4, 2, 2, 4))
    options, order = {"window": 20, "softcap": 2.0}, dealt_order(length, 4)

    def both(attend: Any, inputs: tuple[jax.Array, ...], visible: Visibility) -> Any:
        output, pull = jax.vjp(lambda *x: attend(*x, visible, **options), *inputs[:3])
        return output, pull(inputs[3])

    expected = jax.jit(lambda *x: both(dense_attention, x, visibility(*rows)))(query, key, value, gradient)
    whole = visibility(*rows)
    visible = Visibility(*(x[:, order] for x in whole))
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, context=4))):
        ours = jax.jit(lambda *x: both(lambda *y, **z: attention(*y, implementation=implementation, **z), x, visible))(
            *(x[:, order] for x in (query, key, value, gradient))
        )
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[:, np.argsort(order)], ours), expected, rtol=0, atol=2e-5)


def test_rows_in_their_order_are_dealt_and_put_back(tiny_config, lively_params):
    """Also those that no layout was made of, and whose length devices do not divide."""
    model = Transformer(tiny_config(attention="blockwise", sliding_windows=(None, 4)))
    params, tokens = lively_params(model), jax.random.randint(jax.random.key(0), (2, 21), 0, 64)
    expected = jax.jit(lambda *x: model.causal(*x, collect=True))(params, tokens)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, context=4))):
        ours = jax.jit(lambda *x: model.causal(*x, collect=True))(params, tokens)
    chex.assert_trees_all_close(ours, expected, rtol=0, atol=1e-5)
