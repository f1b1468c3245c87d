"""Adapters: what they compute, how a tree that has them is taken apart, and what merging them gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.config import LoraConfig, LoraTarget, ModelConfig, Params
from jaxrl_llm.models.lora import (
    add_adapters,
    has_adapters,
    join,
    merge_adapters,
    reference_of,
    split_adapters,
    split_trainable,
    without_adapters,
)
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import make_mesh, parameter_shardings

LORA = LoraConfig(rank=3, alpha=6.0)
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 7)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tiny_config: Callable[..., ModelConfig]) -> Transformer:
    return Transformer(tiny_config(lora=LORA, attention_bias=True, mlp_bias=True))


@pytest.fixture(scope="module")
def params(model: Transformer, lively_params: Callable[..., Params]) -> Params:
    return lively_params(model)


def paths(tree: Any) -> set[str]:
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)}


def logits(model: Transformer, params: Params) -> np.ndarray:
    return np.asarray(jax.jit(model.logits)(params, TOKENS))


# ---- What they compute ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_nothing(tiny_config, lively_params, dtype):
    model = Transformer(tiny_config(lora=LORA, dtype=dtype, param_dtype=dtype))
    base = lively_params(model.base)
    params = add_adapters(base, model, jax.random.key(1))
    assert jax.tree.structure(params) == jax.tree.structure(model.abstract_params())
    query = params["layers"]["attention"]["query"]
    assert query["lora_a"].dtype == query["lora_b"].dtype == jnp.float32
    bound = 32**-0.5
    assert 0.9 * bound < np.abs(query["lora_a"]).max() <= bound
    assert not np.array_equal(query["lora_a"][0], query["lora_a"][1])
    assert not np.any(query["lora_b"])
    assert params["embed"]["weight"] is base["embed"]["weight"]
    np.testing.assert_array_equal(logits(model, params), logits(model.base, base))


def test_the_base_of_init_is_that_of_the_model_without_adapters(model):
    params = model.init(jax.random.key(3))
    chex.assert_trees_all_equal(without_adapters(params), model.base.init(jax.random.key(3)), strict=True)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scan", "unrolled"])
def test_merged_equals_unmerged(model, params, scan_layers):
    model = Transformer(dataclasses.replace(model.config, scan_layers=scan_layers, remat="full"))
    merged = jax.jit(merge_adapters, static_argnums=1)(params, model.config)
    assert jax.tree.structure(merged) == jax.tree.structure(model.base.abstract_params())
    expected = logits(model, params)
    assert np.abs(expected - logits(model, without_adapters(params))).max() > 0.5
    np.testing.assert_allclose(logits(model.base, merged), expected, atol=2e-5)
    np.testing.assert_allclose(logits(model, merged), expected, atol=2e-5)


def test_merging_computes_in_float32_and_keeps_the_type_of_the_weight(model):
    rng = np.random.default_rng(0)
    weight, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 4), (2, 3, 4), (2, 5, 3)))
    tree = {"weight": jnp.asarray(weight, jnp.bfloat16), "lora_a": a, "lora_b": b, "bias": b[..., 0]}
    merged = merge_adapters({"layers": {"x": tree}}, model.config)["layers"]["x"]
    expected = tree["weight"].astype(jnp.float32) + LORA.scale * np.stack([b[i] @ a[i] for i in range(2)])
    assert sorted(merged) == ["bias", "weight"]
    np.testing.assert_array_equal(merged["weight"], expected.astype(jnp.bfloat16))


def test_merging_needs_the_scale(model, params):
    with pytest.raises(ValueError, match="lora is None"):
        merge_adapters(params, model.base.config)
    base = without_adapters(params)
    assert merge_adapters(base, model.base.config) is base


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradient_of_the_adapters_is_that_of_the_weight_projected(model, params, remat):
    """dA = s·Bᵀ·dW and dB = s·dW·Aᵀ, W being the merged weight."""
    model = Transformer(dataclasses.replace(model.config, remat=remat))
    direction = np.random.default_rng(2).normal(size=(2, 7, 64)).astype(np.float32)

    def value(params: Params, model: Transformer) -> jax.Array:
        return jnp.mean(direction * jax.nn.log_softmax(model.logits(params, jnp.asarray(TOKENS))))

    grad = jax.jit(jax.grad(value), static_argnums=1)
    ours = grad(params, model)["layers"]
    full = grad(merge_adapters(params, model.config), model.base)["layers"]
    for room, target in ROOMS.items():
        a, b = (params["layers"][target][room][name] for name in ("lora_a", "lora_b"))
        weight = full[target][room]["weight"]
        for name, expected in (
            ("lora_a", LORA.scale * jnp.einsum("lor,loi->lri", b, weight)),
            ("lora_b", LORA.scale * jnp.einsum("loi,lri->lor", weight, a)),
        ):
            largest = float(jnp.abs(expected).max())
            assert largest > 1e-4
            np.testing.assert_allclose(ours[target][room][name], expected, atol=2e-5 * largest, err_msg=room + name)


ROOMS = {name: "attention" if name in ("query", "key", "value", "output") else "mlp" for name in get_args(LoraTarget)}


def test_only_targets_have_adapters(tiny_config):
    model = Transformer(tiny_config(lora=LoraConfig(targets=("query", "down"))))
    adapters, _ = split_adapters(model.abstract_params())
    expected = {f"layers.{place}.lora_{part}" for place in ("attention.query", "mlp.down") for part in "ab"}
    assert paths(adapters) == expected
    assert adapters["layers"]["mlp"]["down"]["lora_a"].shape == (2, 8, 48)
    assert adapters["layers"]["mlp"]["down"]["lora_b"].shape == (2, 32, 8)
    axes = model.logical_axes()["layers"]["mlp"]["down"]
    assert axes["lora_a"] == ("layers", "lora_rank", "mlp")
    assert axes["lora_b"] == ("layers", "embed", "lora_rank")


def test_eight_devices_compute_what_one_does(model, params, mesh_config):
    mesh = make_mesh(mesh_config)
    shardings = parameter_shardings(mesh, model.logical_axes(), model.abstract_params())
    placed = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(model, placed), logits(model, params), atol=1e-4)
    fresh = add_adapters(without_adapters(placed), model, jax.random.key(0), shardings)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, fresh, shardings))
    whole = add_adapters(without_adapters(params), model, jax.random.key(0))
    chex.assert_trees_all_equal(split_adapters(fresh)[0], split_adapters(whole)[0], strict=True)


# ---- Trees ---------------------------------------------------------------------------------------


def test_parts_join_to_the_whole(params):
    adapters, base = split_adapters(params)
    assert paths(adapters) | paths(base) == paths(params)
    assert paths(adapters) == {path for path in paths(params) if "lora_" in path}
    assert not has_adapters(base)
    whole = join(adapters, base)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, whole, params))


def test_what_is_trained(params):
    base = without_adapters(params)
    assert split_trainable(base) == (base, {})
    trainable, frozen = split_trainable({**params, "value_head": {"weight": 1}})
    assert paths(trainable) == paths(split_adapters(params)[0]) | {"value_head.weight"}
    assert paths(frozen) == paths(base)


def test_several_models_are_judged_one_by_one(params):
    base = without_adapters(params)
    both = {"policy": params, "critic": base}
    trainable, frozen = split_trainable(both)
    assert paths(trainable["critic"]) == paths(base)
    assert paths(frozen) == {f"policy.{path}" for path in paths(base)}
    assert paths(join(trainable, frozen)) == paths(both)


def test_the_reference_is_the_base(params):
    base = without_adapters(params)
    own = reference_of(params, None)
    assert own is not None
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, own, base))
    assert reference_of(params, base) is base
    assert reference_of(base, base) is base
    assert reference_of(base, None) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank=-1"),
        ({"alpha": 0.0}, "lora.alpha=0.0"),
        ({"alpha": float("nan")}, "lora.alpha=nan"),
        ({"targets": ("q_proj",)}, "q_proj"),
        ({"targets": ()}, "lora.targets="),
        ({"targets": ("up", "up")}, "each once"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_no_adapters_is_none_to_a_model(tiny_config, model):
    with pytest.raises(ValueError, match="rank 0"):
        tiny_config(lora=LoraConfig(rank=0))
    with pytest.raises(ValueError, match="no adapters"):
        add_adapters({}, model.base, jax.random.key(0))


def test_scales():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, use_rslora=True).scale == 2.0
