"""A tensor axis of any size that the heads allow: values and gradients are those of one device."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.rows import PaddedLayout
from jaxrl_llm.models.tensor_heads import kv_heads_on, with_whole_parts
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh

CASES = {
    "1 to 4": ({"num_kv_heads": 1}, {"fsdp": 2, "tensor": 4}),
    "2 to 4": (
        {"num_kv_heads": 2, "qk_norm": True, "attention_bias": True, "lora": LoraConfig(rank=2)},
        {"fsdp": 2, "tensor": 4},
    ),
    "norm over 2 to 4": (
        {"num_kv_heads": 2, "qk_norm": True, "qk_norm_over_heads": True, "norms": "post", "norm_offset": 1.0},
        {"fsdp": 2, "tensor": 4},
    ),
    "3 to 6": ({"num_heads": 6, "num_kv_heads": 3}, {"data": 2, "fsdp": 2, "tensor": 2}),
}
"""Heads of keys and values, and of how many there must be; where two heads lie on three devices, for one."""


@pytest.mark.parametrize("case", CASES)
def test_repeated_heads_change_no_value_and_no_gradient(case, tiny_config, lively_params):
    changes, sizes = CASES[case]
    model, mesh = Transformer(tiny_config(num_layers=1, **changes)), make_mesh(MeshConfig(**sizes))
    assert kv_heads_on(model.config, mesh) == int(case[-1])
    params, rng = lively_params(model), np.random.default_rng(0)
    prompt, completion = rng.integers(0, 64, (8, 5)), rng.integers(0, 64, (8, 2, 4))
    lengths, weights = np.array([1, 5, 3, 4, 2, 5, 5, 1]), rng.normal(size=(8, 2, 4, 32)).astype(np.float32)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        hidden = model.hidden(params, PaddedLayout.of(prompt, lengths, completion))
        return jnp.mean(hidden * weights), hidden

    gradient_of = jax.grad(loss, has_aux=True)
    gradient, expected = jax.jit(gradient_of)(params)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, model.shardings(mesh))
        ours, hidden = jax.jit(gradient_of, out_shardings=(model.shardings(mesh), None))(placed)
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-5)
    chex.assert_tree_all_finite(gradient)
    chex.assert_trees_all_close(ours, gradient, rtol=0, atol=1e-6)
    assert float(jnp.max(jnp.abs(gradient["layers"]["attention"]["key"]["weight"]))) > 1e-3


def test_no_head_is_cut_in_two(tiny_config, lively_params):
    """Each device has the weights of whole heads, of keys and values those that its queries read, in their order."""
    model, mesh = Transformer(tiny_config(num_kv_heads=2)), make_mesh(MeshConfig(fsdp=2, tensor=4))
    whole = lively_params(model)
    with jax.set_mesh(mesh):
        repeated = jax.jit(functools.partial(with_whole_parts, config=model.config))(whole)
        again = jax.jit(functools.partial(with_whole_parts, config=model.config))(repeated)
    before, after = (params["layers"]["attention"] for params in (whole, repeated))
    key, ours = before["key"]["weight"], after["key"]["weight"]
    np.testing.assert_array_equal(ours, np.repeat(np.reshape(key, (2, 2, 4, 32)), 2, axis=1).reshape(2, 16, 32))
    assert ours.sharding.shard_shape(ours.shape) == (2, 4, 16)
    chex.assert_trees_all_equal(again, repeated)
    for name in ("query", "output"):
        assert (
            repeated["layers"]["attention"][name]["weight"].shape == whole["layers"]["attention"][name]["weight"].shape
        )
    assert with_whole_parts(whole, model.config) is whole  # of one device


@pytest.mark.parametrize("make", [Transformer, lambda config: ScoreModel(Transformer(config))], ids=["lm", "score"])
def test_query_heads_that_cannot_be_dealt_raise(make, tiny_config, lively_params):
    """Before anything is loaded; and where a function is traced under a mesh that nobody has asked."""
    config, mesh = tiny_config(num_heads=9, num_kv_heads=3), make_mesh(MeshConfig(fsdp=2, tensor=4))
    with pytest.raises(ValueError, match=r"tensor axis of 4 .* the 9 query heads .* one of 1, 3, 9"):
        make(config).shardings(mesh)
    model = Transformer(config)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="9 query heads"):
        jax.eval_shape(model.logits, model.abstract_params(), jax.ShapeDtypeStruct((8, 4), jnp.int32))
