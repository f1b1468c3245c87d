"""A pass through the model: of each slot the token drawn last and what is proposed behind it, and what they give."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.models.batch_invariant import attend_by_depth
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.stack import Layer
from jaxrl_llm.sampling.assignment import Turn
from jaxrl_llm.sampling.caches import Memory, read_by_depth
from jaxrl_llm.sampling.drafts import propose
from jaxrl_llm.sampling.flight import Batch, Plan, State
from jaxrl_llm.sampling.logits import Draw, draw, scored_alike
from jaxrl_llm.sampling.sampled import Sampled, by_token
from jaxrl_llm.sampling.stop_texts import stops
from jaxrl_llm.sampling.weights import in_loop
from jaxrl_llm.sharding import constrain

_Stream = tuple[jax.Array, tuple[Memory, ...]]
"""The residual stream `[S, 1 + k, D]`, and what all layers remember."""


def with_pass(plan: Plan, params: Params, batch: Batch, turn: Turn, state: State) -> State:
    """What slots had, and a token more of each, or several where they were proposed."""
    model, config = plan.model, plan.config
    drafts = _propose(plan, turn, state)
    hidden, memory, told = _decode(plan, params, batch, turn, state, drafts)
    head = model.head(params) if batch.weights is None else in_loop(model, batch.weights.head)
    logits = model.project(head, hidden)
    at = jnp.minimum(state.sample, plan.number - 1)[:, None]
    uniform, *settings = batch.completions
    greedy, limits = jax.tree.map(lambda x: x[at], settings)
    time = state.time[:, None] + 1 + jnp.arange(plan.ahead)
    drawn = draw(uniform[at, time], logits, config, greedy=greedy)
    if model.config.batch_invariant:
        drawn = scored_alike(drawn, logits, config, keeps_mask=plan.kept > 0)
    return _record(plan, turn, state._replace(memory=memory), drawn, drafts, limits, told)


def _propose(plan: Plan, turn: Turn, state: State) -> jax.Array:
    """What the completions may go on with, `[S, k]`."""
    if not plan.config.drafts:
        return jnp.zeros((len(state.token), 0), jnp.int32)
    lengths = turn.slots.prompt_length
    return propose(state.text, lengths + state.time + 1, *(turn.history or (None, None)), lengths, plan.config.drafts)


def _decode(
    plan: Plan, params: Params, batch: Batch, turn: Turn, state: State, drafts: jax.Array
) -> tuple[jax.Array, tuple[Memory, ...], jax.Array | None]:
    """Runs the tokens drawn last, and the drafts behind them, through the layers.

    A slot that has none drawn yet gets the state of its prompt in place of the first.

    Returns:
        States `[S, 1 + k, D]`, the memory with these tokens' keys, and their experts in each layer, if it has some.
    """
    model = plan.model
    token = jnp.concatenate([state.token[:, None], drafts], axis=1)
    position = jnp.maximum((turn.slots.prompt_length + state.time)[:, None] + jnp.arange(token.shape[1]), 0)
    turns = {
        rope: jax.tree.map(lambda angles: jnp.take(angles, position, axis=0, mode="clip"), rotation)
        for rope, rotation in zip(
            dict.fromkeys(kind.rope for kind in model.config.layer_kinds), batch.turns, strict=True
        )
    }

    def step(carry: _Stream, weights: Params, layer: Layer) -> tuple[_Stream, jax.Array | None]:
        x, memory = carry
        own = memory[layer.place]

        def attention(
            query: jax.Array, key: jax.Array, value: jax.Array, *, sinks: jax.Array | None = None
        ) -> jax.Array:
            nonlocal own
            own = _remembered(plan, state, own, layer, key, value)
            return _attended(plan, turn, state, own, layer, query, position, sinks)

        x, _, routed = model.block(weights, layer.kind)(x, turns[layer.kind.rope], attention)
        x, told = constrain(x, None, None, None), model.told_experts(routed, token.shape)
        return (x, (*memory[: layer.place], own, *memory[layer.place + 1 :])), told

    x = model.embed(params, token)
    carry = model.residual(x) if model.config.batch_invariant else x, state.memory
    if batch.weights is None:
        carry, told = model.stack.scan(step, carry, params["layers"], lambda layer, **_: layer, in_loops=True)
    else:
        each = []
        for number, (weights, kind) in enumerate(zip(batch.weights.layers, model.config.kinds, strict=True)):
            carry, one = step(carry, in_loop(model, weights), Layer(kind, number, 0, number))
            each.append(one)
        told = None if model.config.experts is None else jnp.stack(each)
    hidden, memory = model.norm(params, carry[0].astype(x.dtype)), carry[1]
    of_prompt = ((state.time < 0)[:, None] & (jnp.arange(token.shape[1]) == 0))[..., None]
    return jnp.where(of_prompt, state.state[turn.slots.place].astype(x.dtype)[:, None], hidden), memory, told


def _remembered(plan: Plan, state: State, memory: Memory, layer: Layer, key: jax.Array, value: jax.Array) -> Memory:
    """A layer's memory with the keys and values `[S, 1 + k, K, H]` of a pass."""
    if plan.sizes.drafts:
        return memory.with_stretches(layer.number, key, value, state.start + state.time)
    return memory.with_tokens(layer.number, key[:, 0], value[:, 0], state.clock)


def _attended(
    plan: Plan,
    turn: Turn,
    state: State,
    memory: Memory,
    layer: Layer,
    query: jax.Array,
    position: jax.Array,
    sinks: jax.Array | None,
) -> jax.Array:
    """What queries `[S, 1 + k, N, H]` at these positions read of a layer's memory, which has their own keys."""
    ways: Any = {"window": layer.kind.window, "softcap": plan.model.config.attention_softcap}
    if plan.model.config.batch_invariant:
        read = read_by_depth(memory, layer.number, turn.slots, plan.sizes)
        return attend_by_depth(query, position, read, kv_heads=plan.value.shape[0], **ways)
    walk, clock = turn.walks[layer.kind.window], state.start + state.time
    ways["sinks"] = sinks
    return plan.attention.attend(query, memory, layer.number, turn.slots, walk, clock, plan.sizes, **ways)


def _record(
    plan: Plan,
    turn: Turn,
    state: State,
    drawn: Draw,
    drafts: jax.Array,
    limits: jax.Array | None,
    told: jax.Array | None,
) -> State:
    """Writes the drawn tokens down, `[S, 1 + k]`, as far as they were drawn behind what is right, and ends completions.

    What is idle, or too much, is out of bounds, and dropped.
    """
    number, tokens, old = plan.number, plan.sizes.tokens, state.sampled
    active, time = state.sample < number, state.time[:, None] + 1 + jnp.arange(plan.ahead)
    stopped, matched = _stops(plan, drawn.token, state.matched)
    ended = stopped | (time >= (tokens if limits is None else limits) - 1)
    goes_on = (drawn.token[:, :-1] == drafts) & ~ended[:, :-1]
    good = active[:, None] & jnp.cumprod(jnp.pad(goes_on, ((0, 0), (1, 0)), constant_values=True), axis=1).astype(bool)
    count = jnp.sum(good, axis=1, dtype=jnp.int32)
    sample, at = state.sample[:, None], jnp.where(good, time, tokens)

    def write(buffer: jax.Array, values: Any) -> jax.Array:
        return buffer.at[sample, at].set(values.astype(buffer.dtype), mode="drop", unique_indices=True)

    def of_last(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]

    text, passes, experts = state.text, old.passes, old.experts
    if experts is not None and told is not None:  # of the tokens that were read, each before the one drawn behind it
        read = jnp.where(good & (time > 0), time - 1, tokens)
        experts = experts.at[sample, read].set(by_token(told), mode="drop", unique_indices=True)
    if passes is not None:
        passes = passes.at[state.sample].add(1, mode="drop")
        place = jnp.where(good, turn.slots.prompt_length[:, None] + time, text.shape[1])
        text = text.at[jnp.arange(len(text))[:, None], place].set(drawn.token, mode="drop")
    now = jnp.where(active, state.time + count, -1)
    return state._replace(
        clock=state.clock + 1,
        time=now,
        token=of_last(drawn.token).astype(jnp.int32),
        matched=jax.tree.map(of_last, matched),
        sample=jnp.where(of_last(ended), number, state.sample),
        text=text,
        sampled=Sampled(
            completion=write(old.completion, drawn.token),
            lengths=old.lengths.at[state.sample].set(now + 1, mode="drop"),
            finished=old.finished.at[state.sample].set(of_last(stopped), mode="drop"),
            logprobs=write(old.logprobs, drawn.logprob),
            sampler_logprobs=write(old.sampler_logprobs, drawn.sampler_logprob),
            kept=None if old.kept is None else write(old.kept, drawn.kept),
            passes=passes,
            experts=experts,
        ),
    )


def _stops(plan: Plan, token: jax.Array, matched: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """`stops` of tokens `[S, 1 + k]` one after another: whether each ends its completion, and what matches then."""
    found = []
    for one in jnp.unstack(token, axis=1):
        ends, matched = stops(one, matched, plan.stop_tokens, plan.stop_texts)
        found.append((ends, matched))
    return jax.tree.map(lambda *each: jnp.stack(each, axis=1), *found)
