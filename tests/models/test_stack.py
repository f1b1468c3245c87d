"""Layers of different kinds: against a loop in numpy, scanned as unrolled, and where the parameters of each lie."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.trust_region.parameter_subset import ParameterSubset
from jaxrl_llm.models.checkpoints.hf import SafetensorsSource, write_weights
from jaxrl_llm.models.checkpoints.weights import load_weights
from jaxrl_llm.models.config import LayerKind, LoraConfig, ModelConfig, Params, RopeConfig
from jaxrl_llm.models.families.base import DECODER_NAMES
from jaxrl_llm.models.lora import merge_adapters, split_adapters
from jaxrl_llm.models.stack import Run, flat, nested, runs
from jaxrl_llm.models.transformer import Transformer

LOCAL, GLOBAL, NOPE = (
    LayerKind(window=3, rope=RopeConfig(theta=1e4)),
    LayerKind(rope=RopeConfig(theta=1e6), activation="gelu_tanh"),
    LayerKind(rope=None),
)
POST, SANDWICH = LayerKind(norms="post"), LayerKind(window=2, norms="sandwich")
STACKS: dict[str, tuple[LayerKind, ...]] = {
    "three_kinds_and_a_remainder": (LOCAL, GLOBAL, NOPE) * 2 + (LOCAL,),
    "upper_windows": (GLOBAL,) * 3 + (LOCAL,) * 2,
    "norms": (SANDWICH, POST) * 2 + (GLOBAL, SANDWICH),
}


def letters(text: str) -> tuple[LayerKind, ...]:
    return tuple(LayerKind(window=ord(letter)) for letter in text)


# ---------------------------------------------------------------- the loop in numpy


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


def turned(x: np.ndarray, theta: float) -> np.ndarray:
    """Each position's planes (i, i + H/2) by position · θ^(−2i/H), as complex numbers."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    planes = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([planes.real, planes.imag], axis=-1)


def attention(config: ModelConfig, kind: LayerKind, layer: Params, x: np.ndarray) -> np.ndarray:
    query, key, value = (
        (x @ layer[name]["weight"].T).reshape(len(x), -1, config.head_dim) for name in ("query", "key", "value")
    )
    if kind.rope is not None:
        query, key = turned(query, kind.rope.theta), turned(key, kind.rope.theta)
    mixed = np.zeros_like(query)
    for t, head in itertools.product(range(len(x)), range(config.num_heads)):
        begin = 0 if kind.window is None else max(0, t + 1 - kind.window)
        shared = head // (config.num_heads // config.num_kv_heads)
        scores = key[begin : t + 1, shared] @ query[t, head] / np.sqrt(config.head_dim)
        weights = np.exp(scores - scores.max())
        mixed[t, head] = weights / weights.sum() @ value[begin : t + 1, shared]
    return mixed.reshape(len(x), -1) @ layer["output"]["weight"].T


def mlp(kind: LayerKind, layer: Params, x: np.ndarray) -> np.ndarray:
    gate, up = (x @ layer[name]["weight"].T for name in ("gate", "up"))
    if kind.activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return (gate * up) @ layer["down"]["weight"].T


def numpy_logits(config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """`[T, V]`; norms are looked up in the stacked ones by counting the layers that have them."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    layers, x = params["layers"], params["embed"]["weight"][tokens]
    before = after = 0
    for number, kind in enumerate(config.kinds):
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], {k: layers[k] for k in ("attention", "mlp")})
        has_pre, has_post = kind.norms in ("pre", "sandwich"), kind.norms in ("post", "sandwich")

        def around(name: str, x: np.ndarray, inner: Any, at=(has_pre, has_post, before, after)) -> np.ndarray:
            read = norm(x, layers[f"{name}_norm"]["scale"][at[2]]) if at[0] else x
            made = inner(read)
            return x + (norm(made, layers[f"{name}_post_norm"]["scale"][at[3]]) if at[1] else made)

        x = around("attention", x, lambda x, layer=layer, kind=kind: attention(config, kind, layer["attention"], x))
        x = around("mlp", x, lambda x, layer=layer, kind=kind: mlp(kind, layer["mlp"], x))
        before, after = before + has_pre, after + has_post
    return norm(x, params["final_norm"]["scale"]) @ params["embed"]["weight"].T


@pytest.mark.parametrize("name", STACKS)
def test_logits_equal_a_loop_in_numpy(name, tiny_config, lively_params):
    config = tiny_config(num_layers=len(STACKS[name]), layer_kinds=STACKS[name])
    model = Transformer(config)
    params, tokens = lively_params(model), np.random.default_rng(0).integers(0, 64, 9)
    expected = numpy_logits(config, params, tokens)
    ours = np.asarray(jax.jit(model.logits)(params, tokens[None]))[0]
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
    for kind in {dataclasses.replace(kind, window=None) for kind in config.kinds}:
        plain = Transformer(dataclasses.replace(config, layer_kinds=(kind,)))
        if plain.stack.owners == model.stack.owners:  # the same parameters: each kind is felt
            assert np.abs(np.asarray(jax.jit(plain.logits)(params, tokens[None]))[0] - expected).max() > 0.01


# ---------------------------------------------------------------- scans


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("a", [(0, 1, 1)]),
        ("aaaa", [(0, 1, 4)]),
        ("abab", [(0, 2, 2)]),
        ("abc", [(0, 3, 1)]),
        ("aaaaab" * 4 + "aa", [(0, 6, 4), (24, 1, 2)]),  # Gemma 3 of 1B
        ("a" * 21 + "b" * 7, [(0, 1, 21), (21, 1, 7)]),  # Qwen2 with windows in its upper layers
        ("a" + "bcbcbc", [(0, 1, 1), (1, 2, 3)]),
        ("ababa", [(0, 1, 1), (1, 2, 2)]),
    ],
)
def test_runs(kinds, expected):
    found = runs(letters(kinds))
    assert found == tuple(Run(*run) for run in expected)
    again = [kinds[run.first : run.first + run.period] * run.repeats for run in found]
    assert "".join(again) == kinds


@pytest.mark.parametrize(
    ("name", "remat"), [("three_kinds_and_a_remainder", "full"), ("upper_windows", "dots"), ("norms", "none")]
)
def test_scanned_equals_unrolled(name, remat, tiny_config, lively_params):
    kinds = STACKS[name]
    tokens = np.random.default_rng(0).integers(0, 64, (2, 6))

    def gradient(**changes: Any) -> tuple[jax.Array, Params]:
        model = Transformer(tiny_config(num_layers=len(kinds), layer_kinds=kinds, **changes))
        weights = np.random.default_rng(1).normal(size=(2, 6, 64))
        loss = lambda params: jnp.sum(model.logits(params, tokens) * weights)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(lively_params(model))

    (loss, ours), (expected, theirs) = gradient(remat=remat), gradient(scan_layers=False)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    largest = jax.tree.map(lambda leaf: float(np.abs(leaf).max()), theirs)
    scaled = [jax.tree.map(lambda leaf, most: leaf / most, tree, largest) for tree in (ours, theirs)]
    chex.assert_tree_all_finite(scaled[0])
    chex.assert_trees_all_close(*scaled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", [(LOCAL, NOPE, SANDWICH, LOCAL), (POST,) * 4 + (LOCAL,) * 4])
def test_what_is_compiled_does_not_grow_with_depth(pattern, tiny_config):
    def size(layers: int) -> int:
        kinds = tuple(np.repeat(np.array(pattern, object), layers // 8)) if pattern[0] == POST else pattern
        model = Transformer(tiny_config(num_layers=layers, layer_kinds=kinds, remat="full"))
        loss = lambda params: jnp.sum(model.logits(params, jnp.zeros((1, 4), jnp.int32)))  # noqa: E731
        return len(jax.jit(jax.grad(loss)).lower(model.abstract_params()).as_text().splitlines())

    assert size(64) == size(8)


# ---------------------------------------------------------------- parameters


def test_kinds_of_the_same_parameters_have_one_stacked_tree(tiny_config):
    """The tree, the values and the axes are those of a model of one kind."""
    mixed = Transformer(tiny_config(num_layers=7, layer_kinds=STACKS["three_kinds_and_a_remainder"]))
    plain = Transformer(tiny_config(num_layers=7))
    key = jax.random.key(3)
    chex.assert_trees_all_equal(jax.jit(mixed.init)(key), jax.jit(plain.init)(key))
    assert mixed.logical_axes() == plain.logical_axes()


def test_a_parameter_is_stacked_over_the_layers_that_have_it(tiny_config):
    config = tiny_config(num_layers=6, layer_kinds=STACKS["norms"])
    model, plain = Transformer(config), Transformer(tiny_config(num_layers=6))
    abstract, axes = flat(model.abstract_params()), flat(model.logical_axes())
    rows = {path: leaf.shape[0] for path, leaf in abstract.items() if path.startswith("layers.") and "norm" in path}
    names = {"attention_norm": 4, "attention_post_norm": 5, "mlp_norm": 4, "mlp_post_norm": 5}
    assert rows == {f"layers.{name}.scale": count for name, count in names.items()}
    assert {path: len(names) for path, names in axes.items()} == {path: leaf.ndim for path, leaf in abstract.items()}
    assert sum(leaf.size for leaf in abstract.values()) == config.num_parameters
    ours, theirs = (flat(jax.jit(each.init)(jax.random.key(3))) for each in (model, plain))
    shared = [path for path in theirs if "norm" not in path]
    chex.assert_trees_all_equal(*({path: tree[path] for path in shared} for tree in (ours, theirs)))


def test_equal_stacks_have_equal_records(tiny_config):
    spelt = [(LOCAL, GLOBAL), (LOCAL, GLOBAL) * 2, (LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL)]
    configs = {tiny_config(num_layers=5, layer_kinds=kinds) for kinds in spelt}
    assert len(configs) == 1
    (config,) = configs
    assert config.layer_kinds == (LOCAL, GLOBAL)
    assert config.kinds == (LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL)


def test_adapters_on_layers_of_several_kinds(tiny_config, lively_params):
    config = tiny_config(num_layers=6, layer_kinds=STACKS["norms"], lora=LoraConfig(rank=2, targets=("query", "down")))
    model, tokens = Transformer(config), np.random.default_rng(0).integers(0, 64, (1, 6))
    params = lively_params(model)
    adapted = np.asarray(jax.jit(model.logits)(params, tokens))
    merged = np.asarray(jax.jit(model.base.logits)(merge_adapters(params, config), tokens))
    base = np.asarray(jax.jit(model.logits)(split_adapters(params)[1], tokens))
    np.testing.assert_allclose(adapted, merged, atol=1e-4 * np.abs(merged).max())
    assert np.abs(adapted - base).max() > 0.01


def test_weights_are_written_and_read_layer_by_layer(tmp_path, tiny_config, lively_params):
    model = Transformer(tiny_config(num_layers=6, layer_kinds=STACKS["norms"]))
    params = lively_params(model)
    names = DECODER_NAMES | {
        f"layers.{name}_post_norm.scale": f"model.layers.{{layer}}.{name}_post.weight" for name in ("attention", "mlp")
    }
    write_weights(tmp_path, params, names, model.stack)
    source = SafetensorsSource(tmp_path)
    assert {name for name in source.shapes if name.endswith("attention_post.weight")} == {
        f"model.layers.{layer}.attention_post.weight" for layer in (0, 1, 2, 3, 5)
    }
    np.testing.assert_array_equal(
        source.read("model.layers.4.input_layernorm.weight", (slice(None),)),
        params["layers"]["attention_norm"]["scale"][2],
    )
    chex.assert_trees_all_equal(load_weights(source, names, model, where="here"), params)


def test_the_last_layers_of_several_kinds(tiny_config, lively_params):
    model = Transformer(tiny_config(num_layers=6, layer_kinds=STACKS["norms"]))
    params = lively_params(model)
    subset = ParameterSubset(params, "last_layers", last_layers=2, owners=model.stack.owners)
    part = subset.take(params)
    rows = {path: leaf.shape[0] for path, leaf in part.items() if path.startswith("layers.")}
    assert rows.pop("layers.attention_post_norm.scale") == rows.pop("layers.mlp_post_norm.scale") == 1
    assert set(rows.values()) == {2}
    moved = flat(subset.put(params, {path: leaf + 1 for path, leaf in part.items()}))
    cut = Transformer(tiny_config(num_layers=6, layer_kinds=STACKS["norms"]))
    for layer, (was, now) in enumerate(zip(*(cut.layers(nested(tree)) for tree in (flat(params), moved)), strict=True)):
        changed = {bool(np.any(flat(was)[path] != flat(now)[path])) for path in flat(was)}
        assert changed == {layer >= 4}


def test_several_runs_read_the_parameters_where_they_lie(tiny_config):
    """A second copy of them, one array a run, would be as large as they are."""
    config = tiny_config(num_layers=16, mlp_dim=2048, remat="full", layer_kinds=(LOCAL,) * 9 + (GLOBAL,) * 7)
    model = Transformer(config)
    program = jax.jit(lambda params: model.logits(params, jnp.zeros((1, 4), jnp.int32))).lower(model.abstract_params())
    assert program.compile().memory_analysis().temp_size_in_bytes < 0.3 * 4 * config.num_parameters
