"""The decoding loop: what it samples is what the learner scores, whatever the order in which slots did it."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jaxrl_llm.logprobs import TokenScores, token_scores
from jaxrl_llm.models.config import LayerKind, Params, RopeConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.types import Rollout

TOO_WIDE_TO_TURN = 8200
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tied": {},
    "wide": {"mlp_dim": TOO_WIDE_TO_TURN},
    "windows_caps": {
        "tie_embeddings": False,
        "num_layers": 3,
        "sliding_windows": (3, None, 5),
        "attention_softcap": 1.5,
        "logit_softcap": 4.0,
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
    "qk_norm_biases_yarn": {
        "qk_norm": True,
        "attention_bias": True,
        "rope": RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=8),
    },
}


def teacher_forced(model: Transformer, params: Params, rollout: Rollout, temperature: float = 1.0) -> TokenScores:
    """Scores of the sampled tokens by the learner's pass."""

    @jax.jit
    def score(params: Params, rollout: Rollout) -> TokenScores:
        hidden = model.hidden(params, rollout)
        cap = model.config.logit_softcap
        return token_scores(hidden, model.head(params), rollout.completion, temperature=temperature, logit_softcap=cap)

    return score(params, rollout)


def teacher_forced_logits(model: Transformer, params: Params, rollout: Rollout) -> np.ndarray:
    def logits(params: Params, rollout: Rollout) -> Array:
        hidden = model.hidden(params, rollout)
        return model.head_logits(params, hidden)

    return np.asarray(jax.jit(logits)(params, rollout))


def rows(rollout: Rollout, prompts: slice, samples: slice = slice(None)) -> Rollout:
    """A part of a rollout."""
    part = {
        name: getattr(rollout, name)[prompts, samples]
        for name in ("completion", "completion_lengths", "finished", "logprobs", "sampler_logprobs")
    }
    return rollout.replace(prompt=rollout.prompt[prompts], prompt_lengths=rollout.prompt_lengths[prompts], **part)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_are_those_of_the_learner(name, tiny_config, lively_params, make_sampler, prompts, key):
    """Before the first update every ratio is 1."""
    model = Transformer(tiny_config(**ARCHITECTURES[name]))
    params = lively_params(model)
    rollout = make_sampler(model, temperature=0.7, max_tokens=20)(params, *prompts, key, 0)
    mask = np.asarray(rollout.mask)
    assert 0 < mask.mean() < 1  # ragged
    for ours, temperature in ((rollout.sampler_logprobs, 0.7), (rollout.logprobs, 1.0)):
        expected = np.asarray(teacher_forced(model, params, rollout, temperature).logprobs)
        np.testing.assert_allclose(np.asarray(ours)[mask], expected[mask], atol=1e-4)
        assert (np.asarray(ours)[~mask] == 0).all()


@pytest.mark.parametrize(("width", "turned"), [(48, True), (TOO_WIDE_TO_TURN, False)])
def test_small_weights_stay_turned_in_the_loop(width, turned, tiny_config, make_sampler, prompts, key):
    """XLA must not undo the turning of an MLP's two weights `[width, 32]` and its one `[32, width]`."""
    sampler = make_sampler(Transformer(tiny_config(mlp_dim=width)))
    with jax.set_mesh(sampler.mesh):
        arguments = sampler.model.abstract_params(), *prompts, jax.random.key_data(key), np.int32(0)
        program = jax.jit(sampler.sample).lower(*arguments).compile().as_text()
    carried = max((line.partition(" while(")[0] for line in program.splitlines() if " while(" in line), key=len)
    layers = sampler.model.config.num_layers
    shapes = carried.count(f"f32[32,{width}]"), carried.count(f"f32[{width},32]")
    assert shapes == ((2 * layers, layers) if turned else (layers, 2 * layers))


def test_rows_end_with_a_stop_token_or_at_the_limit(tiny_config, lively_params, make_sampler, prompts, key):
    model = Transformer(tiny_config())
    sampler = make_sampler(model)
    rollout = sampler(lively_params(model), *prompts, key, 0)
    completion, lengths, finished = map(np.asarray, (rollout.completion, rollout.completion_lengths, rollout.finished))
    assert completion.shape == (4, 3, 8)
    assert finished.any()
    assert not finished.all()
    for index in np.ndindex(4, 3):
        length = lengths[index]
        is_stop = np.isin(completion[index], sampler.stop_tokens)
        if finished[index]:
            assert is_stop[length - 1]  # included, and counted
        else:
            assert length == 8
        assert not is_stop[: length - 1].any()
        assert (completion[index][length:] == 0).all()
    np.testing.assert_array_equal(rollout.prompt, prompts[0])
    np.testing.assert_array_equal(rollout.prompt_lengths, prompts[1])


def test_a_stop_token_at_the_limit_counts_as_finished(tiny_config, lively_params, make_sampler, prompts, key):
    """With one token each, a row is finished if, and only if, that token is a stop token."""
    model = Transformer(tiny_config())
    sampler = make_sampler(model, max_tokens=1, group=16, stop_tokens=tuple(range(32)))
    rollout = sampler(lively_params(model), *prompts, key, 0)
    assert rollout.completion.shape == (4, 16, 1)
    assert (np.asarray(rollout.completion_lengths) == 1).all()
    finished = np.asarray(rollout.finished)
    np.testing.assert_array_equal(finished, np.asarray(rollout.completion)[..., 0] < 32)
    assert 0 < finished.mean() < 1


def test_without_stop_tokens_all_rows_fill_the_width(tiny_config, lively_params, make_sampler, prompts, key):
    model = Transformer(tiny_config())
    rollout = make_sampler(model, group=4, stop_tokens=())(lively_params(model), *prompts, key, 0)
    assert (np.asarray(rollout.completion_lengths) == 8).all()
    assert not np.asarray(rollout.finished).any()


def test_greedy_is_the_argmax_of_the_teacher_forced_logits(tiny_config, lively_params, make_sampler, prompts, key):
    model = Transformer(tiny_config(**ARCHITECTURES["windows_caps"]))
    params = lively_params(model)
    rollout = make_sampler(model, temperature=0.0, stop_tokens=(), group=2)(params, *prompts, key, 0)
    logits = teacher_forced_logits(model, params, rollout)
    np.testing.assert_array_equal(rollout.completion, logits.argmax(axis=-1))
    np.testing.assert_array_equal(rollout.completion[:, 0], rollout.completion[:, 1])
    assert len(np.unique(np.asarray(rollout.completion))) > 5


def test_truncated_rollouts_stay_in_the_filtered_set(tiny_config, lively_params, make_sampler, prompts, key):
    """Log-probs are under the distribution that was drawn from: top-3 of the tempered logits, renormalised."""
    model = Transformer(tiny_config())
    params = lively_params(model)
    rollout = make_sampler(model, temperature=1.5, top_k=3)(params, *prompts, key, 0)
    logits = teacher_forced_logits(model, params, rollout).astype(np.float64)
    best = np.argsort(-logits, axis=-1)[..., :3]
    tokens, mask = np.asarray(rollout.completion), np.asarray(rollout.mask)
    assert (best == tokens[..., None]).any(axis=-1)[mask].all()
    kept = np.exp(np.take_along_axis(logits, best, axis=-1) / 1.5).sum(axis=-1)
    chosen = np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] / 1.5
    np.testing.assert_allclose(np.asarray(rollout.sampler_logprobs)[mask], (chosen - np.log(kept))[mask], atol=1e-4)


def test_recycled_slots_sample_the_same_rows(tiny_config, lively_params, make_sampler, prompts, key, assert_same):
    model = Transformer(tiny_config(sliding_windows=(3, None)))
    params = lively_params(model)
    make_sampler = functools.partial(make_sampler, model, group=5, max_tokens=20)
    whole = make_sampler()(params, *prompts, key, 3)
    assert len(np.unique(np.asarray(whole.completion_lengths))) > 3
    for slots in (1, 3, 100):
        assert_same(make_sampler(slots=slots)(params, *prompts, key, 3), whole)


def test_rows_do_not_depend_on_the_batch(tiny_config, lively_params, make_sampler, prompts, key, assert_same):
    """Neither on other prompts, nor on how many samples there are, nor on the width of the prompts' rows."""
    model = Transformer(tiny_config())
    params = lively_params(model)
    tokens, lengths = prompts
    whole = make_sampler(model)(params, tokens, lengths, key, 3)
    assert_same(make_sampler(model)(params, tokens[:2], lengths[:2], key, 3), rows(whole, slice(2)))
    wide = np.pad(tokens, ((0, 0), (0, 3)), constant_values=63)
    ours = make_sampler(model, group=2)(params, wide, lengths, key, 3)
    assert_same(ours, rows(whole, slice(4), slice(2)))


def test_a_longer_limit_prolongs_rows_and_changes_no_token(tiny_config, lively_params, make_sampler, prompts, key):
    model = Transformer(tiny_config())
    params = lively_params(model)
    short = make_sampler(model, max_tokens=4)(params, *prompts, key, 3)
    long = make_sampler(model, max_tokens=8)(params, *prompts, key, 3)
    np.testing.assert_array_equal(
        np.minimum(np.asarray(long.completion_lengths), 4), np.asarray(short.completion_lengths)
    )
    np.testing.assert_array_equal(np.asarray(long.completion)[..., :4] * np.asarray(short.mask), short.completion)


@pytest.mark.parametrize("slots", [None, 1])
def test_the_loop_ends_when_all_rows_have_ended(slots, tiny_config, lively_params, make_sampler, key):
    """Hundreds of steps take far longer than one: the least times of several runs, since others may use the machine."""
    model = Transformer(tiny_config(max_position_embeddings=512, num_layers=1))
    params = lively_params(model)
    prompt, lengths = np.zeros((1, 2), np.int32), np.array([2])

    def seconds(stop_tokens: tuple[int, ...]) -> float:
        sampler = make_sampler(model, max_tokens=400, group=2, slots=slots, stop_tokens=stop_tokens)
        jax.block_until_ready(sampler(params, prompt, lengths, key, 0))
        taken = []
        for step in range(1, 10):
            begin = time.perf_counter()
            jax.block_until_ready(sampler(params, prompt, lengths, key, step))
            taken.append(time.perf_counter() - begin)
        return min(taken)

    assert seconds(tuple(range(64))) < 0.3 * seconds(())


def test_bfloat16_decoding_is_near_the_learner(tiny_config, lively_params, make_sampler, prompts, key):
    model = Transformer(tiny_config(dtype="bfloat16"))
    params = lively_params(model)
    rollout = make_sampler(model)(params, *prompts, key, 0)
    assert rollout.logprobs.dtype == jnp.float32
    mask = np.asarray(rollout.mask)
    gap = np.abs(np.asarray(teacher_forced(model, params, rollout).logprobs) - np.asarray(rollout.logprobs))[mask]
    assert gap.mean() < 0.1
