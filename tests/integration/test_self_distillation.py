"""A small policy that can copy a hint learns to say without one what it is told: from the data, or from its samples."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.algorithms.distillation.presets import sdft, sdpo
from jaxrl_llm.algorithms.interfaces import Feedback, HintedPrompts
from jaxrl_llm.models.transformer import Transformer

pytestmark = pytest.mark.whole_run

VOCABULARY = 12
PROMPTS = np.random.default_rng(3).integers(1, VOCABULARY, (8, 3))
ANSWERS = np.roll(PROMPTS[:, 0], 1)
"""Of each prompt of three tokens; a hint is one token before them."""


@pytest.fixture(scope="module")
def model(tiny_config) -> Transformer:
    return Transformer(tiny_config(vocab_size=VOCABULARY, num_layers=1))


@pytest.fixture(scope="module")
def copier(model) -> Any:
    """Parameters with which it says the token before the prompt, and without one any token."""
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> Any:
        tokens = jax.random.randint(key, (64, 4), 1, VOCABULARY)

        def loss(params: Any) -> jax.Array:
            told = jax.nn.log_softmax(model.logits(params, tokens)[:, -1])
            untold = jax.nn.log_softmax(model.logits(params, tokens[:, 1:])[:, -1])
            return -jnp.mean(jnp.take_along_axis(told, tokens[:, :1], axis=-1)) - jnp.mean(untold)

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(jax.random.key(0))
    state = optimizer.init(params)
    for number in range(200):
        params, state = step(params, state, jax.random.key(number))
    return params


def is_right(rollout: Any) -> np.ndarray:
    return np.float32(np.asarray(rollout.completion[..., 0]) == ANSWERS[:, None])


def from_the_data(algorithm: Any, rollout: Any, rewards: np.ndarray, numbers: Any) -> Feedback:
    """Each sample's teacher is told the answer."""
    return told(np.broadcast_to(ANSWERS[:, None], rewards.shape), np.ones(rewards.shape, bool), rewards)


def from_the_others(algorithm: Any, rollout: Any, rewards: np.ndarray, numbers: Any) -> Feedback:
    """Each is told what another sample said that was right, if there is one."""
    others = rewards.sum(axis=1, keepdims=True) - rewards > 0
    return told(np.broadcast_to(ANSWERS[:, None], rewards.shape), others, rewards)


def told(hints: np.ndarray, there: np.ndarray, rewards: np.ndarray) -> Feedback:
    prompts = np.broadcast_to(PROMPTS[:, None], (*hints.shape, 3))
    tokens = np.concatenate([hints[..., None], prompts], axis=-1).astype(np.int32)
    return Feedback(rewards, hinted=HintedPrompts(tokens, np.where(there, 4, 0).astype(np.int32), ~there))


@dataclasses.dataclass(frozen=True)
class Repelled(Distillation):
    """Away from what it would say if it were told."""

    def weights_of(self, others: int) -> tuple[float, ...]:
        return tuple(-weight for weight in super().weights_of(others))


@pytest.mark.parametrize(("preset", "feedback"), [(sdft, from_the_data), (sdpo, from_the_others)], ids=["sdft", "sdpo"])
def test_what_it_is_told_it_learns_to_say(preset, feedback, model, copier, train):
    """From a seventh of the answers to more than half: 0.61 to 0.97 by where it starts, in which machines differ."""
    given: dict[str, Any] = {"params": copier, "prompts": PROMPTS, "reward": is_right, "feedback": feedback}
    learn = functools.partial(train, model=model, max_tokens=1, learning_rate=3e-3, **given)
    rewards = [line["reward"] for line in learn(preset(), steps=45)]
    assert rewards[0] < 0.15, rewards[0]
    assert np.mean(rewards[-3:]) > 0.5, rewards[-3:]
    away = [line["reward"] for line in learn(Repelled(**vars(preset())), steps=15)]
    assert away[-1] < rewards[0], away
