"""The losses of jaxrl_llm in plain JAX: parameters in a dictionary, the model a function."""

import jax
import jax.numpy as jnp

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


def init(key, vocabulary=16, width=32):
    shapes = {"embed": (vocabulary, width), "recur": (width, width), "head": (width, vocabulary), "scalar": (width, 1)}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, s) / s[0] ** 0.5 for k, (name, s) in zip(keys, shapes.items(), strict=True)}


def hidden_states(params, tokens):  # [B, T] to [B, T, D]
    def step(state, token):
        state = jnp.tanh(params["embed"][token] + state @ params["recur"])
        return state, state

    start = jnp.zeros((len(tokens), params["recur"].shape[0]))
    return jnp.moveaxis(jax.lax.scan(step, start, tokens.T)[1], 0, 1)


def logits_of(params, tokens):  # [B, T + 1] to [B, T, V], of the tokens but the first
    return hidden_states(params, tokens[:, :-1]) @ params["head"]


def logprobs_of(params, tokens):  # [B, T + 1] to [B, T]
    logprobs = jax.nn.log_softmax(logits_of(params, tokens))
    return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]


def descend(loss_fn, params, learning_rate=0.1):
    (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - learning_rate * g, params, gradient)
    return params, {"loss": loss} | {name: record.value() for name, record in metrics.items()}


# ---- One function for each family of objectives --------------------------------------------------


@jax.jit
def policy_gradient(params, batch):
    advantages = group_advantages(batch["rewards"])  # [P, G]: a group along the last axis

    def loss_fn(params):
        logprobs = logprobs_of(params, batch["tokens"])  # [P · G, T]
        return grpo_loss(logprobs, batch["old_logprobs"], advantages.reshape(-1), batch["mask"], kl_coef=0.0)

    return descend(loss_fn, params)


@jax.jit
def advantages(params, batch):
    old, ref = batch["old_logprobs"], batch["ref_logprobs"]
    rewards = shape_rewards(batch["scores"], batch["mask"], old_logprobs=old, ref_logprobs=ref, kl_coef=0.05)
    estimate = gae(rewards, batch["old_values"], batch["mask"], gamma=1.0, lam=0.95)

    def loss_fn(params):
        values = (hidden_states(params, batch["tokens"][:, :-1]) @ params["scalar"])[..., 0]
        actor = ppo_loss(logprobs_of(params, batch["tokens"]), old, estimate.advantages, batch["mask"])
        critic = value_loss(values, batch["old_values"], estimate.returns, batch["mask"])
        return actor[0] + 0.1 * critic[0], actor[1] | critic[1]

    return descend(loss_fn, params)


@jax.jit
def preference(params, batch):  # rows of chosen completions, then as many of rejected ones
    ref_chosen, ref_rejected = jnp.split(sequence_logprobs(batch["ref_logprobs"], batch["mask"]), 2)

    def loss_fn(params):
        logprobs = logprobs_of(params, batch["tokens"])
        chosen, rejected = jnp.split(sequence_logprobs(logprobs, batch["mask"]), 2)
        return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)

    return descend(loss_fn, params)


@jax.jit
def reward_model(params, batch):  # rows of chosen completions, then as many of rejected ones
    def loss_fn(params):
        outputs = (hidden_states(params, batch["tokens"][:, 1:]) @ params["scalar"])[..., 0]
        chosen, rejected = jnp.split(last_token_score(outputs, batch["mask"]), 2)
        return bradley_terry_loss(chosen, rejected)

    return descend(loss_fn, params)


@jax.jit
def distillation(params, batch):
    def loss_fn(params):
        tuning = sft_loss(logprobs_of(params, batch["tokens"]), batch["mask"])
        teaching = gkd_loss(logits_of(params, batch["tokens"]), batch["teacher_logits"], batch["mask"], beta=0.5)
        return tuning[0] + teaching[0], tuning[1] | teaching[1]

    return descend(loss_fn, params)
