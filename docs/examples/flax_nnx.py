"""The losses of jaxrl_llm with Flax NNX and optax: the model a module, which is split for JAX's own transforms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxrl_llm.advantages import gae, group_advantages, shape_rewards
from jaxrl_llm.losses import (
    bradley_terry_loss,
    dpo_loss,
    gkd_loss,
    grpo_loss,
    last_token_score,
    ppo_loss,
    sequence_logprobs,
    sft_loss,
    value_loss,
)


class Model(nnx.Module):
    def __init__(self, rngs, vocabulary=16, width=32):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.recur = nnx.GRUCell(width, width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)
        self.scalar = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, tokens):  # [B, T] to logits [B, T, V] of the next tokens, and one number a token [B, T]
        embedded = jnp.moveaxis(self.embed(tokens), 1, 0)
        _, states = jax.lax.scan(self.recur, jnp.zeros_like(embedded[0]), embedded)
        states = jnp.moveaxis(states, 0, 1)
        return self.head(states), self.scalar(states)[..., 0]


class State(NamedTuple):
    graph: Any  # what a model is without its arrays
    params: Any
    moments: Any

    def apply(self, params, tokens):
        return nnx.merge(self.graph, params)(tokens)


ADAM = optax.adam(3e-3)


def init(key):
    graph, params = nnx.split(Model(nnx.Rngs(key)))
    return State(graph, params, ADAM.init(params))


def outputs_of(state, params, tokens):  # [B, T + 1] to log-probs, logits and values for the tokens but the first
    logits, values = state.apply(params, tokens[:, :-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return chosen[..., 0], logits, values


def descend(loss_fn, state):
    (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, moments = ADAM.update(gradient, state.moments)
    state = state._replace(params=optax.apply_updates(state.params, updates), moments=moments)
    return state, {"loss": loss} | {name: record.value() for name, record in metrics.items()}


# ---- One function for each family of objectives --------------------------------------------------


@jax.jit
def policy_gradient(state, batch):
    advantages = group_advantages(batch["rewards"])  # [P, G]: a group along the last axis

    def loss_fn(params):
        logprobs, _, _ = outputs_of(state, params, batch["tokens"])  # [P · G, T]
        return grpo_loss(logprobs, batch["old_logprobs"], advantages.reshape(-1), batch["mask"], kl_coef=0.0)

    return descend(loss_fn, state)


@jax.jit
def advantages(state, batch):
    old, ref = batch["old_logprobs"], batch["ref_logprobs"]
    rewards = shape_rewards(batch["scores"], batch["mask"], old_logprobs=old, ref_logprobs=ref, kl_coef=0.05)
    estimate = gae(rewards, batch["old_values"], batch["mask"], gamma=1.0, lam=0.95)

    def loss_fn(params):
        logprobs, _, values = outputs_of(state, params, batch["tokens"])
        actor = ppo_loss(logprobs, old, estimate.advantages, batch["mask"])
        critic = value_loss(values, batch["old_values"], estimate.returns, batch["mask"])
        return actor[0] + 0.1 * critic[0], actor[1] | critic[1]

    return descend(loss_fn, state)


@jax.jit
def preference(state, batch):  # rows of chosen completions, then as many of rejected ones
    ref_chosen, ref_rejected = jnp.split(sequence_logprobs(batch["ref_logprobs"], batch["mask"]), 2)

    def loss_fn(params):
        logprobs, _, _ = outputs_of(state, params, batch["tokens"])
        chosen, rejected = jnp.split(sequence_logprobs(logprobs, batch["mask"]), 2)
        return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)

    return descend(loss_fn, state)


@jax.jit
def reward_model(state, batch):  # rows of chosen completions, then as many of rejected ones
    def loss_fn(params):
        _, outputs = state.apply(params, batch["tokens"][:, 1:])
        chosen, rejected = jnp.split(last_token_score(outputs, batch["mask"]), 2)
        return bradley_terry_loss(chosen, rejected)

    return descend(loss_fn, state)


@jax.jit
def distillation(state, batch):
    def loss_fn(params):
        logprobs, logits, _ = outputs_of(state, params, batch["tokens"])
        tuning = sft_loss(logprobs, batch["mask"])
        teaching = gkd_loss(logits, batch["teacher_logits"], batch["mask"], beta=0.5)
        return tuning[0] + teaching[0], tuning[1] | teaching[1]

    return descend(loss_fn, state)
