"""Speculation: what is proposed changes how many passes a completion takes, and nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh

from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.models.config import LayerKind
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling import flight
from jaxrl_llm.sampling.decode import row_keys
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.in_flight import sample_in_flight
from jaxrl_llm.sampling.logits import SamplingConfig, uniforms
from jaxrl_llm.sampling.sampled import Wanted
from jaxrl_llm.sharding import MeshConfig, make_mesh, parameter_shardings
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.types import Rollout

TOKENS, DRAFTS, GROUP = 44, 3, 3
STOP_TOKENS = (3, 9)
History = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short completion has several, and the ring comes round."""
    monkeypatch.setattr(flight, "page_tokens", lambda: 8)


@pytest.fixture(scope="module")
def ragged() -> History:
    """Six prompts of 1 to 19 tokens, of few words, so that they repeat themselves."""
    tokens = np.random.default_rng(3).integers(10, 16, (6, 19)).astype(np.int32)
    return tokens, np.array([3, 16, 1, 19, 8, 9], np.int32)


def make(model: Transformer, mesh: Mesh, *, group: int = GROUP, greedy: bool = False, **settings: Any) -> Sampler:
    config = SamplingConfig(**{"max_tokens": TOKENS, **settings})
    return Sampler(model, config, group=group, stop_tokens=STOP_TOKENS, mesh=mesh, greedy=greedy)


def completions(rollout: Rollout) -> History:
    return np.asarray(rollout.completion), np.asarray(rollout.completion_lengths)


def histories(right: Rollout, other: Rollout) -> dict[str, History]:
    """The very completions, those of other noise, none, and some of each."""
    (tokens, lengths), (others, their_lengths) = completions(right), completions(other)
    kind = np.arange(lengths.size).reshape(lengths.shape) % 3
    mixed = np.where(kind[..., None] == 0, tokens, others), np.choose(kind, [lengths, their_lengths, 0])
    return {
        "right": (tokens, lengths),
        "other": (others, their_lengths),
        "none": (tokens, np.zeros_like(lengths)),
        "mixed": mixed,
    }


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"num_layers": 3, "sliding_windows": (5, None, 20)},
    "caps": {"attention_softcap": 1.5, "layer_kinds": (LayerKind(window=9), LayerKind(rope=None))},
}


@pytest.mark.parametrize(
    ("name", "slots", "group", "settings"),
    [
        ("plain", None, 1, {"temperature": 0.5}),
        ("windows", 3, 3, {"temperature": 0.5, "scan_layers": True}),
        ("windows", 1, 2, {"temperature": 0}),
        ("caps", 7, 3, {"temperature": 0.7, "top_k": 5}),
    ],
)
def test_tokens_are_those_without(
    name, slots, group, settings, tiny_config, lively_params, one_device, ragged, key, assert_same
):
    """Whatever is proposed; one program serves all histories, and of one sample the right one makes passes full."""
    model = Transformer(tiny_config(**MODELS[name]))
    params = lively_params(model)
    plain = make(model, one_device, group=group, slots=slots, **settings)
    expected, other = (plain(params, *ragged, key, step) for step in (3, 4))
    assert expected.passes is None
    lengths = np.asarray(expected.completion_lengths)
    assert len(np.unique(lengths)) > 2

    ours = make(model, one_device, group=group, slots=slots, speculate="history", speculative_tokens=DRAFTS, **settings)
    passes = {}
    with CompilationCounter() as counter:
        for number, (kind, history) in enumerate(histories(expected, other).items()):
            mark = counter.mark()
            rollout = ours(params, *ragged, key, 3, history=history)
            assert_same(rollout, expected)
            assert number == 0 or counter.since(mark) == {}
            passes[kind] = np.asarray(rollout.passes)
    if group == 1 or ours.config.greedy:
        np.testing.assert_array_equal(passes["right"], -(-lengths // (1 + DRAFTS)))
    assert passes["right"].sum() < passes["none"].sum()
    assert all((took <= lengths).all() for took in passes.values())

    prompt = make(
        model, one_device, group=group, slots=slots, speculate="prompt", speculative_tokens=DRAFTS, **settings
    )
    rollout = prompt(params, *ragged, key, 3)
    assert_same(rollout, expected)
    np.testing.assert_array_equal(rollout.passes, passes["none"])


def test_logprobs_are_those_of_the_learner(tiny_config, lively_params, one_device, ragged, key):
    model = Transformer(tiny_config(num_layers=3, sliding_windows=(5, None, 20)))
    params = lively_params(model)
    ours = make(model, one_device, slots=5, temperature=0.8, speculate="history", speculative_tokens=DRAFTS)
    rollout = ours(params, *ragged, key, 0)
    rollout = ours(params, *ragged, key, 1, history=completions(rollout))
    scores = jax.jit(Scorer(model, temperature=0.8))(params, rollout)
    mask = np.asarray(rollout.mask)
    assert 0.2 < mask.mean() < 0.9
    np.testing.assert_allclose(rollout.sampler_logprobs[mask], scores.logprobs[mask], atol=1e-5)


def test_limits_and_the_greedy_one(tiny_config, lively_params, one_device, ragged, key, assert_same):
    """Both end or turn a completion in the midst of what was proposed."""
    model = Transformer(tiny_config())
    params = lively_params(model)
    limits = np.random.default_rng(0).integers(1, TOKENS + 1, (6, GROUP + 1)).astype(np.int32)
    expected = make(model, one_device, greedy=True)(params, *ragged, key, 0, limits)
    ours = make(model, one_device, greedy=True, slots=4, speculate="history")
    assert_same(ours(params, *ragged, key, 0, limits, completions(expected)), expected)
    assert (np.asarray(expected.completion_lengths) == limits).any()


@pytest.mark.parametrize("mesh_sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}], ids=["fsdp8", "fsdp2_tensor4"])
def test_on_a_mesh(mesh_sizes, tiny_config, lively_params, one_device, ragged, key, assert_same):
    model, (tokens, lengths) = Transformer(tiny_config()), ragged
    params, prompts = lively_params(model), (tokens[:4], lengths[:4])
    settings = {"group": 4, "temperature": 0.5, "max_tokens": 12}
    expected = make(model, one_device, **settings)(params, *prompts, key, 2)
    mesh = make_mesh(MeshConfig(**mesh_sizes))
    sharded = jax.device_put(params, parameter_shardings(mesh, model.logical_axes(), params))
    ours = make(model, mesh, slots=2, speculate="history", **settings)
    rollout = ours(sharded, *prompts, key, 2, history=completions(expected))
    assert_same(rollout, expected, atol=1e-4)
    assert np.sum(rollout.passes) < 0.8 * np.sum(rollout.completion_lengths)


def test_in_bfloat16(tiny_config, lively_params, one_device, ragged, key):
    """Rounding may turn a token, but the learner is no farther away than from one token after the other."""
    model = Transformer(tiny_config(dtype="bfloat16"))
    params, learned = lively_params(model), jax.jit(Scorer(model))
    plain = make(model, one_device, slots=4)(params, *ragged, key, 0)
    ours = make(model, one_device, slots=4, speculate="history")
    rollout = ours(params, *ragged, key, 0, history=completions(plain))
    assert np.sum(rollout.passes) < 0.8 * np.sum(rollout.completion_lengths)

    def gap(rollout: Rollout) -> float:
        return float(np.mean(np.abs(learned(params, rollout).logprobs - rollout.logprobs)[rollout.mask]))

    assert 0 < gap(rollout) < 1.2 * gap(plain)


@pytest.mark.slow
def test_the_distribution_is_that_of_the_model(tiny_config, lively_params):
    """χ² of 200 000 completions of three tokens, proposed from others of the same distribution, at p > 0.001."""
    model = Transformer(tiny_config(vocab_size=6, num_layers=1))
    params, count = lively_params(model), 200_000
    prompt = jnp.array([[2, 5, 1, 5]], jnp.int32)
    texts = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)

    @jax.jit
    def exact() -> jax.Array:
        """Of each text."""
        rows = jnp.concatenate([jnp.repeat(prompt, len(texts), axis=0), jnp.asarray(texts)], axis=1)
        hidden = model.causal(params, rows).states
        logprobs = jax.nn.log_softmax(model.head_logits(params, hidden[:, 3:6]) / 0.7)
        return jnp.exp(jnp.sum(jnp.take_along_axis(logprobs, jnp.asarray(texts)[..., None], axis=-1), axis=(1, 2)))

    config = SamplingConfig(max_tokens=3, temperature=0.7, speculate="history", speculative_tokens=2)

    @jax.jit
    def drawn(seed: jax.Array, history: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = row_keys(jax.random.key(seed), jnp.arange(1), count)
        lengths = jnp.full((1, count), history.shape[-1])
        wanted = Wanted(prompt, jnp.array([4]), uniforms(keys, 3), None, None, (history, lengths))
        sampled = sample_in_flight(
            model, params, wanted, slots=4096, in_loops=False, config=config, stop_tokens=()
        ).sampled
        return sampled.completion, sampled.passes

    first, _ = drawn(0, jnp.zeros((1, count, 3), jnp.int32))
    second, passes = drawn(1, jnp.roll(first, 1, axis=0)[None])
    assert 1 < np.mean(passes) < 2.5  # many proposals are taken, and many are not
    observed = np.bincount(np.asarray(second) @ np.array([36, 6, 1]), minlength=216)
    expected = np.asarray(exact(), np.float64) * count
    np.testing.assert_allclose(expected.sum(), count, rtol=1e-4)
    rare = expected < 5
    cells = [np.append(x[~rare], x[rare].sum()) for x in (observed, expected)]
    statistic = np.sum((cells[0] - cells[1]) ** 2 / np.maximum(cells[1], 1e-9))
    assert scipy.stats.chi2.sf(statistic, len(cells[0]) - 1) > 1e-3


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ((np.zeros((6, 2, TOKENS)), np.zeros((6, 2))), r"shape \(6, 2, 44\) .* for each of 6 prompts × 3 samples"),
        ((np.zeros((6, 3, TOKENS)), np.full((6, 3), 45)), r"at most sampling.max_tokens=44"),
        ((np.full((6, 3, TOKENS), 64), np.ones((6, 3))), r"history has tokens outside the vocabulary of 64"),
    ],
)
def test_a_history_that_does_not_fit_raises(history, message, tiny_config, lively_params, one_device, ragged, key):
    model = Transformer(tiny_config())
    with pytest.raises(ValueError, match=message):
        make(model, one_device, speculate="history")(lively_params(model), *ragged, key, 0, history=history)


def test_what_is_not_asked_for_raises(tiny_config, lively_params, one_device, ragged, key):
    model = Transformer(tiny_config())
    history = np.zeros((6, GROUP, TOKENS)), np.zeros((6, GROUP))
    with pytest.raises(ValueError, match=r"sampling.speculate=prompt proposes no history: set it to history"):
        make(model, one_device, speculate="prompt")(lively_params(model), *ragged, key, 0, history=history)
    with pytest.raises(ValueError, match=r"sampling.speculate='last' must be one of \('off', 'prompt', 'history'\)"):
        SamplingConfig(speculate="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sampling.speculative_tokens=0 must be at least 1"):
        SamplingConfig(speculate="prompt", speculative_tokens=0)
