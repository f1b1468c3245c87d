"""The shared-prompt pass against the concatenated sequences, and what parameters a configuration makes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.blocks import Linear
from jaxrl_llm.models.config import LayerKind, Params, RopeConfig
from jaxrl_llm.models.transformer import Transformer

ARCHITECTURES = {
    "tied": {},
    "untied_windows": {"tie_embeddings": False, "num_layers": 3, "sliding_windows": (3, None, 5)},
    "caps_biases": {
        "attention_softcap": 1.5,
        "logit_softcap": 2.0,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "activation": "gelu_tanh",
    },
    "kinds": {
        "num_layers": 3,
        "layer_kinds": (
            LayerKind(window=3),
            LayerKind(rope=None, norms="sandwich"),
            LayerKind(rope=RopeConfig(theta=1e6, partial=0.5), norms="post"),
        ),
        "norm_offset": 1.0,
        "scale_embeddings": True,
        "query_scalar": 9.0,
    },
    "qk_norm_yarn": {
        "qk_norm": True,
        "num_kv_heads": 1,
        "rope": RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=8),
    },
}


class Rows(NamedTuple):
    """Ragged prompts and completions, with real and padded positions told apart."""

    prompt: np.ndarray
    prompt_lengths: np.ndarray
    completion: np.ndarray
    mask: np.ndarray


def make_rows(shape: tuple[int, int, int, int] = (3, 2, 7, 5), vocabulary: int = 64) -> Rows:
    prompts, group, prompt_width, width = shape
    rng = np.random.default_rng(sum(shape))
    lengths = rng.integers(1, width + 1, (prompts, group))
    prompt_lengths = rng.integers(1, prompt_width + 1, prompts)
    lengths[0, 0], prompt_lengths[0], prompt_lengths[-1] = width, 1, prompt_width
    return Rows(
        rng.integers(0, vocabulary, (prompts, prompt_width)),
        prompt_lengths,
        rng.integers(0, vocabulary, (prompts, group, width)),
        np.arange(width) < lengths[..., None],
    )


def concatenated(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Plain sequences `[P·G, T]`, and the position whose logits predict each completion token `[P·G, Tc]`."""
    prompts, group, width = rows.completion.shape
    tokens = np.zeros((prompts * group, rows.prompt.shape[1] + width), np.int32)
    predicting = np.zeros((prompts * group, width), np.int32)
    for p in range(prompts):
        length = rows.prompt_lengths[p]
        for g in range(group):
            tokens[p * group + g, :length] = rows.prompt[p, :length]
            tokens[p * group + g, length : length + width] = rows.completion[p, g]
            predicting[p * group + g] = length - 1 + np.arange(width)
    return tokens, predicting


def readout(mask: np.ndarray, vocabulary: int) -> np.ndarray:
    """Random weights of a scalar that reads all logits of real tokens."""
    return np.random.default_rng(1).normal(size=(*mask.shape, vocabulary)) * mask[..., None]


Logits = Callable[[Params, Rows], jax.Array]


def shared_logits(model: Transformer) -> Logits:
    def logits(params: Params, rows: Rows) -> jax.Array:
        return model.head_logits(params, model.hidden(params, rows))

    return logits


def value_and_gradient(model: Transformer, params: Params, rows: Rows) -> tuple[np.ndarray, Params]:
    """Logits of the completion tokens `[P, G, Tc, V]`, zero at padding, and the gradient of a readout of them."""
    weights = readout(rows.mask, model.config.vocab_size)

    @jax.jit
    def both(params: Params, rows: Rows) -> tuple[jax.Array, Params]:
        def scalar(params: Params) -> tuple[jax.Array, jax.Array]:
            logits = shared_logits(model)(params, rows)
            return jnp.sum(logits * weights), jnp.where(rows.mask[..., None], logits, 0.0)

        (_, logits), gradient = jax.value_and_grad(scalar, has_aux=True)(params)
        return logits, gradient

    logits, gradient = both(params, rows)
    return np.asarray(logits), gradient


def assert_close(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    """Each leaf within `tolerance` of the larger of 1 and its largest entry."""

    def scaled(tree: Any) -> Any:
        return jax.tree.map(lambda x, y: np.asarray(x, np.float64) / max(1.0, np.abs(y).max()), tree, theirs)

    chex.assert_tree_all_finite(ours)
    chex.assert_trees_all_close(scaled(ours), scaled(theirs), rtol=0, atol=tolerance)


# ---------------------------------------------------------------- one prompt for its group


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_prompt_equals_concatenated_sequences(name, tiny_config, lively_params):
    model = Transformer(tiny_config(**ARCHITECTURES[name]))
    params, rows = lively_params(model), make_rows()
    logits, gradient = value_and_gradient(model, params, rows)
    tokens, predicting = concatenated(rows)
    weights = readout(rows.mask, model.config.vocab_size)

    @jax.jit
    def plain(params: Params) -> tuple[jax.Array, Params]:
        def scalar(params: Params) -> tuple[jax.Array, jax.Array]:
            every = model.logits(params, tokens)
            chosen = jnp.take_along_axis(every, predicting[..., None], axis=1).reshape(weights.shape)
            return jnp.sum(chosen * weights), jnp.where(rows.mask[..., None], chosen, 0.0)

        (_, chosen), gradient = jax.value_and_grad(scalar, has_aux=True)(params)
        return chosen, gradient

    expected, expected_gradient = plain(params)
    assert np.abs(expected).max() > 1  # else there is nothing to see
    assert_close(logits, expected)
    assert_close(gradient, expected_gradient)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(expected_gradient))


@pytest.mark.parametrize("shape", [(2, 1, 4, 3), (1, 3, 1, 1), (1, 1, 3, 1)])
def test_smallest_shapes(shape, tiny_config, lively_params):
    """A group of one, a prompt of one token, a completion of one token."""
    model = Transformer(tiny_config())
    params, rows = lively_params(model), make_rows(shape)
    logits = jax.jit(shared_logits(model))(params, rows)
    tokens, predicting = concatenated(rows)
    plain = np.asarray(jax.jit(model.logits)(params, tokens))
    expected = np.take_along_axis(plain, predicting[..., None], axis=1).reshape(logits.shape)
    assert_close(np.where(rows.mask[..., None], logits, 0), np.where(rows.mask[..., None], expected, 0))


def test_padding_does_not_matter(tiny_config, lively_params):
    """Neither what it holds, be it no token at all, nor how much there is of it."""
    model = Transformer(tiny_config(sliding_windows=(3, None)))
    params, rows = lively_params(model), make_rows()
    expected = value_and_gradient(model, params, rows)

    def widen(x: np.ndarray, real: np.ndarray, more: int, garbage: int) -> np.ndarray:
        return np.pad(np.where(real, x, garbage), [(0, 0)] * (x.ndim - 1) + [(0, more)], constant_values=garbage)

    for more, in_prompt, in_completion in ((0, 63, 62), (3, -7, 10**6)):
        is_prompt = np.arange(rows.prompt.shape[1]) < rows.prompt_lengths[:, None]
        other = Rows(
            widen(rows.prompt, is_prompt, more, in_prompt),
            rows.prompt_lengths,
            widen(rows.completion, rows.mask, more, in_completion),
            np.pad(rows.mask, ((0, 0), (0, 0), (0, more))),
        )
        # The readout's weights depend on the width: take those of the narrow rows.
        weights = np.pad(readout(rows.mask, 64), ((0, 0), (0, 0), (0, more), (0, 0)))

        def scalar(params: Params, other: Rows = other, weights: np.ndarray = weights) -> tuple[jax.Array, jax.Array]:
            logits = shared_logits(model)(params, other)
            return jnp.sum(logits * weights), logits

        (_, logits), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)
        narrow = np.asarray(logits)[:, :, : rows.mask.shape[-1]]
        assert_close(np.where(rows.mask[..., None], narrow, 0), expected[0])
        assert_close(gradient, expected[1])


def test_state_t_depends_on_earlier_tokens_of_its_own_row_only(tiny_config, lively_params):
    model = Transformer(tiny_config())
    params, rows = lively_params(model), make_rows((2, 3, 4, 5))
    logits = jax.jit(shared_logits(model))
    before = np.asarray(logits(params, rows))
    prompt, sample, time = 1, 2, 2
    completion = rows.completion.copy()
    completion[prompt, sample, time] = (completion[prompt, sample, time] + 1) % 64
    changed = np.abs(np.asarray(logits(params, rows._replace(completion=completion))) - before).max(axis=-1) > 1e-3
    expected = np.zeros_like(rows.mask)
    expected[prompt, sample, time + 1 :] = True  # the state that predicts the token itself has not seen it
    np.testing.assert_array_equal(changed, expected)


def test_a_prompt_reaches_its_own_group_only(tiny_config, lively_params):
    model = Transformer(tiny_config())
    params, rows = lively_params(model), make_rows((3, 2, 4, 3))
    logits = jax.jit(shared_logits(model))
    before = np.asarray(logits(params, rows))
    prompt = rows.prompt.copy()
    prompt[1, 0] = (prompt[1, 0] + 1) % 64
    changed = np.abs(np.asarray(logits(params, rows._replace(prompt=prompt))) - before).max(axis=-1) > 1e-3
    np.testing.assert_array_equal(changed, np.broadcast_to(np.arange(3)[:, None, None] == 1, changed.shape))


def test_remat_and_unrolled_layers_change_nothing(tiny_config, lively_params):
    model = Transformer(tiny_config(**ARCHITECTURES["untied_windows"]))
    params, rows = lively_params(model), make_rows()
    expected = value_and_gradient(model, params, rows)
    ways: list[dict[str, Any]] = [
        *({"remat": remat} for remat in ("full", "dots", "attention", "offload")),
        {"scan_layers": False, "remat": "full"},
    ]
    for changes in ways:
        other = Transformer(dataclasses.replace(model.config, **changes))
        assert_close(value_and_gradient(other, params, rows), expected, tolerance=1e-6)


REMAT = ("none", "dots", "attention", "full", "offload")


@pytest.mark.slow
def test_rematerialisation_saves_memory_for_work(tiny_config):
    rows = make_rows((4, 4, 32, 32))

    def needs(remat: str) -> tuple[int, float]:
        model = Transformer(tiny_config(num_layers=8, remat=remat))

        def scalar(params: Params) -> jax.Array:
            return jnp.sum(model.hidden(params, rows) ** 3)

        program = jax.jit(jax.grad(scalar)).lower(model.abstract_params()).compile()
        return program.memory_analysis().temp_size_in_bytes, program.cost_analysis()["flops"]

    memory, work = ({remat: found[i] for remat, found in ((r, needs(r)) for r in REMAT)} for i in range(2))
    assert memory["full"] < 0.5 * memory["none"]
    assert memory["full"] < 0.9 * memory["dots"] < 0.8 * memory["none"]
    assert memory["full"] < memory["attention"] < memory["dots"]
    assert work["none"] < 0.95 * work["dots"] < 0.9 * work["full"]
    assert work["dots"] < work["attention"] < work["full"]


@pytest.mark.parametrize("remat", REMAT[1:])
def test_what_the_backward_pass_finds_of_each_layer(remat, tiny_config):
    """As `ModelConfig.remat` says, and where it says: in numbers per token and layer."""
    config = tiny_config(num_layers=3, remat=remat)
    model, rows = Transformer(config), make_rows((2, 2, 5, 6))

    def backward(params: Params) -> Any:
        return jax.vjp(lambda p: model.hidden(p, rows), params)[1]

    params = model.abstract_params()
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    kept = [leaf for leaf in jax.make_jaxpr(backward)(params).out_avals if leaf.shape[0] == 3]
    kept = [leaf for leaf in kept if leaf.shape not in weights]
    assert {leaf.memory_space for leaf in kept} == {
        (jax.memory.Space.Device, jax.memory.Space.Host)[remat == "offload"]
    }
    d, n, k, f = config.embed_dim, 32, 16, config.mlp_dim
    expected = {"full": d, "attention": d + n, "dots": 2 * d + 2 * f + n + 2 * k, "offload": d}
    assert sum(leaf.size for leaf in kept) == 3 * 2 * (5 + 2 * 6) * expected[remat]


def test_bfloat16_computes_near_float32(tiny_config, lively_params):
    model = Transformer(tiny_config(dtype="bfloat16"))
    params, rows = lively_params(model), make_rows()
    hidden = jax.jit(model.hidden)(params, rows)
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(model.head_logits, params, hidden).dtype == jnp.float32
    wide = Transformer(dataclasses.replace(model.config, dtype="float32"))
    expected = np.asarray(jax.jit(wide.hidden)(params, rows))
    real = rows.mask
    gap = np.abs(np.asarray(hidden, np.float32)[real] - expected[real])
    assert 1e-4 < gap.mean() < 0.1, gap.mean()


def test_products_in_bfloat16_have_the_same_factors_in_wider_arrays(tiny_config):
    """On CPUs arrays between products are float32; products, and their gradients, are those of bfloat16 numbers."""
    config = tiny_config(dtype="bfloat16")
    draw = functools.partial(np.random.default_rng(0).normal, size=(4, 6))
    linear = Linear(6, 6, ("mlp", "embed"), False, config, nnx.Rngs(0))
    x, gradient = (jnp.asarray(draw(), jnp.float32) for _ in range(2))
    definition, weight = nnx.split(linear)[0], linear.weight[...]

    def rounded(x: jax.Array) -> np.ndarray:
        return np.asarray(x.astype(jnp.bfloat16), np.float64)

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return nnx.merge(definition, {"weight": weight})(x)

    y, pull = jax.vjp(product, x, weight)
    to_x, to_weight = pull(gradient)
    assert {array.dtype for array in (y, to_x, to_weight)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(y, rounded(x) @ rounded(weight).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_x, rounded(gradient) @ rounded(weight), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_weight, rounded(gradient).T @ rounded(x), rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(y) - np.asarray(x @ weight.T)).max() > 1e-4  # which float32 alone would give
    narrow = linear(x.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(narrow, np.float32), y, rtol=2**-8)


def test_no_stack_of_a_loop_is_bfloat16_on_a_cpu(tiny_config):
    """XLA's CPU would convert the whole of it, to float32 and back, at each layer."""
    model = Transformer(tiny_config(dtype="bfloat16", num_layers=7))

    def loss(params: Params) -> jax.Array:
        return jnp.sum(model.hidden(params, make_rows()).astype(jnp.float32))

    text = jax.jit(jax.grad(loss)).lower(model.abstract_params()).compile().as_text()
    assert "f32[7," in text
    assert "bf16[7," not in text


# ---------------------------------------------------------------- the plain causal pass


def test_causal_returns_keys_and_values_of_every_layer(tiny_config, lively_params):
    config = tiny_config(num_layers=3, sliding_windows=(3, None, 5))
    model = Transformer(config)
    params = lively_params(model)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 6))
    collect = jax.jit(lambda p, t: model.causal(p, t, collect=True))
    hidden, memory, *_ = collect(params, tokens)
    assert memory is not None
    assert hidden.shape == (2, 6, 32)
    heads = (3, 2, config.num_kv_heads)
    assert memory.key.shape == (*heads, config.head_dim, 6)
    assert memory.value.shape == (*heads, 6, config.head_dim)
    again, nothing, *_ = jax.jit(model.causal)(params, tokens)
    assert nothing is None
    assert_close(again, hidden, tolerance=1e-6)
    # What comes later changes neither states nor memory.
    narrow, other, *_ = collect(params, tokens[:, :4])
    assert_close(narrow, hidden[:, :4])
    assert other is not None
    assert_close(other.key, memory.key[..., :4])
    assert_close(other.value, memory.value[..., :4, :])


def test_a_window_limits_what_a_token_sees(tiny_config, lively_params):
    model = Transformer(tiny_config(num_layers=1, sliding_windows=(3,)))
    params = lively_params(model)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 8))
    other = tokens.copy()
    other[0, 2] = (other[0, 2] + 1) % 64
    logits = jax.jit(model.logits)
    changed = np.abs(np.asarray(logits(params, tokens)) - np.asarray(logits(params, other))).max(axis=-1)[0] > 1e-4
    np.testing.assert_array_equal(np.flatnonzero(changed), [2, 3, 4])


def test_a_window_of_the_whole_sequence_is_no_window(tiny_config, lively_params):
    model = Transformer(tiny_config())
    params = lively_params(model)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 8))
    windowed = Transformer(tiny_config(sliding_windows=(8, 100)))
    assert_close(jax.jit(windowed.logits)(params, tokens), jax.jit(model.logits)(params, tokens), tolerance=1e-6)


def test_logit_softcap_bounds_the_logits(tiny_config, lively_params):
    model = Transformer(tiny_config())
    params = lively_params(model)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 8))
    raw = np.asarray(jax.jit(model.logits)(params, tokens))
    capped = np.asarray(jax.jit(Transformer(tiny_config(logit_softcap=2.0)).logits)(params, tokens))
    np.testing.assert_allclose(capped, 2 * np.tanh(raw / 2), atol=1e-5)


# ---------------------------------------------------------------- parameters


def paths(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


BARE = {
    "embed.weight": ("V", "D"),
    "final_norm.scale": ("D",),
    "layers.attention_norm.scale": ("L", "D"),
    "layers.attention.query.weight": ("L", "NH", "D"),
    "layers.attention.key.weight": ("L", "KH", "D"),
    "layers.attention.value.weight": ("L", "KH", "D"),
    "layers.attention.output.weight": ("L", "D", "NH"),
    "layers.mlp_norm.scale": ("L", "D"),
    "layers.mlp.gate.weight": ("L", "F", "D"),
    "layers.mlp.up.weight": ("L", "F", "D"),
    "layers.mlp.down.weight": ("L", "D", "F"),
}
OPTIONAL = {
    "lm_head.weight": ("V", "D"),
    "layers.attention.query.bias": ("L", "NH"),
    "layers.attention.key.bias": ("L", "KH"),
    "layers.attention.value.bias": ("L", "KH"),
    "layers.attention.output.bias": ("L", "D"),
    "layers.attention.query_norm.scale": ("L", "H"),
    "layers.attention.key_norm.scale": ("L", "H"),
    "layers.mlp.gate.bias": ("L", "F"),
    "layers.mlp.up.bias": ("L", "F"),
    "layers.mlp.down.bias": ("L", "D"),
}
EVERYTHING = {
    "tie_embeddings": False,
    "attention_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
}
OVER_HEADS = {"qk_norm": True, "qk_norm_over_heads": True}
NORMS = {
    "layers.attention.query_norm.scale": ("L", "NH"),
    "layers.attention.key_norm.scale": ("L", "KH"),
}


@pytest.mark.parametrize(("changes", "names"), [({}, BARE), (EVERYTHING, BARE | OPTIONAL), (OVER_HEADS, BARE | NORMS)])
def test_parameter_tree(changes, names, tiny_config):
    config = tiny_config(num_layers=3, head_dim=6, **changes)
    model = Transformer(config)
    sizes = {"V": 64, "D": 32, "F": 48, "L": 3, "NH": 48, "KH": 24, "H": 6}
    expected = {name: tuple(sizes[letter] for letter in letters) for name, letters in names.items()}
    shapes = paths(model.abstract_params())
    assert {name: leaf.shape for name, leaf in shapes.items()} == expected
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == config.num_parameters
    axes = paths(model.logical_axes())
    assert {name: len(leaf) for name, leaf in axes.items()} == {name: len(shape) for name, shape in expected.items()}
    assert jax.tree.structure(model.init(jax.random.key(0))) == jax.tree.structure(model.abstract_params())


def test_init_is_small_noise_that_differs_between_layers_and_keys(tiny_config):
    model = Transformer(tiny_config(tie_embeddings=False, attention_bias=True, mlp_dim=64))
    init = jax.jit(model.init)
    params = init(jax.random.key(0))
    query = params["layers"]["attention"]["query"]
    assert np.std(query["weight"]) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(query["weight"][0], query["weight"][1])
    assert not np.array_equal(params["embed"]["weight"], params["lm_head"]["weight"])
    mlp = params["layers"]["mlp"]
    assert not np.array_equal(mlp["gate"]["weight"], mlp["up"]["weight"])
    assert (np.asarray(params["final_norm"]["scale"]) == 1).all()
    assert (np.asarray(query["bias"]) == 0).all()
    other = init(jax.random.key(1))
    assert not np.array_equal(params["embed"]["weight"], other["embed"]["weight"])


def test_embeddings_are_scaled_in_the_type_of_activations(tiny_config, lively_params):
    """√32 = 5.657 is 5.65625 in bfloat16, and the product is rounded there."""
    model = Transformer(tiny_config(dtype="bfloat16", param_dtype="bfloat16", scale_embeddings=True))
    params, tokens = lively_params(model), np.array([[3, 0, 63]])
    rows = np.asarray(params["embed"]["weight"], np.float32)[tokens]
    ours = jax.jit(lambda params: model.embed(params, tokens).astype(jnp.float32))(params)
    np.testing.assert_array_equal(ours, (rows * np.float32(5.65625)).astype(jnp.bfloat16).astype(np.float32))


def test_param_dtype_is_that_of_storage(tiny_config):
    abstract = Transformer(tiny_config(param_dtype="bfloat16", **EVERYTHING)).abstract_params()
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("bfloat16")}


def test_equal_configurations_share_a_compiled_program(tiny_config, lively_params):
    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def logits(model: Transformer, params: Params, tokens: jax.Array) -> jax.Array:
        return model.logits(params, tokens)

    params, tokens = lively_params(Transformer(tiny_config())), np.zeros((1, 2), np.int32)
    for _ in range(2):
        logits(Transformer(tiny_config()), params, tokens)
    assert Transformer(tiny_config()) != Transformer(tiny_config(num_layers=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, r"num_heads=6 .* num_kv_heads=4"),
        ({"head_dim": 5}, "head_dim=5"),
        ({"vocab_size": 0}, "vocab_size=0 must be positive"),
        ({"num_layers": -1}, "num_layers=-1 must be positive"),
        ({"sliding_windows": (3, 4, 5)}, "layer_kinds has 3 entries for num_layers=2"),
        ({"sliding_windows": ()}, "layer_kinds has 0 entries"),
        ({"sliding_windows": (3, 0)}, "LayerKind.window=0 must be at least 1"),
        ({"norms": "none"}, "LayerKind.norms='none' must be one of"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"param_dtype": "float64"}, "param_dtype='float64'"),
        ({"remat": "some"}, "remat='some'"),
    ],
)
def test_impossible_configurations_raise(changes, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
