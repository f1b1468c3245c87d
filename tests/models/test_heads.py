"""Heads read the states they should, at the places they should, and go where transformers finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.state import abstract_train_state
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.rows import PaddedLayout
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import make_mesh, parameter_shardings

PROMPTS, GROUP, PROMPT_WIDTH, WIDTH = 3, 2, 5, 6


class Rows(NamedTuple):
    """Ragged prompts and completions."""

    prompt: np.ndarray
    prompt_lengths: np.ndarray
    completion: np.ndarray
    mask: np.ndarray


@pytest.fixture(scope="module")
def rows() -> Rows:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, WIDTH + 1, (PROMPTS, GROUP))
    lengths[0, 0], lengths[1, 1] = WIDTH, 1
    return Rows(
        rng.integers(0, 64, (PROMPTS, PROMPT_WIDTH)),
        np.array([1, 3, PROMPT_WIDTH]),
        rng.integers(0, 64, (PROMPTS, GROUP, WIDTH)),
        np.arange(WIDTH) < lengths[..., None],
    )


@pytest.fixture(scope="module")
def trunk(tiny_config: Callable[..., Any]) -> Transformer:
    return Transformer(tiny_config())


@pytest.fixture(scope="module")
def params(trunk: Transformer, lively_params: Callable[..., Params]) -> Params:
    """Of a model with three outputs and a bias."""
    return lively_params(ScoreModel(trunk, outputs=3, bias=True))


@pytest.fixture(scope="module")
def plain(trunk: Transformer, params: Params, rows: Rows) -> np.ndarray:
    """States `[P, G, Tc + 1, D]` of whole sequences: the last one of the prompt, then the completion's."""
    causal = jax.jit(lambda tokens: trunk.causal(params, tokens).states)
    tokens = np.zeros((PROMPTS * GROUP, PROMPT_WIDTH + WIDTH), np.int32)
    starts = np.repeat(rows.prompt_lengths, GROUP)
    for row, start in enumerate(starts):
        tokens[row, :start] = rows.prompt[row // GROUP, :start]
        tokens[row, start : start + WIDTH] = rows.completion[row // GROUP, row % GROUP]
    states = np.asarray(causal(tokens))
    cut = [state[start - 1 : start + WIDTH] for state, start in zip(states, starts, strict=True)]
    return np.array(cut).reshape(PROMPTS, GROUP, WIDTH + 1, -1)


@pytest.fixture(scope="module")
def outputs(trunk: Transformer, params: Params, rows: Rows) -> dict[str, np.ndarray]:
    """All that the model computes, in one program."""
    model, one = ScoreModel(trunk, outputs=3, bias=True), ScoreModel(trunk)

    @jax.jit
    def compute(params: Params, rows: Rows) -> dict[str, jax.Array]:
        head = params["score_head"]
        first = params | {"score_head": {"weight": head["weight"][:1]}}
        return {
            "states": trunk.states(params, rows),
            "token_scores": model.token_scores(params, rows),
            "values": one.values(first, rows),
            "scores": one.scores(first, rows, rows.mask),
            "repadded": one.scores(
                first, rows._replace(completion=jnp.where(rows.mask, rows.completion, 7)), rows.mask
            ),
        }

    return {name: np.asarray(value) for name, value in compute(params, rows).items()}


def test_states_are_those_of_whole_sequences_at_the_completions_tokens(outputs, plain, rows):
    np.testing.assert_allclose(outputs["states"][rows.mask], plain[:, :, 1:][rows.mask], atol=2e-5)


def test_token_scores_read_the_token_itself(outputs, plain, rows, params):
    head = params["score_head"]
    expected = plain[:, :, 1:] @ np.asarray(head["weight"]).T + np.asarray(head["bias"])
    np.testing.assert_allclose(outputs["token_scores"][rows.mask], expected[rows.mask], atol=1e-4)


def test_values_read_the_state_before_the_token(outputs, plain, rows, params):
    """The first one is the prompt's last state: before anything was written."""
    expected = plain[:, :, :-1] @ np.asarray(params["score_head"]["weight"][0])
    np.testing.assert_allclose(outputs["values"][rows.mask], expected[rows.mask], atol=1e-4)
    np.testing.assert_allclose(outputs["values"][:, 0, 0], outputs["values"][:, 1, 0], atol=1e-6)


def test_the_score_is_that_of_the_last_real_token_whatever_the_padding(outputs, plain, rows, params):
    """Padding with an id that is also a real last token changes nothing."""
    last = rows.mask.sum(-1)
    at_last = np.take_along_axis(plain, last[..., None, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(outputs["scores"], at_last @ np.asarray(params["score_head"]["weight"][0]), atol=1e-4)
    np.testing.assert_array_equal(outputs["repadded"], outputs["scores"])


def test_padding_with_the_id_that_ends_every_answer(trunk, params, rows):
    """pad == eos: each answer ends in a real 7 and is padded with 7, and the place of its score stays the same."""
    model = ScoreModel(trunk)
    params = params | {"score_head": {"weight": params["score_head"]["weight"][:1]}}
    is_last = rows.mask & ~np.roll(rows.mask, -1, -1)
    is_last[..., -1] = rows.mask[..., -1]
    ended = np.where(is_last, 7, rows.completion)
    scores = jax.jit(lambda params, rows: model.scores(params, rows, rows.mask))
    with_eos = scores(params, rows._replace(completion=np.where(rows.mask, ended, 7)))
    np.testing.assert_array_equal(with_eos, scores(params, rows._replace(completion=np.where(rows.mask, ended, 3))))


def test_a_head_in_bfloat16_scores_in_float32(tiny_config):
    model = ScoreModel(Transformer(tiny_config(dtype="bfloat16", param_dtype="bfloat16")))
    texts = PaddedLayout.of(*(jnp.ones(s, int) for s in [(1, 2), 1, (1, 1, 2)]))
    shapes = jax.eval_shape(model.token_scores, model.abstract_params(), texts)
    assert shapes.dtype == jnp.float32
    assert model.abstract_params()["score_head"]["weight"].dtype == jnp.bfloat16


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_trees_of_a_model_fit_each_other(bias, lm_head, tiny_config):
    """Parameters, shapes, axes, shardings and optimizer states have one structure; the policy reads the same tree."""
    trunk = Transformer(tiny_config(tie_embeddings=False))
    model = ScoreModel(trunk, outputs=2, bias=bias, lm_head=lm_head)
    shapes, axes = model.abstract_params(), model.logical_axes()
    named = jax.tree.map(
        lambda names, leaf: len(names) == leaf.ndim, axes, shapes, is_leaf=lambda n: isinstance(n, tuple)
    )
    assert all(jax.tree.leaves(named))
    assert ("lm_head" in shapes) == lm_head
    state = abstract_train_state(model, optax.adam(1e-3), make_mesh())
    assert jax.tree.structure(state.params) == jax.tree.structure(shapes)
    assert jax.tree.structure(parameter_shardings(make_mesh(), axes, shapes)) == jax.tree.structure(shapes)
    made = jax.eval_shape(lambda p: model.from_trunk(p), trunk.abstract_params())
    chex.assert_trees_all_equal_shapes_and_dtypes(made, shapes)
    if lm_head:
        texts = PaddedLayout.of(*(jnp.ones(s, int) for s in [(1, 2), 1, (1, 1, 2)]))
        assert jax.eval_shape(trunk.hidden, shapes, texts).shape == (1, 1, 2, 32)
        assert jax.eval_shape(trunk.head, shapes).shape == (64, 32)


def test_a_new_head_is_zero_or_of_its_variance(tiny_config):
    model = ScoreModel(Transformer(tiny_config()), outputs=500)
    trunk = jax.jit(model.transformer.init)(jax.random.key(0))
    zeros, normal = model.from_trunk(trunk), model.from_trunk(trunk, jax.random.key(1))
    assert not np.any(zeros["score_head"]["weight"])
    assert np.var(normal["score_head"]["weight"]) == pytest.approx(1 / 33, rel=0.05)
    assert normal["embed"]["weight"] is trunk["embed"]["weight"]  # no copy
    assert np.any(model.from_trunk(zeros, jax.random.key(1))["score_head"]["weight"])  # a head there is replaced


def test_several_outputs_are_no_score(trunk, params, rows):
    model = ScoreModel(trunk, outputs=3, bias=True)
    with pytest.raises(ValueError, match="3 outputs gives no single number"):
        jax.eval_shape(lambda rows: model.scores(params, rows, rows.mask), rows)
    with pytest.raises(ValueError, match="3 outputs gives no single number"):
        jax.eval_shape(model.values, params, rows)
    with pytest.raises(ValueError, match="outputs=0"):
        ScoreModel(trunk, outputs=0)
