"""The losses of jaxrl_llm with Equinox: the model is a pytree, its gradient a model."""

import equinox as eqx
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


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear
    scalar: eqx.nn.Linear

    def __init__(self, key, vocabulary=16, width=32):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(vocabulary, width, key=keys[0])
        self.cell = eqx.nn.GRUCell(width, width, key=keys[1])
        self.head = eqx.nn.Linear(width, vocabulary, key=keys[2])
        self.scalar = eqx.nn.Linear(width, "scalar", key=keys[3])

    def __call__(self, tokens):  # [T] to logits [T, V] of the next tokens, and one number a token [T]
        def step(state, token):
            state = self.cell(self.embed(token), state)
            return state, (self.head(state), self.scalar(state))

        return jax.lax.scan(step, jnp.zeros(self.cell.hidden_size), tokens)[1]


init = Model


def outputs_of(model, tokens):  # [B, T + 1] to log-probs, logits and values for the tokens but the first
    logits, values = jax.vmap(model)(tokens[:, :-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return chosen[..., 0], logits, values


def descend(loss_fn, model, learning_rate=0.1):
    (loss, metrics), gradient = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
    model = eqx.apply_updates(model, jax.tree.map(lambda g: -learning_rate * g, gradient))
    return model, {"loss": loss} | {name: record.value() for name, record in metrics.items()}


# ---- One function for each family of objectives --------------------------------------------------


@eqx.filter_jit
def policy_gradient(model, batch):
    advantages = group_advantages(batch["rewards"])  # [P, G]: a group along the last axis

    def loss_fn(model):
        logprobs, _, _ = outputs_of(model, batch["tokens"])  # [P · G, T]
        return grpo_loss(logprobs, batch["old_logprobs"], advantages.reshape(-1), batch["mask"], kl_coef=0.0)

    return descend(loss_fn, model)


@eqx.filter_jit
def advantages(model, batch):
    old, ref = batch["old_logprobs"], batch["ref_logprobs"]
    rewards = shape_rewards(batch["scores"], batch["mask"], old_logprobs=old, ref_logprobs=ref, kl_coef=0.05)
    estimate = gae(rewards, batch["old_values"], batch["mask"], gamma=1.0, lam=0.95)

    def loss_fn(model):
        logprobs, _, values = outputs_of(model, batch["tokens"])
        actor = ppo_loss(logprobs, old, estimate.advantages, batch["mask"])
        critic = value_loss(values, batch["old_values"], estimate.returns, batch["mask"])
        return actor[0] + 0.1 * critic[0], actor[1] | critic[1]

    return descend(loss_fn, model)


@eqx.filter_jit
def preference(model, batch):  # rows of chosen completions, then as many of rejected ones
    ref_chosen, ref_rejected = jnp.split(sequence_logprobs(batch["ref_logprobs"], batch["mask"]), 2)

    def loss_fn(model):
        logprobs, _, _ = outputs_of(model, batch["tokens"])
        chosen, rejected = jnp.split(sequence_logprobs(logprobs, batch["mask"]), 2)
        return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)

    return descend(loss_fn, model)


@eqx.filter_jit
def reward_model(model, batch):  # rows of chosen completions, then as many of rejected ones
    def loss_fn(model):
        _, outputs = jax.vmap(model)(batch["tokens"][:, 1:])
        chosen, rejected = jnp.split(last_token_score(outputs, batch["mask"]), 2)
        return bradley_terry_loss(chosen, rejected)

    return descend(loss_fn, model)


@eqx.filter_jit
def distillation(model, batch):
    def loss_fn(model):
        logprobs, logits, _ = outputs_of(model, batch["tokens"])
        tuning = sft_loss(logprobs, batch["mask"])
        teaching = gkd_loss(logits, batch["teacher_logits"], batch["mask"], beta=0.5)
        return tuning[0] + teaching[0], tuning[1] | teaching[1]

    return descend(loss_fn, model)
