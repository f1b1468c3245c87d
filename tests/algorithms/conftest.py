"""Rollouts that were never sampled, and the objective computed the plain way: prompts repeated, all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.offline import make_offline_evaluation, make_offline_step
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.types import Rollout


@pytest.fixture(scope="session")
def make_rollout() -> Callable[..., Rollout]:
    """Random ragged rows; about half of those that fill the width are finished."""

    def make(prompts: int = 4, group: int = 4, prompt_width: int = 5, width: int = 6, seed: int = 0) -> Rollout:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, width + 1, (prompts, group)).astype(np.int32)
        lengths[0, 0] = width
        prompt_lengths = rng.integers(1, prompt_width + 1, prompts).astype(np.int32)
        prompt_lengths[-1] = prompt_width
        finished = (lengths < width) | (rng.random(lengths.shape) < 0.5)
        finished[0, 0] = False
        shape = (prompts, group, width)
        logprobs = -rng.exponential(size=shape).astype(np.float32)
        return Rollout(
            prompt=rng.integers(0, 64, (prompts, prompt_width)).astype(np.int32),
            prompt_lengths=prompt_lengths,
            completion=rng.integers(0, 64, shape).astype(np.int32),
            completion_lengths=lengths,
            finished=finished,
            logprobs=logprobs,
            sampler_logprobs=logprobs,
        )

    return make


@pytest.fixture(scope="session")
def repeated_logits() -> Callable[..., jax.Array]:
    """Logits `[P, G, Tc, V]` that predict a rollout's tokens, of P·G whole sequences."""

    def logits(model: Transformer, params: Params, rollout: Rollout) -> jax.Array:
        prompts, group, width = rollout.completion.shape
        tokens = np.zeros((prompts, group, rollout.prompt.shape[1] + width), np.int32)
        places = np.zeros((prompts, group, width), np.int32)
        for p, g in np.ndindex(prompts, group):
            start, stop = rollout.prompt_lengths[p], rollout.prompt_lengths[p] + rollout.completion_lengths[p, g]
            tokens[p, g, :start] = rollout.prompt[p, :start]
            tokens[p, g, start:stop] = rollout.completion[p, g, : stop - start]
            places[p, g] = start + np.arange(width) - 1
        every = model.logits(params, tokens.reshape(prompts * group, -1))
        return jnp.take_along_axis(every.reshape(*tokens.shape, -1), places[..., None], axis=2)

    return logits


@pytest.fixture(scope="session")
def repeated_logprobs(repeated_logits) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Log-probs and entropies `[P, G, Tc]` of a rollout's tokens from the logits of P·G whole sequences."""

    def logprobs(
        model: Transformer, params: Params, rollout: Rollout, temperature: float = 1.0
    ) -> tuple[jax.Array, jax.Array]:
        predicted = jax.nn.log_softmax(repeated_logits(model, params, rollout) / temperature, axis=-1)
        chosen = jnp.take_along_axis(predicted, rollout.completion[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(predicted) * predicted, axis=-1)

    return logprobs


@pytest.fixture(scope="session")
def step_of_score_model() -> Callable[..., tuple[Params, dict[str, float]]]:
    """The gradient of an objective (the change under SGD with rate 1), and the metrics."""

    def step_once(
        model: ScoreModel, params: Params, rows: Any, objective: Any, **settings: int
    ) -> tuple[Params, dict[str, float]]:
        optimizer = optax.sgd(1.0)
        step = jax.jit(make_offline_step(model, optimizer, objective, plan=MicroBatches(**settings)))
        state, metrics = step(make_train_state(params, optimizer, 0), rows)
        change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, state.params)
        chex.assert_tree_all_finite(change)  # a comparison takes two NaNs for equal
        return change, {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}

    return step_once


@pytest.fixture(scope="session")
def learn_scores() -> Callable[..., tuple[float, float, Params]]:
    """Trains a new model on fresh batches: held-out accuracy before and after, and the parameters; compiled once."""

    def learn(
        model: ScoreModel,
        objective: Any,
        rows: Callable[[np.random.Generator, int], Any],
        held_out: Any,
        *,
        learning_rate: float,
        steps: int,
        rng: np.random.Generator,
    ) -> tuple[float, float, Params]:
        optimizer = optax.adam(learning_rate)
        step = jax.jit(make_offline_step(model, optimizer, objective), donate_argnums=0)
        evaluate = jax.jit(make_offline_evaluation(model, objective))
        state = jax.jit(lambda key: make_train_state(model.init(key), optimizer, 0))(jax.random.key(0))
        with CompilationCounter() as counter:
            before = float(evaluate(state.params, held_out)[1]["accuracy"].value())
            for _ in range(steps):
                state, _ = step(state, rows(rng, 32))
            after = float(evaluate(state.params, held_out)[1]["accuracy"].value())
        assert counter.counts["offline_step"] == counter.counts["evaluation"] == 1, counter.counts
        return before, after, state.params

    return learn
