"""The compiled sampler: the same rows on every mesh, noise by step, one compilation, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.models.config import LoraConfig, Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh, parameter_shardings, replicated
from jaxrl_llm.training.compilation import CompilationCounter


def test_every_mesh_samples_the_same_rows(
    mesh_config, tiny_config, lively_params, make_sampler, prompts, key, assert_same
):
    """Parameters lie sharded on the mesh; fsdp 8 and data 2 × fsdp 4 must cut groups, since there are 4 prompts."""
    model = Transformer(tiny_config(tie_embeddings=False, sliding_windows=(4, None)))
    params = lively_params(model)
    settings = {"group": 4, "temperature": 0.8, "max_tokens": 12}
    expected = make_sampler(model, **settings)(params, *prompts, key, 2)
    mesh = make_mesh(mesh_config)
    sharded = jax.device_put(params, parameter_shardings(mesh, model.logical_axes(), params))
    ours = make_sampler(model, mesh=mesh, **settings)(sharded, *prompts, key, 2)
    assert_same(ours, expected, atol=1e-4)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(ours))


@pytest.mark.parametrize(
    ("mesh_sizes", "tensor"),
    [({"data": 2, "fsdp": 4}, 4), ({"data": 8}, 2), ({"fsdp": 2, "tensor": 4}, None)],
    ids=["more than the learner", "of fewer copies", "as the learner"],
)
def test_tensor_of_the_sampler_samples_the_same_rows(
    mesh_sizes, tensor, tiny_config, lively_params, make_sampler, prompts, key, assert_same
):
    """Heads of keys and values are repeated; adapters are merged on the way."""
    model = Transformer(tiny_config(num_kv_heads=2, attention_bias=True, lora=LoraConfig(rank=2)))
    params, mesh = lively_params(model), make_mesh(MeshConfig(**mesh_sizes))
    expected = make_sampler(model)(params, *prompts, key, 2)
    ours = make_sampler(model, mesh=mesh, tensor=tensor)(
        jax.device_put(params, model.shardings(mesh)), *prompts, key, 2
    )
    assert_same(ours, expected, atol=1e-4)
    assert all(leaf.sharding == replicated(mesh) for leaf in jax.tree.leaves(ours))


@pytest.mark.parametrize("tensor", [2, 4])
def test_slots_on_a_mesh(tensor, tiny_config, lively_params, make_sampler, prompts, key, assert_same):
    """With 4, the sampler's rows end in the midst of `fsdp`."""
    model = Transformer(tiny_config())
    params = lively_params(model)
    tokens, lengths = prompts
    expected = make_sampler(model, group=8)(params, tokens[:2], lengths[:2], key, 2)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    ours = make_sampler(model, group=8, slots=2, mesh=mesh, tensor=tensor)(params, tokens[:2], lengths[:2], key, 2)
    assert_same(ours, expected, atol=1e-4)


@pytest.mark.parametrize("slots", [None, 1])
def test_devices_decode_without_a_word_but_that_they_have_ended(slots, tiny_config, lively_params, make_sampler, key):
    """Where rows are split and weights are not, the loop sends nothing else from device to device."""
    model = Transformer(tiny_config())
    sampler = make_sampler(model, group=2, slots=slots, mesh=make_mesh(MeshConfig(data=2, fsdp=4)))
    tokens, lengths = np.zeros((8, 5), np.int32), np.full(8, 5, np.int32)
    with jax.set_mesh(sampler.mesh):
        program = jax.jit(sampler.sample, out_shardings=replicated(sampler.mesh))
        text = program.lower(lively_params(model), tokens, lengths, key, np.int32(0)).compile().as_text()
    pmax = ("s32[]", "all-reduce", "while/cond/pmax")
    messages = re.findall(r" = (\S+) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(.*(while/\w+/\w+)", text)
    # Every few steps: of the outer loop whether all have ended, and of slots whether any waits for prompts.
    expected = [("pred[]", "all-reduce", "while/cond/reduce_or")] if slots is None else 2 * [pmax]
    assert messages == expected


def test_noise_differs_between_steps_keys_prompts_and_samples(tiny_config, lively_params, make_sampler, key):
    model = Transformer(tiny_config())
    params = lively_params(model)
    prompt, lengths = np.full((4, 6), 5, np.int32), np.array([3, 3, 3, 3])
    sampler = make_sampler(model, group=4, stop_tokens=())

    def tokens(key: np.ndarray, step: int) -> np.ndarray:
        return np.asarray(sampler(params, prompt, lengths, key, step).completion)

    with CompilationCounter() as counter:
        first = tokens(key, 0)
        assert len({tuple(row) for row in first.reshape(-1, 8)}) == 16  # equal prompts, yet different rows
        mark = counter.mark()
        np.testing.assert_array_equal(tokens(key, 0), first)
        others = [tokens(key, 1), tokens(key, 2), tokens(key + np.uint32(1), 0)]
        assert counter.since(mark) == {}
    for number, other in enumerate(others):
        assert not (other == first).all(axis=-1).any(), number
    assert not (others[0] == others[1]).all(axis=-1).any()


def test_the_given_parameters_are_those_that_sample(tiny_config, lively_params, make_sampler, prompts, key):
    """Nothing of the first call's parameters is kept in the program."""
    model = Transformer(tiny_config())
    sampler = make_sampler(model)
    first = sampler(lively_params(model), *prompts, key, 0)
    other = sampler(lively_params(model, seed=1), *prompts, key, 0)
    assert not np.array_equal(first.completion, other.completion)


def test_the_rollout_type_may_be_narrower(tiny_config, lively_params, make_sampler, prompts, key):
    """It rounds the log-probs, and changes few tokens."""
    model = Transformer(tiny_config())
    params = lively_params(model)
    exact = make_sampler(model)(params, *prompts, key, 0)
    rounded = make_sampler(model, dtype="bfloat16")(params, *prompts, key, 0)
    first, other = np.asarray(exact.logprobs)[..., 0], np.asarray(rounded.logprobs)[..., 0]
    same = np.asarray(exact.completion)[..., 0] == np.asarray(rounded.completion)[..., 0]
    assert same.mean() > 0.5
    gap = np.abs(first - other)[same]
    assert 0 < gap.max() < 0.2


def test_scales_of_norms_are_not_rounded(tiny_config, lively_params, make_sampler, prompts, key):
    """The sampler is no farther from the learner than where scales are such that rounding changes nothing."""
    model = Transformer(tiny_config(dtype="bfloat16", qk_norm=True))
    sampler, learned = make_sampler(model, group=16, stop_tokens=()), jax.jit(Scorer(model))

    def gap(params: Params) -> float:
        rollout = sampler(params, *prompts, key, 0)
        return float(np.mean(np.abs(learned(params, rollout).logprobs - rollout.logprobs)))

    def representable(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype("bfloat16").astype("float32") if path[-1].key == "scale" else leaf

    given = [lively_params(model, seed) for seed in range(3)]
    rounded = [jax.tree_util.tree_map_with_path(representable, params) for params in given]
    assert np.mean([gap(params) for params in given]) < 1.1 * np.mean([gap(params) for params in rounded])


def test_lengths_that_do_not_fit_raise(tiny_config, lively_params, make_sampler, prompts, key):
    model = Transformer(tiny_config(max_position_embeddings=12))
    params = lively_params(model)
    tokens, _ = prompts
    sampler = make_sampler(model)
    for lengths in ([3, 7, 1, 4], [3, 0, 1, 4], [3, 3, 3]):
        with pytest.raises(ValueError, match=r"prompt lengths .* do not fit prompts of shape \(4, 6\)"):
            sampler(params, tokens, np.array(lengths), key, 0)
    with pytest.raises(ValueError, match=r"prompt lengths \[\] do not fit prompts of shape \(0, 6\)"):
        sampler(params, tokens[:0], np.array([]), key, 0)
    with pytest.raises(ValueError, match=r"5 tokens and sampling.max_tokens=8 exceed the model's 12 positions"):
        sampler(params, tokens, np.array([3, 5, 1, 4]), key, 0)
    with pytest.raises(ValueError, match=r"max_prompt_length=13 is more than the model's 12 positions, .* has 4"):
        sampler.check_length(4, width=13)
    sampler.check_length(4, width=12)
    sampler(params, tokens, np.array([3, 4, 1, 4]), key, 0)  # 4 + 8 is just possible


def test_tokens_that_the_model_does_not_know_raise(tiny_config, lively_params, make_sampler, prompts, key):
    """In prompts, not at their padding."""
    model = Transformer(tiny_config())
    params, (tokens, lengths) = lively_params(model), prompts
    assert lengths[0] == 3
    for token in (64, -1):
        other = tokens.copy()
        other[0, 3] = token
        make_sampler(model)(params, other, lengths, key, 0)
        other[0, 2] = token
        with pytest.raises(ValueError, match=rf"token {token} at place 2 of prompt 0 .* vocabulary of 64"):
            make_sampler(model)(params, other, lengths, key, 0)


def test_settings_that_do_not_fit_raise(tiny_config, lively_params, make_sampler, prompts, key):
    model = Transformer(tiny_config())
    with pytest.raises(ValueError, match=r"stop tokens \[64\] are outside the vocabulary of 64"):
        make_sampler(model, stop_tokens=(1, 64))
    with pytest.raises(ValueError, match=r"stop tokens \[-1\]"):
        make_sampler(model, stop_tokens=(-1,))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_sampler(model, group=0)
    with pytest.raises(ValueError, match=r"sampling\.tensor=3 must be a multiple"):
        make_sampler(model, tensor=3, mesh=make_mesh(MeshConfig(fsdp=8)))
    with pytest.raises(ValueError, match=r"tensor axis of 8 devices .* 4 query heads"):
        make_sampler(Transformer(tiny_config(num_heads=4)), tensor=8, mesh=make_mesh(MeshConfig(fsdp=8)))
    sampler = make_sampler(model, group=3, mesh=make_mesh(MeshConfig(fsdp=8)))
    with pytest.raises(ValueError, match="4 prompts × 3 samples cannot be split over the 8 row shards"):
        sampler(lively_params(model), *prompts, key, 0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (np.ones((4, 2), int), r"shape \(4, 2\) for 4 prompts × 3 samples .* outside of that are \[\]"),
        (np.zeros((0, 3), int), r"shape \(0, 3\) for 4 prompts"),
        (np.array([[1, 2, 8]] * 3 + [[0, 8, 9]]), r"from 1 to sampling.max_tokens=8; outside of that are \[0, 9\]"),
    ],
)
def test_limits_that_do_not_fit_raise(limits, message, tiny_config, lively_params, make_sampler, prompts, key):
    model = Transformer(tiny_config())
    with pytest.raises(ValueError, match=message):
        make_sampler(model)(lively_params(model), *prompts, key, 0, limits)
