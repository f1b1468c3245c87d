"""Block-sparse attention for TPUs against the dense reference, interpreted on CPU devices and compiled for slices."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.models.attention import ATTENTION, Visibility, dense_attention
from jaxrl_llm.models.kernels.live_blocks import live_blocks, walk
from jaxrl_llm.models.kernels.seam import choose
from jaxrl_llm.models.kernels.sharded import over_mesh
from jaxrl_llm.models.kernels.splash import splash_attention

interpreted = functools.partial(splash_attention, interpret=True)


# ---- Layouts of rows -------------------------------------------------------------------------------------


def lay(*trees: Any) -> tuple[list[int], list[int]]:
    """Depth and end of trees one after another: a tree is (tokens, subtree, …), a leaf its number of tokens."""
    depth: list[int] = []
    end: list[int] = []

    def grow(tree: Any, above: int) -> None:
        tokens, *branches = tree if isinstance(tree, tuple) else (tree,)
        start = len(end)
        depth.extend(range(above, above + tokens))
        end.extend([0] * tokens)
        for branch in branches:
            grow(branch, above + tokens)
        end[start : start + tokens] = [len(end)] * tokens

    for tree in trees:
        grow(tree, 0)
    return depth, end


def visibility(length: int, *rows: tuple) -> Visibility:
    """Rows of trees, filled up with padding."""
    laid = [lay(*row, *[1] * (length - len(lay(*row)[0]))) for row in rows]
    depth, end = (jnp.asarray([row[part] for row in laid], jnp.int32) for part in (0, 1))
    return Visibility.of_rows(depth, end)


RAGGED = ((70, 50, 3, 90), (5, 120), (40,))  # prompts with completions
DEEP = ((60, (30, (20, 5, 9), 33), (80, 4, (1, 2, 3))), 25)
PACKED = (100, 1, 90, 50)


def arrays(visible: Visibility, heads: int, kv_heads: int, size: int, dtype: Any) -> list[jax.Array]:
    rng, (rows, length) = np.random.default_rng(0), visible.end.shape
    counts = (heads, kv_heads, kv_heads, heads)
    return [jnp.asarray(rng.normal(size=(rows, length, count, size)), dtype) for count in counts]


def with_gradient(attention: Callable[..., jax.Array], **settings: Any) -> Callable[..., Any]:
    @jax.jit
    def run(query, key, value, d_out, visible):
        out, pull = jax.vjp(lambda *x: attention(*x, visible, **settings), query, key, value)
        return out, *pull(d_out)

    return run


def assert_near(found: Any, wanted: Any, tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=0, atol=tolerance)


# ---- Equal to the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "rows", "heads", "kv_heads", "size", "settings"),
    [
        pytest.param(384, (RAGGED, DEEP), 4, 2, 64, {}, id="ragged and deep trees"),
        pytest.param(
            300, (DEEP, PACKED), 4, 1, 128, {"window": 40, "softcap": 5.0}, id="window, soft-cap, half a block"
        ),
        pytest.param(256, (RAGGED[:1],), 2, 2, 256, {"softcap": 2.0}, id="heads of 256"),
    ],
)
def test_equal_to_dense_attention(length, rows, heads, kv_heads, size, settings):
    visible = visibility(length, *rows)
    given = arrays(visible, heads, kv_heads, size, jnp.float32)
    found = with_gradient(interpreted, **settings)(*given, visible)
    assert_near(found, with_gradient(dense_attention, **settings)(*given, visible), 2e-5)


def test_bfloat16_is_as_near_to_float32_as_dense_attention_is():
    visible = visibility(384, RAGGED[:2])
    given = arrays(visible, 4, 2, 64, jnp.bfloat16)
    exact = with_gradient(dense_attention)(*(x.astype(jnp.float32) for x in given), visible)

    def errors(attention) -> list[float]:
        found = with_gradient(attention)(*given, visible)
        assert all(x.dtype == jnp.bfloat16 for x in found)
        return [float(jnp.sqrt(jnp.mean((x - y) ** 2))) for x, y in zip(found, exact, strict=True)]

    for ours, theirs in zip(errors(interpreted), errors(dense_attention), strict=True):
        assert ours < 1.1 * theirs


def test_queries_may_be_a_part_of_the_row_in_any_order():
    """As under context parallelism: blocks of keys that no query sees have a gradient of 0."""
    whole = visibility(512, (*DEEP, *PACKED[:3]))
    part = jnp.asarray([*range(200, 100, -1), *range(30)])
    visible = whole._replace(place=whole.place[:, part], depth=whole.depth[:, part])
    query, key, value, d_out = arrays(whole, 2, 1, 64, jnp.float32)
    given = query[:, part], key, value, d_out[:, part]
    found = with_gradient(interpreted, window=50)(*given, visible)
    assert_near(found, with_gradient(dense_attention, window=50)(*given, visible), 2e-5)
    assert not found[2][:, 384:].any()


def test_one_compilation_serves_all_lengths():
    run = jax.jit(chex.assert_max_traces(with_gradient(interpreted).__wrapped__, n=1))
    for row in (RAGGED, PACKED, DEEP):
        visible = visibility(384, row)
        run(*arrays(visible, 2, 1, 64, jnp.float32), visible)


# ---- Blocks ----------------------------------------------------------------------------------------------


def test_elsewhere_than_on_a_tpu_the_setting_is_named():
    with pytest.raises(ValueError, match=r"model\.attention='splash' .* on cpu: choose auto, or blockwise"):
        choose("splash", 4096)


@pytest.mark.parametrize("window", [None, 20])
def test_live_blocks_are_those_in_which_somebody_sees_somebody(window):
    visible = visibility(384, RAGGED, DEEP, PACKED)
    blocks = visible.mask(window).reshape(3, 24, 16, 48, 8).any(axis=(2, 4))
    live = live_blocks(visible, (16, 8), window)
    assert not (blocks & ~live).any()
    if window is None:
        assert (live == blocks).all()
    assert live.mean() < 0.5


def test_walk_names_each_live_pair_once_and_each_outer_block():
    live = np.random.default_rng(0).random((2, 5, 7)) < 0.5
    live[1, 3] = False
    outer, inner, count = walk(jnp.asarray(live))
    pairs = list(zip(outer[:count].tolist(), inner[:count].tolist(), strict=True))
    wanted = [(row * 5 + i, row * 7 + j) for row, i, j in zip(*np.nonzero(live), strict=True)]
    assert pairs == sorted([*wanted, (8, 7)])
    assert outer[count] == 10  # so that the last block ends


def test_rows_whose_list_of_blocks_does_not_fit_are_refused():
    long = jax.ShapeDtypeStruct((1, 262_144, 2, 128), jnp.bfloat16)
    places = Visibility(*[jax.ShapeDtypeStruct((1, 262_144), jnp.int32)] * 5)
    with pytest.raises(ValueError, match=r"1 rows of 262144 .* 262144 pairs of blocks of 512 × 512.*mesh\.context"):
        jax.eval_shape(splash_attention, long, long, long, places)


# ---- On a mesh, and inside a scanned, rematerialised stack -------------------------------------------------


def test_rows_and_heads_split_over_devices(mesh: Mesh):
    visible = visibility(256, *(RAGGED[:1], PACKED, DEEP[:1], (3,)))
    given = arrays(visible, 4, 2, 64, jnp.float32)
    wanted = with_gradient(dense_attention, window=60)(*given, visible)
    with jax.set_mesh(mesh):
        laid = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
        found = with_gradient(functools.partial(over_mesh, interpreted), window=60)(
            *jax.device_put(given, laid), visible
        )
    assert found[0].sharding.is_equivalent_to(laid, 4)
    assert_near(found, wanted, 2e-5)


def test_inside_a_shard_map_over_rows_only_heads_are_split(mesh: Mesh):
    visible = visibility(128, *[(60, 20)] * 4)
    query, key, value, _ = arrays(visible, 4, 2, 64, jnp.float32)
    rows = PartitionSpec(("data", "fsdp"))
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            functools.partial(over_mesh, interpreted),
            in_specs=rows,
            out_specs=rows,
            axis_names={"data", "fsdp"},
            check_vma=False,
        )
        found = jax.jit(run)(query, key, value, visible)
    assert_near([found], [dense_attention(query, key, value, visible)], 2e-5)


def test_second_derivatives_on_a_mesh_equal_those_of_dense_attention(mesh: Mesh):
    """J v by transposing the pull function, and the gradient of a gradient times v: what TRPO asks for."""
    visible = visibility(128, *[DEEP[0][1:2], (60, 20)] * 2)
    *given, weights = arrays(visible, 4, 2, 64, jnp.float32)
    vector = tuple(x[::-1] for x in given)

    def both(attention: Callable[..., jax.Array]) -> Any:
        def attend(*x: jax.Array) -> jax.Array:
            return attention(*x, visible, window=30, softcap=2.0)

        out, pull = jax.vjp(attend, *given)
        gradient = jax.grad(lambda x: jnp.sum(weights * jnp.sin(attend(*x))))
        curved = jax.vjp(gradient, tuple(given))[1](vector)[0]
        return jax.linear_transpose(pull, out)(vector)[0], *curved

    wanted = jax.jit(functools.partial(both, dense_attention))()
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(both, functools.partial(over_mesh, interpreted)))()
    assert_near(found, wanted, 5e-5)


def test_heads_that_a_mesh_does_not_divide_are_refused(mesh: Mesh):
    visible = visibility(8, *[(8,)] * 4)
    query, key, value, _ = arrays(visible, 2, 1, 64, jnp.float32)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"key .* 1 heads .* mesh.tensor"):
        over_mesh(dense_attention, query, key, value, visible)


@pytest.mark.parametrize("kept", [ATTENTION, "nothing"])
def test_a_scanned_stack_that_keeps_attention_does_not_repeat_its_forward_pass(mesh: Mesh, kept: str):
    visible = visibility(128, *[(60, 20)] * 4)
    query, key, value, d_out = arrays(visible, 2, 2, 64, jnp.float32)
    keep = jax.checkpoint_policies.save_only_these_names(kept)

    def loss(attention, scales):
        def layer(x, scale):
            return jnp.tanh(attention(x * scale, key, value, visible)), None

        out, _ = jax.lax.scan(jax.checkpoint(layer, policy=keep), query, scales)
        return jnp.sum(out * d_out)

    scales = jnp.asarray([1.0, 0.7])
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(functools.partial(loss, functools.partial(over_mesh, interpreted))))
        compiled = gradient.lower(scales).compile()
        found = compiled(scales)
    np.testing.assert_allclose(found, jax.grad(functools.partial(loss, dense_attention))(scales), rtol=2e-5)
    repeated = re.search(r'op_name="[^"]*rematted_computation[^"]*splash_forward', compiled.as_text())
    assert (repeated is None) == (kept == ATTENTION)
