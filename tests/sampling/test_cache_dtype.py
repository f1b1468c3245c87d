"""Keys and values kept in fewer bits: what is sampled is what the rounded ones say, whoever decodes it where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling import flight
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh, parameter_shardings
from jaxrl_llm.types import Rollout

TOKENS, WINDOWS = 44, (5, None)


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short completion has several."""
    monkeypatch.setattr(flight, "page_tokens", lambda: 8)


@pytest.fixture(scope="module")
def ragged() -> tuple[np.ndarray, np.ndarray]:
    """Four prompts of 1 to 19 tokens."""
    tokens = np.random.default_rng(3).integers(10, 64, (4, 19)).astype(np.int32)
    return tokens, np.array([3, 16, 1, 19], np.int32)


def make(model: Transformer, mesh: Mesh, **settings: Any) -> Sampler:
    config = SamplingConfig(**{"max_tokens": TOKENS, "slots": 5, "cache_dtype": "int8", **settings})
    return Sampler(model, config, group=4, stop_tokens=(3, 9), mesh=mesh)


def rounded(x: jax.Array, dtype: str) -> jax.Array:
    """Entries `[…, H]` as they are kept."""
    if dtype != "int8":
        return x.astype(dtype).astype(x.dtype)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    return jnp.round(x / scale) * scale


def logprobs_by_rounded(model: Transformer, params: Params, rollout: Rollout, dtype: str) -> jax.Array:
    """`[P, G, Tc]` of whole texts: prompts read themselves as they are, and completions everything rounded."""
    prompts, group, tokens = rollout.completion.shape
    length = jnp.repeat(rollout.prompt_lengths, group)[:, None]
    width = rollout.prompt.shape[1] + tokens
    text = jnp.pad(jnp.repeat(rollout.prompt, group, axis=0), ((0, 0), (0, tokens)))
    own = length + jnp.arange(tokens)
    text = text.at[jnp.arange(len(text))[:, None], own].set(rollout.completion.reshape(-1, tokens))
    place = jnp.arange(width)

    def make_attention(window: int | None) -> Callable[..., jax.Array]:
        above = place[:, None] - place
        seen = (above >= 0) & (above < (window or width))

        def mixed(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
            scores = jnp.einsum("bqnh,bknh->bnqk", query, key) * query.shape[-1] ** -0.5
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            return jnp.einsum("bnqk,bknh->bqnh", weights, value)

        def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, sinks: None) -> jax.Array:
            of_prompt = (place < length)[..., None, None]
            coarse = mixed(query, rounded(key, dtype), rounded(value, dtype))
            return jnp.where(of_prompt, mixed(query, key, value), coarse)

        return attend

    positions = jnp.broadcast_to(place, text.shape)
    x = model.run_layers(params, model.embed(params, text), positions, make_attention).states
    states = jnp.take_along_axis(model.norm(params, x), own[..., None] - 1, axis=1)
    logprobs = jax.nn.log_softmax(model.head_logits(params, states))
    index = rollout.completion.reshape(-1, tokens)[..., None]
    return jnp.take_along_axis(logprobs, index, axis=-1).reshape(prompts, group, tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_rounded_numbers_are_sampled_from(dtype, tiny_config, lively_params, one_device, ragged, key):
    """Exactly but where sums in another order round to another neighbour; a learner that rounds nothing is far off."""
    model = Transformer(tiny_config(sliding_windows=WINDOWS))
    params = lively_params(model)
    rollout = make(model, one_device, cache_dtype=dtype)(params, *ragged, key, 0)
    mask = np.asarray(rollout.mask)
    assert 0.2 < mask.mean() < 0.9
    expected = jax.jit(lambda params, rollout: logprobs_by_rounded(model, params, rollout, dtype))(params, rollout)
    learned = jax.jit(Scorer(model))(params, rollout).logprobs
    off, gap = (np.abs(np.asarray(x) - rollout.sampler_logprobs)[mask] for x in (expected, learned))
    assert np.mean(off < 1e-5) > 0.9
    assert off.mean() < 0.05 * gap.mean()
    assert 1e-3 < gap.mean() < 0.05
    np.testing.assert_array_equal(rollout.logprobs, rollout.sampler_logprobs)


MESH = {"fsdp": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("settings", "axes"),
    [
        ({"slots": None, "speculate": "prompt", "speculative_tokens": 2}, {}),
        ({"slots": 2, "scan_layers": True}, MESH),
        pytest.param({"slots": 2, "scan_layers": True, "attention": "pallas_interpret"}, MESH, marks=pytest.mark.slow),
    ],
    ids=["speculated", "on a mesh", "by the kernel on a mesh"],
)
def test_tokens_are_the_same(settings, axes, tiny_config, lively_params, one_device, ragged, key):
    """Log-probs but where sums in another order round to another neighbour."""
    model = Transformer(tiny_config(sliding_windows=WINDOWS, num_heads=8, num_kv_heads=4))
    params = lively_params(model)
    expected = make(model, one_device)(params, *ragged, key, 1)
    mesh = make_mesh(MeshConfig(**axes)) if axes else one_device
    sharded = jax.device_put(params, parameter_shardings(mesh, model.logical_axes(), params))
    found = make(model, mesh, **settings)(sharded, *ragged, key, 1)
    for name in ("completion_lengths", "completion", "finished"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    off = np.abs(np.asarray(found.logprobs) - expected.logprobs)[np.asarray(expected.mask)]
    assert np.mean(off < 1e-5) > 0.9
    assert off.max() < 0.02


def test_others_are_refused():
    with pytest.raises(ValueError, match=r"sampling.cache_dtype='int4' must be None, or one of \('bfloat16', 'int8'\)"):
        SamplingConfig(cache_dtype="int4")  # type: ignore[arg-type]
