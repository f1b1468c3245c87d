"""Attention in blocks against the dense one: outputs, gradients, what is differentiated twice, and what it costs."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.attention import ATTENTION, Visibility, dense_attention
from jaxrl_llm.models.kernels.blocks import Blocks
from jaxrl_llm.models.kernels.blockwise import blockwise_attention
from jaxrl_llm.models.kernels.sharded import over_mesh
from jaxrl_llm.sharding import MeshConfig, make_mesh
from tests.models.trees import Row, lay_out, random_trees, visibility

LENGTH = 27  # of every row here, which a block of 8 does not divide


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def make_inputs(
    heads: tuple[int, int] = (6, 2), head_dim: int = 16, length: int = LENGTH, dtype: Any = jnp.float32
) -> tuple[jax.Array, ...]:
    """Query, key, value and the output's gradient of two rows."""
    n, k = heads
    return tuple(normal(i, 2, length, h, head_dim, dtype=dtype) for i, h in enumerate((n, k, k, n)))


@functools.cache
def outputs_and_gradients(implementation: Any, **options: Any) -> Any:
    """Output, and gradients of query, key and value."""

    @jax.jit
    def both(query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array, visible: Visibility) -> Any:
        output, pull = jax.vjp(lambda *x: implementation(*x, visible, **options), query, key, value)
        return output, pull(gradient)

    return both


ROWS = {
    "causal": (lay_out([(27, [])], LENGTH), lay_out([(27, [])], LENGTH)),
    "right-padded": (lay_out([(1, [])], LENGTH), lay_out([(18, [])], LENGTH)),
    "packed": (lay_out([(n, []) for n in (5, 1, 9, 8, 4)], LENGTH), lay_out([(n, []) for n in (16, 8, 2)], LENGTH)),
    "completions": (
        lay_out([(7, [(3, []), (9, []), (1, [])]), (2, [(4, [])])], LENGTH),
        lay_out([(1, [(20, []), (5, [])])], LENGTH),
    ),
    "trees": (random_trees(0, LENGTH), random_trees(1, LENGTH)),
}


def assert_equal(inputs: tuple[jax.Array, ...], visible: Visibility, *, block_size: int | None = 8, **options: Any):
    expected = outputs_and_gradients(dense_attention, **options)(*inputs, visible)
    ours = outputs_and_gradients(blockwise_attention, block_size=block_size, **options)(*inputs, visible)
    chex.assert_tree_all_finite(ours)
    chex.assert_trees_all_close(ours, expected, rtol=1e-7, atol=2e-5)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_trees_show_what_is_above(seed):
    row = random_trees(seed, 40)
    assert len(np.unique(row.parent, return_counts=True)[1]) < 39  # some token has several children
    np.testing.assert_array_equal(visibility(row).mask(None)[0], row.ancestry())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 0.7}], ids=["plain", "window-softcap"])
def test_equals_dense(rows, options):
    assert_equal(make_inputs(), visibility(*ROWS[rows]), **options)


@pytest.mark.parametrize("block_size", [1, 5, 27, 64, None])
def test_any_block_size(block_size):
    assert_equal(make_inputs(), visibility(*ROWS["trees"]), block_size=block_size)


def test_a_block_size_is_positive():
    query, key, value, _ = make_inputs()
    with pytest.raises(ValueError, match="block_size must be at least 1 token, got 0"):
        blockwise_attention(query, key, value, visibility(*ROWS["trees"]), block_size=0)


@pytest.mark.parametrize("window", [1, 8, 1000])
def test_windows(window):
    assert_equal(make_inputs(), visibility(*ROWS["trees"]), window=window)


@pytest.mark.parametrize(("heads", "head_dim"), [((3, 1), 64), ((4, 4), 128), ((2, 1), 256)])
def test_heads(heads, head_dim):
    assert_equal(make_inputs(heads, head_dim), visibility(*ROWS["completions"]))


def test_bfloat16():
    """As near to float32 as the dense one in bfloat16 is, whose weights, too, are rounded."""
    narrow, visible = make_inputs(dtype=jnp.bfloat16), visibility(*ROWS["trees"])
    wide = tuple(x.astype(jnp.float32) for x in narrow)
    expected = outputs_and_gradients(dense_attention)(*wide, visible)
    ours = outputs_and_gradients(blockwise_attention, block_size=8)(*narrow, visible)
    dense = outputs_and_gradients(dense_attention)(*narrow, visible)
    chex.assert_trees_all_equal_dtypes(ours, dense)

    def errors(results: Any) -> list[float]:
        return [
            float(jnp.max(jnp.abs(x.astype(jnp.float32) - y)))
            for x, y in zip(*map(jax.tree.leaves, (results, expected)), strict=True)
        ]

    assert all(error <= max(2 * other, 0.02) for error, other in zip(errors(ours), errors(dense), strict=True))


def test_queries_may_be_parts_of_the_rows():
    """Two chunks of four, the first and the last, as of a device among two; the keys in an order of their own."""
    query, key, value, gradient = make_inputs()
    whole = visibility(*ROWS["trees"])
    mine, order = np.r_[0:7, 20:27], np.r_[7:20, 0:7, 20:27]
    part = Visibility(*[x[:, mine] for x in whole[:2]] + [x[:, order] for x in whole[2:]])
    for block_size in (7, 8):
        assert_equal((query[:, mine], key[:, order], value[:, order], gradient[:, mine]), part, block_size=block_size)


def test_one_program_for_all_rows():
    both = jax.jit(chex.assert_max_traces(outputs_and_gradients(blockwise_attention, block_size=4).__wrapped__, n=1))
    for rows in ROWS.values():
        both(*make_inputs(), visibility(*rows))


def test_padding_reaches_nobody():
    """What pads hold, be it NaN, has no part in other tokens' outputs, nor in gradients of a loss that masks them."""
    inputs, visible = make_inputs(), visibility(*ROWS["right-padded"])
    real = jnp.asarray(np.stack([row.is_real for row in ROWS["right-padded"]]))[..., None, None]
    masked = [jnp.where(real, x, 0) for x in inputs]
    both = outputs_and_gradients(blockwise_attention, block_size=8)
    expected = both(*masked, visible)
    for content in (np.nan, np.inf):
        output, gradients = both(*(jnp.where(real, x, content) for x in masked[:3]), masked[3], visible)
        np.testing.assert_array_equal(jnp.where(real, output, 0), jnp.where(real, expected[0], 0))
        chex.assert_trees_all_equal(gradients, expected[1])


def test_what_is_seen_is_not_hidden():
    """A NaN in a value makes NaN of those outputs, and no others, that it has a part in."""
    query, key, value, gradient = make_inputs()
    visible = visibility(*ROWS["completions"])
    bad = 8  # a token of the first completion
    output, _ = outputs_and_gradients(blockwise_attention, block_size=8)(
        query, key, value.at[0, bad, 1, 3].set(jnp.nan), gradient, visible
    )
    np.testing.assert_array_equal(
        jnp.isnan(output).any(axis=(2, 3)), visible.mask(None)[:, :, bad] & np.array([[True], [False]])
    )


def test_a_query_without_any_key_gives_nothing():
    inputs, visible = make_inputs(), visibility(*ROWS["causal"])
    lonely = visible._replace(end=jnp.minimum(visible.end, 20))
    output, gradients = outputs_and_gradients(blockwise_attention, block_size=8)(*inputs, lonely)
    assert not np.any(output[:, 20:]) and np.all(np.any(output[:, :20], axis=(2, 3)))
    chex.assert_tree_all_finite((output, gradients))
    assert not np.any(gradients[0][:, 20:])


@functools.cache
def derivatives(implementation: Any, **options: Any) -> Any:
    """J v by transposing the pull function, and the gradient of a gradient times v."""

    @jax.jit
    def both(inputs: tuple[jax.Array, ...], vector: tuple[jax.Array, ...], visible: Visibility) -> Any:
        *arguments, weights = inputs

        def attend(*inputs: jax.Array) -> jax.Array:
            return implementation(*inputs, visible, **options)

        output, pull = jax.vjp(attend, *arguments)
        pushed = jax.linear_transpose(pull, output)(vector)[0]
        gradient = jax.grad(lambda x: jnp.sum(weights * jnp.sin(attend(*x))))
        return pushed, jax.vjp(gradient, tuple(arguments))[1](vector)[0]

    return both


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 0.7}], ids=["plain", "window-softcap"])
def test_second_derivatives_equal_those_of_dense(options):
    inputs, visible = make_inputs(), visibility(*ROWS["trees"])
    vector = tuple(x[::-1] for x in inputs[:3])
    ours = derivatives(blockwise_attention, block_size=8, **options)(inputs, vector, visible)
    chex.assert_trees_all_close(ours, derivatives(dense_attention, **options)(inputs, vector, visible), atol=5e-5)


def test_derivatives_in_some_of_the_inputs():
    """What the keys do not depend on: their tangents are no part of what is transposed."""
    inputs, visible = make_inputs(), visibility(*ROWS["trees"])

    def product(implementation: Any, **options: Any) -> Any:
        def loss(query: jax.Array) -> jax.Array:
            return jnp.sum(inputs[3] * jnp.sin(implementation(query, *inputs[1:3], visible, **options)))

        gradient = jax.grad(loss)
        return jax.jit(lambda query, vector: jax.vjp(gradient, query)[1](vector)[0])(inputs[0], inputs[0][::-1])

    ours, expected = product(blockwise_attention, block_size=8), product(dense_attention)
    chex.assert_trees_all_close(ours, expected, atol=5e-5)


def primitives(jaxpr: Any, name: str) -> int:
    """How often a primitive occurs in a program, the bodies of loops and calls included."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == name
        bodies = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        count += sum(
            primitives(getattr(x, "jaxpr", x), name) for x in bodies if hasattr(getattr(x, "jaxpr", x), "eqns")
        )
    return count


def layers(inputs: tuple[jax.Array, ...], visible: Visibility, policy: Any) -> jax.Array:
    """Two layers of attention, scanned, what a gradient needs of them made again."""

    def layer(query: jax.Array, scale: jax.Array) -> tuple[jax.Array, None]:
        return jnp.sin(blockwise_attention(query * scale, inputs[1], inputs[2], visible, block_size=8)) + query, None

    return jnp.sum(inputs[3] * jax.lax.scan(jax.checkpoint(layer, policy=policy), inputs[0], jnp.array([1.0, 2.0]))[0])


def test_remat_that_keeps_the_output_does_not_attend_again():
    inputs, visible = make_inputs(), visibility(*ROWS["trees"])
    policies = {
        2: jax.checkpoint_policies.save_only_these_names(ATTENTION),
        3: jax.checkpoint_policies.nothing_saveable,
    }
    gradients = []
    for loops, policy in policies.items():
        gradient = jax.grad(functools.partial(layers, policy=policy))
        assert primitives(jax.make_jaxpr(gradient)(inputs, visible).jaxpr, "while") == loops
        gradients.append(jax.jit(gradient)(inputs, visible))
    chex.assert_trees_all_close(*gradients, atol=1e-6)


def test_layers_can_be_transposed_and_differentiated_twice():
    inputs, visible = make_inputs(), visibility(*ROWS["trees"])
    policy = jax.checkpoint_policies.save_only_these_names(ATTENTION)

    @jax.jit
    def both(inputs: tuple[jax.Array, ...]) -> Any:
        gradient = jax.grad(lambda x: layers(x, visible, policy))
        output, pull = jax.vjp(lambda x: layers(x, visible, policy), inputs)
        curved = jax.vjp(gradient, inputs)[1](inputs)[0]
        return jax.linear_transpose(lambda g: pull(g)[0], output)(inputs)[0], gradient(inputs), curved

    pushed, gradient, curved = both(inputs)
    along = sum(jnp.vdot(x, y) for x, y in zip(gradient, inputs, strict=True))
    np.testing.assert_allclose(pushed, along, rtol=1e-5)
    step = 1e-3
    ahead, behind = (both(tuple(x * (1 + sign * step) for x in inputs))[1] for sign in (1, -1))
    for second, x, y in zip(curved, ahead, behind, strict=True):
        np.testing.assert_allclose(second, (x - y) / (2 * step), atol=0.02 * float(jnp.max(jnp.abs(second))))


def temporaries(length: int) -> int:
    """Bytes that a gradient needs beside its arguments and results."""
    inputs = jax.eval_shape(lambda: make_inputs(length=length))
    visible = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, length), x.dtype), visibility(*ROWS["causal"]))
    compiled = outputs_and_gradients(blockwise_attention).lower(*inputs, visible).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_tokens():
    short, long, longer = (temporaries(length) for length in (4096, 8192, 16384))
    assert long <= 2.1 * short and longer <= 2.1 * long
    assert longer < 16384**2  # bytes: not even one boolean for each pair of a query and a key


def test_blocks_that_see_nothing_cost_nothing():
    """Pairs of blocks that are computed: those that hold a visible pair of tokens, and those of other rows apart."""
    rows = [lay_out([(32, [])], 32), lay_out([(8, [])] * 4, 32), lay_out([(8, [(8, []), (16, [])])], 32)]

    def counts(*rows: Row, window: int | None = None) -> list[list[int]]:
        return Blocks(window, 8, 8).of_visible(visibility(*rows))[0].count.reshape(len(rows), -1).tolist()

    assert counts(*rows) == [[1, 2, 3, 4], [1, 1, 1, 1], [1, 2, 2, 3]]
    assert counts(*rows, window=3) == [[1, 2, 2, 2], [1, 1, 1, 1], [1, 2, 2, 2]]
    assert counts(lay_out([(3, [])], 32)) == [[1, 1, 1, 1]]  # pads see themselves


def test_split_over_devices():
    """Rows and heads apart, by `shard_map`: the loops of devices differ in length."""
    inputs, visible = make_inputs(), visibility(*ROWS["right-padded"])
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.P("rows", None, "heads")
    split = jax.shard_map(
        functools.partial(blockwise_attention, block_size=8),
        mesh=mesh,
        in_specs=(spec, spec, spec, jax.P("rows")),
        out_specs=spec,
    )
    output, pull = jax.jit(lambda *x: jax.vjp(lambda q, k, v: split(q, k, v, visible), *x))(*inputs[:3])
    expected = outputs_and_gradients(blockwise_attention, block_size=8)(*inputs, visible)
    chex.assert_trees_all_close((output, jax.jit(pull)(inputs[3])), expected, atol=2e-5)


def test_rows_that_devices_do_not_divide():
    """Some devices have the last row again, of which nothing is read."""
    inputs, visible = make_inputs(), visibility(*ROWS["right-padded"])
    assert len(inputs[0]) % 8
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        made = outputs_and_gradients(functools.partial(over_mesh, blockwise_attention))(*inputs, visible)
    expected = outputs_and_gradients(dense_attention)(*inputs, visible)
    chex.assert_trees_all_close(jax.device_get(made), expected, atol=2e-5)
