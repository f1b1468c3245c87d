"""Mixtures of experts against loops over tokens and experts, and a transformer that has them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.config import ExpertsConfig, LayerKind, LoraConfig, Params
from jaxrl_llm.models.experts import top_experts
from jaxrl_llm.models.kernels.grouped import grouped_outer, grouped_product
from jaxrl_llm.models.lora import merge_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh

EXPERTS = ExpertsConfig(count=8, per_token=2, width=12)


@pytest.fixture
def moe_config(tiny_config):
    """A tiny model whose second layer has no experts."""
    kinds = (LayerKind(experts=True), LayerKind(), LayerKind(experts=True))
    return lambda **changes: dataclasses.replace(
        tiny_config(num_layers=3), **{"layer_kinds": kinds, "experts": EXPERTS, **changes}
    )


@pytest.mark.parametrize("made", [False, True], ids=["given", "made"])
@pytest.mark.parametrize("interpret", [False, True], ids=["blocks", "megablox"])
@pytest.mark.parametrize("sizes", [[7, 0, 150, 1, 40], [0, 0, 0, 0, 9]])
def test_products_are_those_of_a_loop_over_groups(sizes, interpret, made, monkeypatch):
    """Of matrices, and of ones that are made of other arrays, one by one."""
    rng, rows, inner, outer = np.random.default_rng(0), 210, 16, 24
    x, y = rng.normal(size=(rows, inner)).astype("f"), rng.normal(size=(rows, outer)).astype("f")
    weight = rng.normal(size=(len(sizes), outer, inner)).astype("f")
    product, back, gradient = np.zeros_like(y), np.zeros_like(x), np.zeros_like(weight)
    for group, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        for row in range(end - size, end):
            product[row], back[row] = weight[group] @ x[row], y[row] @ weight[group]
            gradient[group] += np.outer(y[row], x[row])
    counts = jnp.array(sizes, jnp.int32)
    how: dict[str, Any] = {"interpret": interpret}
    if made:
        monkeypatch.setattr("jaxrl_llm.models.kernels.grouped._FLOATS", 1)
        weight, how["floats"] = (weight / 2, weight / 2), lambda halves: halves[0] + halves[1]
    found = (
        grouped_product(x, weight, counts, **how),
        grouped_product(y, weight, counts, transposed=True, **how),
        grouped_outer(y, x, counts, dtype=jnp.float32, interpret=interpret),
    )
    for ours, expected in zip(found, (product, back, gradient), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_shares_by_hand(normalize):
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3], [0.4, 0.1, 0.3, 0.2]], "f"))
    chosen = jnp.array([[-1, -1], [2, 1]], jnp.int16)
    experts, shares = top_experts(jnp.array(logits), ExpertsConfig(4, 2, 1, normalize), chosen)
    assert experts.tolist() == [[1, 3], [2, 1]]
    expected = np.array([[0.4, 0.3], [0.3, 0.1]])
    np.testing.assert_allclose(shares, expected / (expected.sum(-1, keepdims=True) if normalize else 1), rtol=1e-5)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["plain", "lora"])
def test_layer_is_that_of_a_loop_over_experts(moe_config, lively_params, lora):
    """Value and gradients, those of adapters and router included."""
    model = Transformer(moe_config(lora=lora))
    layer = model.layers(lively_params(model))[0]
    x = np.random.default_rng(1).normal(size=(3, 5, 32)).astype("f")
    chosen = np.full((3, 5, 2), -1)
    chosen[0, 1] = [6, 3]

    def looped(experts: Any, x: jax.Array) -> jax.Array:
        weights = merge_adapters({"experts": experts}, model.config)["experts"]
        logits = x @ weights["router"]["weight"].T
        best = jnp.where(chosen < 0, jnp.argsort(-logits, axis=-1)[..., :2], chosen)
        taken = jax.nn.softmax(logits) * jnp.any(best[..., None] == jnp.arange(EXPERTS.count), axis=-2)
        shares, out = taken / jnp.sum(taken, axis=-1, keepdims=True), 0
        for e in range(EXPERTS.count):
            gate, up, down = (weights[name]["weight"][e] for name in ("gate", "up", "down"))
            out += shares[..., e, None] * ((jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T)
        return out

    def ours(experts: Any, x: jax.Array) -> jax.Array:
        block = model.block({**layer, "experts": experts}, LayerKind(experts=True))
        return block.experts(x, jnp.array(chosen))[0]

    np.testing.assert_allclose(jax.jit(ours)(layer["experts"], x), looped(layer["experts"], x), atol=1e-4, rtol=1e-5)
    want = np.random.default_rng(2).normal(size=x.shape).astype("f")
    found, expected = (
        jax.jit(jax.grad(lambda *given, made=made: jnp.sum(made(*given) * want), argnums=(0, 1)))(layer["experts"], x)
        for made in (ours, looped)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * jnp.max(jnp.abs(b))), found, expected)


@pytest.mark.parametrize(
    "sizes",
    [
        {"expert": 4, "fsdp": 2},
        {"data": 2, "expert": 2, "tensor": 2},
        pytest.param({"fsdp": 2, "context": 2, "expert": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_eight_devices_compute_what_one_does(moe_config, lively_params, sizes):
    """States and gradients, of rows that devices do not divide, too; each device holds its part of the experts."""
    kinds = {"layer_kinds": (LayerKind(experts=True),), "num_layers": 1}
    model, rng = Transformer(moe_config(**kinds, remat="full")), np.random.default_rng(3)
    params, tokens = lively_params(model), rng.integers(0, 64, (5, 9))
    want = rng.normal(size=(5, 9, 32)).astype("f")

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        states = model.causal(params, tokens).states
        return jnp.sum(states * want), states

    both = jax.value_and_grad(loss, has_aux=True)
    (_, expected), slopes = jax.jit(both)(params)
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    shardings = model.shardings(mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        (_, states), ours = jax.jit(both, out_shardings=((None, None), shardings))(placed)
    gate = placed["layers"]["experts"]["gate"]["weight"]
    assert gate.sharding.shard_shape(gate.shape)[1] == EXPERTS.count // sizes["expert"]
    np.testing.assert_allclose(states, expected, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-6), ours, slopes)


def test_the_mesh_must_divide_the_experts(moe_config):
    with pytest.raises(
        ValueError, match=r"6 entries along 'expert', which mesh axis 'expert' of size 4 does not divide"
    ):
        Transformer(moe_config(experts=ExpertsConfig(6, 2, 12))).shardings(make_mesh(MeshConfig(expert=4)))


@pytest.mark.parametrize("shared", [None, 20])
def test_parameters_are_counted(moe_config, shared):
    config = moe_config(experts=dataclasses.replace(EXPERTS, shared=shared))
    assert sum(leaf.size for leaf in jax.tree.leaves(Transformer(config).abstract_params())) == config.num_parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None}, "a kind of layer has"),
        ({"layer_kinds": (LayerKind(),)}, "no kind of layer has some"),
        ({"batch_invariant": True, "remat": "full"}, "with 8 experts"),
        ({"lora": LoraConfig(4, 6.0, use_rslora=True)}, "use_rslora=False and alpha=12"),
    ],
)
def test_settings_that_cannot_be_meant(moe_config, changes, message):
    with pytest.raises(ValueError, match=message):
        moe_config(**changes)
    with pytest.raises(ValueError, match=r"experts\.per_token=9 must be 1 to count=8"):
        ExpertsConfig(8, 9, 4)
