"""Guided search against the same search written as loops over lists, and against sampling without a guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.score_models.search import Beams, BeamSearch, BeamSearchConfig, Prefixes
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.compilation import CompilationCounter

EOS, SEPARATOR, VOCABULARY, WIDTH = 2, 3, 16, 14
CONFIG = BeamSearchConfig(beams=8, width=2, max_steps=5, max_step_tokens=4)
WORTH = np.where(np.arange(VOCABULARY) % 3 == 1, 1.0, -0.3).astype(np.float32)
PROMPT, LENGTHS = np.array([[4, 5, 6], [7, 0, 0], [5, 5, 0], [9, 9, 9]]), np.array([3, 1, 2, 3])
KEY = np.array([0, 1], np.uint32)


def total_worth(worth: jax.Array, prefixes: Prefixes) -> jax.Array:
    """A guide made by hand: every token has a worth of its own; a cut-off solution has none."""
    return jnp.sum(jnp.where(prefixes.mask, worth[prefixes.completion], 0.0), axis=-1)


@pytest.fixture(scope="module")
def model(tiny_config: Callable[..., Any]) -> Transformer:
    return Transformer(tiny_config(vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def params(model: Transformer) -> Params:
    return jax.jit(model.init)(jax.random.key(0))


def make_search(model: Transformer, config: BeamSearchConfig = CONFIG, **changes: Any) -> BeamSearch:
    settings = {"sampling": SamplingConfig(max_tokens=WIDTH), "separators": (SEPARATOR,), "stop_tokens": (EOS,)}
    mesh = make_mesh(devices=jax.devices()[:1])
    return BeamSearch(model, total_worth, config, **{**settings, "mesh": mesh, **changes})


@pytest.fixture(scope="module")
def search(model: Transformer) -> BeamSearch:
    return make_search(model)


@pytest.fixture(scope="module")
def found(search: BeamSearch, params: Params) -> Beams:
    return jax.tree.map(np.asarray, search(params, WORTH, PROMPT, LENGTHS, KEY, 7))


def solutions(beams: Beams, prompt: int) -> list[tuple[bool, float, list[int]]]:
    return [
        (
            bool(beams.finished[prompt, n]),
            float(beams.scores[prompt, n]),
            row[: beams.completion_lengths[prompt, n]].tolist(),
        )
        for n, row in enumerate(beams.completion[prompt])
        if beams.mask[prompt, n]
    ]


def by_loops(sampler: Sampler, params: Params, config: BeamSearchConfig) -> list[list[tuple[bool, float, list[int]]]]:
    """The search as the paper tells it, on lists; the same noise."""
    noise = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(KEY)), 7))
    count, keep = config.beams, config.beams // config.width
    pool: list[list[list[int]]] = [[[] for _ in range(count)] for _ in PROMPT]
    done: list[list[tuple[bool, float, list[int]]]] = [[] for _ in PROMPT]

    def ranked(items: list[tuple[bool, float, list[int]]]) -> list[tuple[bool, float, list[int]]]:
        return sorted(items, key=lambda item: (not item[0], -item[1]))[:count]

    def worth(tokens: list[int]) -> float:
        return float(sum(WORTH[token] for token in tokens))

    for number in range(config.max_steps):
        rows = np.zeros((len(PROMPT) * count, PROMPT.shape[1] + WIDTH), np.int32)
        lengths = np.ones(len(rows), np.int32)
        for p, beams in enumerate(pool):
            for n, beam in enumerate(beams):
                whole = [*PROMPT[p, : LENGTHS[p]], *beam]
                rows[p * count + n, : len(whole)], lengths[p * count + n] = whole, len(whole)
        rollout = sampler(params, rows, lengths, noise, number)
        for p, beams in enumerate(pool):
            grown: list[list[int]] = []
            for n, beam in enumerate(beams):
                row = p * count + n
                new = np.asarray(rollout.completion[row, 0])[: int(rollout.completion_lengths[row, 0])]
                tokens = [*beam, *new.tolist()][:WIDTH]
                if tokens not in grown:
                    grown.append(tokens)
            ends = [tokens for tokens in grown if tokens[-1] == EOS or len(tokens) == WIDTH]
            done[p] = ranked([*done[p], *((tokens[-1] == EOS, worth(tokens), tokens) for tokens in ends)])
            rest = sorted((tokens for tokens in grown if tokens not in ends), key=lambda tokens: -worth(tokens))[:keep]
            full = sum(finished for finished, *_ in done[p]) >= count
            if not rest or full:
                pool[p] = []
                continue
            pool[p] = [rest[n % len(rest)] for n in range(count)]  # they take turns; few get more copies
    for p, beams in enumerate(pool):
        left = [tokens for n, tokens in enumerate(beams) if tokens not in beams[:n]]
        done[p] = ranked([*done[p], *((False, worth(tokens), tokens) for tokens in left)])
    return done


def test_search_is_that_of_loops_over_lists(search, found, params):
    expected = by_loops(search.sampler, params, CONFIG)
    finished = [sum(solution[0] for solution in of_prompt) for of_prompt in expected]
    assert max(finished) > 1 and min(map(len, expected)) < 16  # else there is little to see
    for prompt, of_prompt in enumerate(expected):
        ours = solutions(found, prompt)
        assert [(done, tokens) for done, _, tokens in ours] == [(done, tokens) for done, _, tokens in of_prompt]
        np.testing.assert_allclose([s for _, s, _ in ours], [s for _, s, _ in of_prompt], rtol=1e-5)


def test_the_guide_leads_to_better_solutions_than_sampling(model, found, params):
    """Best of as many samples as the search writes at once, under the same guide."""
    sampler = Sampler(
        model, SamplingConfig(max_tokens=WIDTH), group=8, stop_tokens=(EOS,), mesh=make_mesh(devices=jax.devices()[:1])
    )
    rollout = sampler(params, PROMPT, LENGTHS, KEY, 0)
    prefixes = Prefixes(PROMPT, LENGTHS, rollout.completion, rollout.mask, rollout.finished)
    unguided = np.asarray(total_worth(jnp.asarray(WORTH), prefixes)).max(axis=1)
    guided = np.where(found.mask, found.scores, -np.inf).max(axis=1)
    assert guided.mean() > unguided.mean() + 1, (guided, unguided)


def test_another_batch_does_not_compile_again(search, found, params):
    del found
    with CompilationCounter() as counter:
        again = search(params, WORTH, PROMPT[::-1], LENGTHS[::-1], KEY, 8)
    assert not counter.counts
    assert np.asarray(again.mask).any()


def test_a_mesh_finds_the_same(model, found, params):
    ours = make_search(model, mesh=make_mesh())(params, WORTH, PROMPT, LENGTHS, KEY, 7)
    np.testing.assert_array_equal(ours.completion, found.completion)
    np.testing.assert_allclose(ours.scores, found.scores, rtol=1e-5)


def test_settings_that_cannot_work_raise(model, search, params):
    with pytest.raises(ValueError, match="width=3 must divide beams=4"):
        BeamSearchConfig(width=3)
    with pytest.raises(ValueError, match="max_steps=0"):
        BeamSearchConfig(max_steps=0)
    with pytest.raises(ValueError, match="at temperature 0 the 2 continuations"):
        make_search(model, sampling=SamplingConfig(max_tokens=4, temperature=0.0))
    with pytest.raises(ValueError, match=r"sampling.stop=\('a',\): a search ends texts by stop tokens alone"):
        make_search(model, sampling=SamplingConfig(max_tokens=4, stop=("a",)))
    with pytest.raises(ValueError, match="must be given, and be no stop tokens"):
        make_search(model, separators=(EOS,))
    with pytest.raises(ValueError, match="do not fit prompts"):
        search(params, WORTH, PROMPT, LENGTHS + 1, KEY, 0)
    with pytest.raises(ValueError, match="exceed the model's 128 positions"):
        make_search(model, sampling=SamplingConfig(max_tokens=126))(params, WORTH, PROMPT, LENGTHS, KEY, 0)
