"""The product of linear layers: the same numbers whichever way around it is computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl_llm.models.operands import SMALL, times_transposed
from jaxrl_llm.sharding import MeshConfig, make_mesh

OUT, INNER = 640, SMALL // 512


@pytest.mark.parametrize("rows", [(1,), (32,), (4, 3, 8), (129,)])
def test_the_product_is_that_of_float64(rows: tuple[int, ...]):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(*rows, INNER)), rng.normal(size=(OUT, INNER))
    narrow = jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)
    np.testing.assert_allclose(jax.jit(times_transposed)(*narrow), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_a_large_weight_is_the_left_factor_of_few_rows():
    """What XLA does with the product is what is promised: nothing folds the turn into it again."""

    def factors(rows: int, out: int) -> list[int]:
        x, weight = jnp.zeros((rows, INNER)), jnp.zeros((out, INNER))
        text = jax.jit(times_transposed).lower(x, weight).compile().as_text()
        return [int(n) for n in re.search(r"f32\[(\d+),(\d+)\]\S* dot\(", text).groups()]

    assert factors(32, OUT) == [OUT, 32]
    assert factors(129, OUT) == [129, OUT]
    assert factors(32, 512) == [32, 512]


def test_rows_and_weights_on_a_mesh():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(8, 4, INNER)).astype("float32"), rng.normal(size=(OUT, INNER)).astype("float32")
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, P("fsdp")), jax.device_put(weight, P("tensor"))
        made = jax.jit(times_transposed, out_shardings=P("fsdp", None, "tensor"))(*placed)
    np.testing.assert_allclose(made, x @ weight.T, rtol=1e-4, atol=1e-4)
