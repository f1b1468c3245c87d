"""Log-probs and entropies: the chunked pass, the plain one and a float64 loop are one function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl_llm import logprobs
from jaxrl_llm.logprobs import TokenScores, scores_from_logits, token_scores
from jaxrl_llm.masking import fill_masked
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.rows import PaddedLayout
from jaxrl_llm.models.transformer import Transformer


class Case(NamedTuple):
    hidden: np.ndarray
    head: np.ndarray
    tokens: np.ndarray
    to_logprobs: np.ndarray
    """Weights of a scalar that reads both outputs."""
    to_entropy: np.ndarray


def make_case(vocabulary: int = 13, shape: tuple[int, ...] = (2, 3, 4), width: int = 8) -> Case:
    rng = np.random.default_rng(vocabulary)
    return Case(
        rng.normal(size=(*shape, width)).astype(np.float32),
        rng.normal(size=(vocabulary, width)).astype(np.float32),
        rng.integers(0, vocabulary, shape),
        rng.normal(size=shape).astype(np.float32),
        rng.normal(size=shape).astype(np.float32),
    )


def loop(logits: np.ndarray, tokens: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """log p(token) and −Σ p log p, one token at a time."""
    logprobs, entropy = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for index in np.ndindex(tokens.shape):
        scaled = [float(z) / temperature for z in logits[index]]
        highest = max(scaled)
        normalizer = highest + math.log(sum(math.exp(z - highest) for z in scaled))
        logprobs[index] = scaled[tokens[index]] - normalizer
        entropy[index] = -sum(math.exp(z - normalizer) * (z - normalizer) for z in scaled if math.isfinite(z))
    return logprobs, entropy


def bent_logits(case: Case, softcap: float | None) -> np.ndarray:
    logits = case.hidden.astype(np.float64) @ case.head.astype(np.float64).T
    return logits if softcap is None else softcap * np.tanh(logits / softcap)


def with_gradients(scores: Callable[[jax.Array, jax.Array], TokenScores], case: Case) -> tuple[TokenScores, Any]:
    @jax.jit
    def both(hidden: jax.Array, head: jax.Array) -> tuple[TokenScores, Any]:
        def scalar(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, TokenScores]:
            given = scores(hidden, head)
            return jnp.sum(given.logprobs * case.to_logprobs + given.entropy * case.to_entropy), given

        (_, given), gradients = jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(hidden, head)
        return given, gradients

    return both(jnp.asarray(case.hidden), jnp.asarray(case.head))


BENT = {"temperature": 0.7, "logit_softcap": 1.5}
SETTINGS = [
    *(({}, chunk_size) for chunk_size in (None, 4, 13, 100)),
    *((BENT, chunk_size) for chunk_size in (None, 1, 5)),
    ({"temperature": 2.5}, 5),
    ({"logit_softcap": 4.0}, 5),
]


@pytest.mark.parametrize(("settings", "chunk_size"), SETTINGS, ids=str)
def test_equals_a_loop_and_the_plain_pass(settings, chunk_size):
    """Values against a loop; gradients of both outputs against automatic differentiation of the plain pass."""
    case = make_case()
    temperature, softcap = settings.get("temperature", 1.0), settings.get("logit_softcap")
    ours, gradients = with_gradients(
        lambda hidden, head: token_scores(hidden, head, case.tokens, chunk_size=chunk_size, **settings), case
    )
    logprobs, entropy = loop(bent_logits(case, softcap), case.tokens, temperature)
    np.testing.assert_allclose(ours.logprobs, logprobs, atol=2e-5)
    np.testing.assert_allclose(ours.entropy, entropy, atol=2e-5)

    def plain(hidden: jax.Array, head: jax.Array) -> TokenScores:
        logits = hidden @ head.T
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return scores_from_logits(logits, case.tokens, temperature=temperature)

    theirs, expected = with_gradients(plain, case)
    np.testing.assert_allclose(theirs.logprobs, logprobs, atol=2e-5)
    np.testing.assert_allclose(theirs.entropy, entropy, atol=2e-5)
    for a, b in zip(gradients, expected, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_gradient_equals_finite_differences():
    """In float64 differences of the loop, so that one wrong derivation shared by both passes would show."""
    case = make_case(shape=(3,))
    settings: dict[str, Any] = {"temperature": 0.8, "logit_softcap": 2.0}
    _, (to_hidden, to_head) = with_gradients(
        lambda hidden, head: token_scores(hidden, head, case.tokens, chunk_size=5, **settings), case
    )

    def scalar(case: Case) -> float:
        logprobs, entropy = loop(bent_logits(case, 2.0), case.tokens, 0.8)
        return float(np.sum(logprobs * case.to_logprobs + entropy * case.to_entropy))

    rng = np.random.default_rng(0)
    for field, gradient in (("hidden", to_hidden), ("head", to_head)):
        value = getattr(case, field).astype(np.float64)
        direction = rng.normal(size=value.shape)
        up, down = (scalar(case._replace(**{field: value + sign * 1e-5 * direction})) for sign in (1, -1))
        assert float(np.sum(gradient * direction)) == pytest.approx((up - down) / 2e-5, rel=1e-3)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 17])
def test_every_vocabulary_and_chunk(vocabulary):
    case = make_case(vocabulary)
    logprobs, entropy = loop(bent_logits(case, None), case.tokens, 1.0)
    for chunk_size in range(1, min(vocabulary, 7) + 1):
        ours = jax.jit(lambda h, w, size=chunk_size: token_scores(h, w, case.tokens, chunk_size=size))(
            case.hidden, case.head
        )
        np.testing.assert_allclose(ours.logprobs, logprobs, atol=2e-5)
        np.testing.assert_allclose(ours.entropy, entropy, atol=2e-5)


def kept_of(case: Case, k: int = 5) -> np.ndarray:
    """The token and others, in any order; some have fewer than k."""
    rng, kept = np.random.default_rng(1), np.full((*case.tokens.shape, k), -1)
    for index in np.ndindex(case.tokens.shape):
        others = rng.permutation([token for token in range(len(case.head)) if token != case.tokens[index]])
        some = np.append(others[: rng.integers(0, k)], case.tokens[index])
        kept[index][: len(some)] = rng.permutation(some)
    return kept


@pytest.mark.parametrize(("settings", "chunk_size"), SETTINGS, ids=str)
def test_scores_of_kept_tokens_equal_a_loop(settings, chunk_size):
    """Gradients are those of the plain pass with logits of −∞ for all other tokens."""
    case = make_case()
    kept, temperature, softcap = kept_of(case), settings.get("temperature", 1.0), settings.get("logit_softcap")
    ours, gradients = with_gradients(
        lambda hidden, head: token_scores(hidden, head, case.tokens, kept=kept, chunk_size=chunk_size, **settings), case
    )
    within = (kept[..., None] == np.arange(13)).any(axis=-2)
    logprobs, entropy = loop(np.where(within, bent_logits(case, softcap), -np.inf), case.tokens, temperature)
    np.testing.assert_allclose(ours.logprobs, logprobs, atol=2e-5)
    np.testing.assert_allclose(ours.entropy, entropy, atol=2e-5)

    def plain(hidden: jax.Array, head: jax.Array) -> TokenScores:
        logits = hidden @ head.T
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return scores_from_logits(jnp.where(within, logits, -jnp.inf), case.tokens, temperature=temperature)

    for a, b in zip(gradients, with_gradients(plain, case)[1], strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_kept_tokens_of_what_is_masked():
    """States that are NaN, sets that are empty or lack the token: no gradient where no loss reads, finite elsewhere."""
    case = make_case(shape=(4,))
    case.hidden[0], kept = np.nan, kept_of(case)
    kept[1], kept[2] = -1, np.where(kept[2] == case.tokens[2], -1, kept[2])
    case.to_logprobs[:3] = case.to_entropy[:3] = 0

    def masked(hidden: jax.Array, head: jax.Array) -> TokenScores:
        scores = token_scores(hidden, head, case.tokens, kept=kept, chunk_size=5)
        return jax.tree.map(lambda x: jnp.where(jnp.arange(4) < 3, 0, x), scores)

    _, gradients = with_gradients(masked, case)
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(gradients[0][:3], 0)
    assert np.abs(gradients[0][3]).max() > 0
    finite = token_scores(case.hidden[1:], case.head, case.tokens[1:], kept=kept[1:])
    chex.assert_tree_all_finite(finite)
    with pytest.raises(ValueError, match="must have the shape of tokens"):
        token_scores(case.hidden, case.head, case.tokens, kept=kept[1:])


def test_uniform_and_certain_distributions():
    hidden, head = np.zeros((1, 8), np.float32), np.ones((10, 8), np.float32)
    ours = token_scores(hidden, head, np.array([3]), chunk_size=4)
    np.testing.assert_allclose([ours.logprobs[0], ours.entropy[0]], [-math.log(10), math.log(10)], rtol=1e-6)
    hidden, head = np.full((1, 1), 1e4, np.float32), np.eye(10, 1, dtype=np.float32)
    for token, logprob in ((0, 0.0), (7, -1e4)):
        case = Case(hidden, head, np.array([token]), np.ones(1, np.float32), np.ones(1, np.float32))
        ours, gradients = with_gradients(lambda h, w, c=case: token_scores(h, w, c.tokens, chunk_size=4), case)
        np.testing.assert_allclose([ours.logprobs[0], ours.entropy[0]], [logprob, 0.0], atol=1e-6)
        chex.assert_tree_all_finite(gradients)


def test_logits_common_to_all_tokens_do_not_matter():
    """A shift by thousands, above or below zero, must not push the sums out of float32."""
    case = make_case()
    for shift in (-3000.0, 3000.0):
        hidden = np.concatenate([case.hidden, np.full((*case.tokens.shape, 1), shift, np.float32)], axis=-1)
        head = np.concatenate([case.head, np.ones((13, 1), np.float32)], axis=-1)
        ours = token_scores(jnp.asarray(hidden), jnp.asarray(head), case.tokens, chunk_size=5)
        logprobs, entropy = loop(bent_logits(case, None), case.tokens, 1.0)
        np.testing.assert_allclose(ours.logprobs, logprobs, atol=5e-3)
        np.testing.assert_allclose(ours.entropy, entropy, atol=5e-3)


def test_impossible_tokens_of_the_plain_pass():
    """−∞ marks tokens that a filter has cut: no NaN in value, entropy or gradient."""
    logits = np.array([[1.0, -np.inf, 0.5], [-np.inf, 2.0, -np.inf]], np.float32)
    tokens = np.array([0, 1])

    def scalar(logits: jax.Array) -> tuple[jax.Array, TokenScores]:
        given = scores_from_logits(logits, tokens)
        return jnp.sum(given.logprobs + given.entropy), given

    (_, ours), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))(logits)
    logprobs, entropy = loop(logits, tokens, 1.0)
    np.testing.assert_allclose(ours.logprobs, logprobs, atol=1e-6)
    np.testing.assert_allclose(ours.entropy, entropy, atol=1e-6)
    assert np.isfinite(gradient).all()
    assert np.isneginf(scores_from_logits(jnp.asarray(logits), np.array([1, 1])).logprobs[0])


def test_bfloat16_inputs_give_float32_scores_close_to_those_of_float32():
    case = make_case(vocabulary=300, width=32)
    half = Case(*(jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in case[:3]), *case[3:])
    exact = half._replace(hidden=half.hidden.astype(jnp.float32), head=half.head.astype(jnp.float32))

    def score(case: Case) -> tuple[TokenScores, Any]:
        return with_gradients(lambda h, w: token_scores(h, w, case.tokens, chunk_size=128), case)

    (ours, gradients), (expected, exact_gradients) = score(half), score(exact)
    assert ours.logprobs.dtype == ours.entropy.dtype == jnp.float32
    # Products of bfloat16 numbers are exact in float32: what remains is the order of summation.
    np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-3)
    np.testing.assert_allclose(ours.entropy, expected.entropy, atol=1e-3)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        gap = np.abs(np.asarray(gradient, np.float32) - np.asarray(exact_gradient))
        assert gap.max() < 0.02 * np.abs(exact_gradient).max()


@pytest.mark.parametrize(("state", "head"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_gradients_have_the_types_of_their_inputs(state, head):
    """Parameters may be stored in one type and the model compute in another."""
    case = make_case()
    mixed = case._replace(hidden=jnp.asarray(case.hidden, state), head=jnp.asarray(case.head, head))
    _, (to_hidden, to_head) = with_gradients(lambda h, w: token_scores(h, w, case.tokens), mixed)
    assert to_hidden.dtype == state
    assert to_head.dtype == head


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_padding_tokens_that_are_no_tokens(chunk_size):
    """Whatever id stands at a masked position: the scores of the others and all gradients stay as they were."""
    case = make_case()
    padded = np.zeros(case.tokens.shape, bool)
    padded[..., -1] = True
    case = case._replace(to_logprobs=np.where(padded, 0, case.to_logprobs))

    def score(tokens: np.ndarray) -> tuple[TokenScores, Any]:
        def scores(hidden: jax.Array, head: jax.Array) -> TokenScores:
            given = token_scores(hidden, head, tokens, chunk_size=chunk_size)
            return TokenScores(jnp.where(padded, 0.0, given.logprobs), given.entropy)

        return with_gradients(scores, case)

    expected = score(case.tokens)
    for garbage in (10**6, -3):
        ours = score(np.where(padded, garbage, case.tokens))
        chex.assert_trees_all_close(ours, expected, rtol=1e-7, atol=1e-6)


def test_memory_holds_no_logits_of_all_tokens():
    tokens, vocabulary, width = 512, 32_768, 16

    def loss(hidden: jax.Array, head: jax.Array, ids: jax.Array) -> jax.Array:
        given = token_scores(hidden, head, ids, chunk_size=1024)
        return jnp.sum(given.logprobs + given.entropy)

    def plain(hidden: jax.Array, head: jax.Array, ids: jax.Array) -> jax.Array:
        given = scores_from_logits(hidden @ head.T, ids)
        return jnp.sum(given.logprobs + given.entropy)

    def temporaries(loss: Callable[..., jax.Array]) -> int:
        inputs = ((tokens, width), jnp.float32), ((vocabulary, width), jnp.float32), ((tokens,), jnp.int32)
        lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*(jax.ShapeDtypeStruct(*x) for x in inputs))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    full = 4 * tokens * vocabulary
    assert temporaries(plain) >= full  # else the measure is blind
    assert temporaries(loss) < full / 4


def test_memory_of_a_large_vocabulary():
    """Value and gradient need the states, the head, its gradient and one chunk, and little else; read off, not run."""
    tokens, vocabulary, width = 8192, 151_936, 1024

    def loss(hidden: jax.Array, head: jax.Array, ids: jax.Array) -> jax.Array:
        given = token_scores(hidden, head, ids)
        return jnp.sum(given.logprobs + given.entropy)

    inputs = ((tokens, width), jnp.float32), ((vocabulary, width), jnp.float32), ((tokens,), jnp.int32)
    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*(jax.ShapeDtypeStruct(*x) for x in inputs))
    memory = lowered.compile().memory_analysis()
    # Counted: everything that is alive at some time, the gradient of the states among the results.
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    states, head, chunk = tokens * width, vocabulary * width, tokens * logprobs.MIN_CHUNK
    assert total <= 1.3 * 4 * (states + head + head + chunk)
    assert memory.temp_size_in_bytes < 4 * tokens * vocabulary / 10


def test_a_bfloat16_head_is_not_widened_whole():
    """XLA's CPU would do that to cut a chunk out of it, and again to write a chunk of its gradient."""
    tokens, vocabulary, width = 64, 32_768, 64

    def loss(hidden: jax.Array, head: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.sum(token_scores(hidden, head, ids, chunk_size=1024).logprobs)

    inputs = ((tokens, width), jnp.bfloat16), ((vocabulary, width), jnp.bfloat16), ((tokens,), jnp.int32)
    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*(jax.ShapeDtypeStruct(*x) for x in inputs))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 1.5 * 2 * vocabulary * width


@pytest.mark.parametrize("vocabulary", [24, 40, 51])
@pytest.mark.parametrize("kept", [0, 100, 10**6])
def test_logits_that_are_kept_change_nothing(monkeypatch, vocabulary, kept):
    """None of them, some, all; where the last slice overlaps the one before it, and where it does not."""
    monkeypatch.setattr(logprobs, "MIN_CHUNK", 16)
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 16)
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", kept)
    case = make_case(vocabulary, shape=(2, 3))
    ours = with_gradients(lambda hidden, head: token_scores(hidden, head, case.tokens, logit_softcap=3.0), case)

    def plain(hidden: jax.Array, head: jax.Array) -> TokenScores:
        return scores_from_logits(3.0 * jnp.tanh(hidden @ head.T / 3.0), case.tokens)

    expected = with_gradients(plain, case)
    assert all(np.abs(x).max() > 0.1 for x in jax.tree.leaves(expected))
    chex.assert_trees_all_close(ours, expected, rtol=1e-7, atol=2e-5)


def test_logits_are_kept_for_a_gradient_alone(monkeypatch):
    """They cost memory, which a pass without a gradient must not pay."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 1)
    tokens, vocabulary = 64, 8192
    inputs = ((tokens, 8), jnp.float32), ((vocabulary, 8), jnp.float32), ((tokens,), jnp.int32)

    def loss(hidden: jax.Array, head: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.sum(token_scores(hidden, head, ids).logprobs)

    def temporaries(function: Callable[..., Any]) -> int:
        lowered = jax.jit(function).lower(*(jax.ShapeDtypeStruct(*x) for x in inputs))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(loss) < 4 * tokens * vocabulary / 4
    assert temporaries(jax.grad(loss)) >= 4 * tokens * vocabulary


# ---------------------------------------------------------------- a sharded vocabulary


def instructions(program: str) -> Iterator[tuple[str, int]]:
    """Operation and number of elements of each array that a compiled program makes, by its HLO text."""
    for line in program.splitlines():
        if found := re.search(r" = (.*?) ([a-z][a-z-]*)\(", line):
            for sizes in re.findall(r"\b[a-z]+\d+\[([\d,]*)\]", found[1]):
                yield found[2], math.prod(int(size) for size in sizes.split(",") if size)


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 8), (2, 4), (8, 1)])
def test_sharded_vocabulary(fsdp, tensor):
    """Each device scores its part of the vocabulary: neither the logits of all tokens nor the whole head are anywhere.

    The vocabulary is 2⁷ times a prime, as large ones are. Of the head's other axis, which `fsdp` cuts, one chunk
    is gathered at a time.
    """
    rows, time, vocabulary, width, chunk = 32, 32, 128 * 19, 64, 256
    mesh = jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    by_rows, by_vocabulary = (NamedSharding(mesh, PartitionSpec(*names)) for names in (["fsdp"], ["tensor", "fsdp"]))

    def loss(hidden: jax.Array, head: jax.Array, tokens: jax.Array) -> jax.Array:
        given = token_scores(hidden, head, tokens, chunk_size=chunk)
        return jnp.sum(2 * given.logprobs + given.entropy)

    rng = np.random.default_rng(0)
    arrays = (
        rng.normal(size=(rows, time, width)).astype(np.float32),
        rng.normal(size=(vocabulary, width)).astype(np.float32) / 8,
        rng.integers(0, vocabulary, (rows, time)),
    )
    placed = [jax.device_put(x, place) for x, place in zip(arrays, (by_rows, by_vocabulary, by_rows), strict=True)]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(by_rows, by_vocabulary))
    with jax.set_mesh(mesh):
        compiled = gradient.lower(*placed).compile()
        ours = compiled(*placed)
    found = list(instructions(compiled.as_text()))
    states = rows * time * width // fsdp
    assert max(size for _, size in found) <= max(states, rows * time * chunk // (fsdp * tensor)) < vocabulary * width
    moved = [size for kind, size in found if re.match("all-|reduce-scatter|collective", kind)]
    # Chunks of the head, a number a token, and the states' gradient, which is summed over the vocabulary once.
    large = [size for size in moved if size > max(chunk * width // tensor, rows * time // fsdp)]
    assert large == [states] * (tensor > 1)
    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arrays)
    chex.assert_trees_all_close(ours, expected, rtol=1e-7, atol=2e-5)


# ---------------------------------------------------------------- alignment


def test_three_tokens_by_hand(tiny_config):
    """A model whose next token is certain: after i comes i + 1. Off by one in either direction, and this fails.

    With no layer doing anything, the state at a token is its own normed embedding; the head maps e_i to i + 1.
    """
    vocabulary, width = 8, 8
    config = tiny_config(
        vocab_size=vocabulary, embed_dim=width, num_layers=1, num_heads=1, num_kv_heads=1, tie_embeddings=False
    )
    model = Transformer(config)
    params: Params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.abstract_params())
    params["embed"]["weight"] = jnp.eye(vocabulary)
    params["final_norm"]["scale"] = jnp.ones(width)
    params["lm_head"]["weight"] = 30 * jnp.roll(jnp.eye(vocabulary), 1, axis=0)
    prompt, lengths = jnp.array([[2, 3, 0, 0], [4, 0, 0, 0]]), jnp.array([2, 1])
    completion = jnp.array([[[4, 5, 6]], [[5, 7, 0]]])  # 7 does not follow 5, 0 follows 7

    @jax.jit
    def score(params: Params) -> TokenScores:
        hidden = model.hidden(params, PaddedLayout.of(prompt, lengths, completion))
        return token_scores(hidden, model.head(params), completion)

    gap = -30 * math.sqrt(width)  # RMS norm makes e_i as long as √width
    np.testing.assert_allclose(score(params).logprobs, [[[0, 0, 0]], [[0, gap, 0]]], atol=0.01)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (((2, 3, 4), (7, 4), (2, 4)), {}, r"hidden \(2, 3, 4\)"),
        (((2, 3, 4), (7, 5), (2, 3)), {}, r"head \(7, 5\)"),
        (((2, 3, 4), (4,), (2, 3)), {}, r"head \(4,\)"),
        (((2, 3, 4), (7, 4), (2, 3)), {"temperature": 0.0}, "temperature must be positive, got 0"),
        (((2, 3, 4), (7, 4), (2, 3)), {"temperature": -1.0}, "temperature must be positive, got -1"),
    ],
)
def test_misuse_raises(shapes, settings, message):
    hidden, head, tokens = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        token_scores(hidden, head, tokens.astype(jnp.int32), **settings)


def test_unaligned_logits_raise():
    with pytest.raises(ValueError, match=r"logits \(2, 3, 7\)"):
        scores_from_logits(jnp.zeros((2, 3, 7)), jnp.zeros((2, 2), jnp.int32))


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_logits_and_states_of_masked_tokens_do_not_matter(junk: float) -> None:
    """A loss that masks a token has a finite gradient, and the same one, whatever the token's logits are."""
    case = make_case(shape=(2, 4))
    mask = jnp.array([[True, True, False, True], [True, False, False, False]])

    def loss(scores: TokenScores) -> jax.Array:
        return jnp.sum(fill_masked(scores.logprobs, mask) * 2.0 - fill_masked(scores.entropy, mask))

    def of_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
        logits = jnp.where(mask[..., None], hidden @ head.T, junk)
        return loss(scores_from_logits(logits, case.tokens))

    def of_states(hidden: jax.Array, head: jax.Array) -> jax.Array:
        hidden = jnp.where(mask[..., None], hidden, junk)
        return loss(token_scores(hidden, head, case.tokens, chunk_size=3))

    clean = jax.value_and_grad(lambda h, w: loss(scores_from_logits(h @ w.T, case.tokens)), argnums=(0, 1))
    expected = clean(case.hidden, case.head)
    for function in (of_logits, of_states):
        given = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(case.hidden, case.head)
        chex.assert_trees_all_close(given, expected, atol=5e-5)


def test_logits_that_are_no_distribution_show_as_nan() -> None:
    logits = jnp.array([[0.0, jnp.nan], [jnp.inf, 0.0], [-jnp.inf, -jnp.inf], [-jnp.inf, 1.0]])
    scores = scores_from_logits(logits, jnp.ones(4, jnp.int32))
    np.testing.assert_array_equal(scores.logprobs, [np.nan, np.nan, np.nan, 0.0])
    np.testing.assert_array_equal(scores.entropy, [np.nan, np.nan, np.nan, 0.0])


@pytest.mark.parametrize("settings", [{}, BENT], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 5])
def test_ids_that_no_tokenizer_has_are_impossible(settings, chunk_size):
    """In value and gradient what the head without their rows gives; these learn nothing."""
    case = make_case()
    known = len(case.head) - 4
    tokens = jnp.minimum(case.tokens, known - 1)

    def masked(hidden: jax.Array, head: jax.Array) -> TokenScores:
        return token_scores(hidden, head, tokens, chunk_size=chunk_size, known_tokens=known, **settings)

    def shorter(hidden: jax.Array, head: jax.Array) -> TokenScores:
        return token_scores(hidden, head[:known], tokens, chunk_size=chunk_size, **settings)

    ours, theirs = with_gradients(masked, case), with_gradients(shorter, case)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-7, atol=2e-5)
    assert not np.any(ours[1][1][known:])
    whole, _ = with_gradients(lambda h, w: token_scores(h, w, tokens, chunk_size=chunk_size, **settings), case)
    assert np.abs(whole.logprobs - ours[0].logprobs).max() > 1e-2
