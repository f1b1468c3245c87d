"""The decoding loop of small models and short completions: all march together, and G of a prompt share its keys.

One pure function, compiled as a part of one program: prefill, then a `while_loop` that ends soon after every completion
has ended. Each token reads all the room that there is, in one product; of long completions, which get more of it as
they grow, each length has a loop of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.masking import length_mask
from jaxrl_llm.models.attention import KeyValue, attend_shared, causal_mask
from jaxrl_llm.models.config import Params, RopeConfig
from jaxrl_llm.models.rope import Rotation
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.logits import Draw, SamplingConfig, draw
from jaxrl_llm.sampling.sampled import Sampled, Wanted, by_token
from jaxrl_llm.sampling.stop_texts import StopTexts, stops
from jaxrl_llm.sampling.weights import Weights, in_loop
from jaxrl_llm.sharding import constrain

STEPS_BETWEEN_LOOKS = 8
"""Tokens that are decoded, at most, before devices have to agree again on whether all completions have ended."""

ROOM = 128
"""Tokens for which there is room at least."""


class _Loop(NamedTuple):
    """State of the loop."""

    time: jax.Array
    """Index of `token` in the completions; −1: none yet."""
    token: jax.Array
    """`[P, G]` the tokens drawn last."""
    active: jax.Array
    """`[P, G]` bool: the completion has not ended."""
    matched: jax.Array | None
    """`[P, G]` how much of a stop text it ends with; see `StopTexts`."""
    cache: tuple[KeyValue, ...]
    """Keys and values of the completions' tokens in each layer, `[P, G]` before the axes of `KeyValue`."""
    sampled: Sampled
    """`[P, G]`."""


class _Prompts(NamedTuple):
    """What the loop reads."""

    lengths: jax.Array
    """`[P]`."""
    weights: Weights
    memory: tuple[KeyValue, ...]
    """Their keys and values in each layer, `[P]` before the axes of `KeyValue`."""
    turns: dict[RopeConfig | None, Rotation | None]
    """`[P, Tc]` of the completions' positions: in the loop, each layer would compute them again."""


def sample_together(
    model: Transformer,
    params: Params,
    wanted: Wanted,
    *,
    config: SamplingConfig,
    stop_tokens: tuple[int, ...],
    stop_texts: StopTexts | None = None,
    kept: int = 0,
    experts: tuple[int, int] | None = None,
) -> tuple[Sampled, jax.Array | None]:
    """Samples G completions of each prompt.

    Args:
        model: the transformer.
        params: its parameters, in the type to decode with.
        wanted: the prompts, and what is wanted of them.
        config: distribution.
        stop_tokens: ids that end a completion; the one drawn is part of it.
        stop_texts: texts that do, with the token that completes one; `None`: none.
        kept: as `Sampled.nothing`.
        experts: as `Sampled.nothing`.

    Returns:
        `Sampled` `[P, G]`, and the experts of prompts, `[P, Tp, L, k]`, where they are written down.
    """
    tokens = wanted.uniform.shape[2]
    hidden, memory, told, _ = model.causal(params, wanted.prompt, collect=True)
    assert memory is not None
    of_prompts = by_token(told) if experts is not None and told is not None else None
    last = jnp.take_along_axis(hidden, (wanted.lengths - 1)[:, None, None], axis=1)[:, 0]
    prompts = _Prompts(
        lengths=wanted.lengths,
        weights=Weights.of(model, params),
        memory=tuple(KeyValue(*parts) for parts in zip(*(jnp.unstack(part) for part in memory), strict=True)),
        turns=model.rotations(wanted.lengths[:, None] + jnp.arange(tokens)),
    )

    def record(state: _Loop, logits: jax.Array) -> _Loop:
        at = jax.lax.dynamic_index_in_dim(wanted.uniform, state.time + 1, axis=2, keepdims=False)
        drawn = draw(at, logits, config, greedy=wanted.greedy)
        return _record(state, drawn, stop_tokens, stop_texts, wanted.limits)

    def step(_: jax.Array, state: _Loop) -> _Loop:
        hidden, cache, told = _decode(model, params, prompts, state)
        sampled = state.sampled
        if sampled.experts is not None:
            at = (0, 0, state.time, 0, 0)
            sampled = sampled._replace(experts=jax.lax.dynamic_update_slice(sampled.experts, told[:, :, None], at))
        return record(
            state._replace(cache=cache, sampled=sampled), model.project(in_loop(model, prompts.weights.head), hidden)
        )

    def until(last: int, state: _Loop) -> _Loop:
        """Up to the token with this index."""

        def steps(state: _Loop) -> _Loop:
            """One or an eighth of those before; those after the end of all change nothing that is returned."""
            count = jnp.minimum(jnp.clip(state.time // 8, 1, STEPS_BETWEEN_LOOKS), last - state.time)
            return jax.lax.fori_loop(0, count, step, state)

        return jax.lax.while_loop(lambda state: jnp.any(state.active) & (state.time < last), steps, state)

    def in_rooms(state: _Loop, first: int, *larger: int) -> Sampled:
        """Up to the end of all, in rooms one after another; those behind that end are not even cleared."""
        state = state._replace(cache=tuple(_with_room(own, first) for own in state.cache))
        state = until(min(first, tokens - 1), state)
        if not larger:
            return state.sampled
        going = jnp.any(state.active)
        return jax.lax.cond(going, lambda: in_rooms(state, *larger), lambda: state.sampled)

    nothing = Sampled.nothing(*wanted.uniform.shape[:3], kept=kept, experts=experts)
    state = _start(prompts.memory, nothing, stop_texts)
    return in_rooms(record(state, model.head_logits(params, last)[:, None]), *rooms(tokens)), of_prompts


def rooms(tokens: int) -> list[int]:
    """For how many tokens there is room in the loops, one after another: twice as many each time."""
    found = [tokens]
    while found[0] > ROOM:
        found.insert(0, max(ROOM, 1 << (found[0] - 1).bit_length() - 1))
    return found


def _with_room(cache: KeyValue, tokens: int) -> KeyValue:
    more = tokens - cache.key.shape[-1]
    last = [(0, 0)] * (cache.key.ndim - 2)
    return KeyValue(jnp.pad(cache.key, [*last, (0, 0), (0, more)]), jnp.pad(cache.value, [*last, (0, more), (0, 0)]))


def _start(memory: tuple[KeyValue, ...], nothing: Sampled, stop_texts: StopTexts | None) -> _Loop:
    """The state before the first token of `[P, G, Tc]`."""
    *rows, tokens = nothing.completion.shape

    def empty(memory: KeyValue) -> KeyValue:
        _, kv_heads, _, head_dim = memory.value.shape

        def zeros(*last: int) -> jax.Array:
            cache = jnp.zeros((*rows, kv_heads, *last), memory.value.dtype)
            return constrain(cache, "rows", None, "heads_activation", None, None)

        room = rooms(tokens)[0]
        return KeyValue(key=zeros(head_dim, room), value=zeros(room, head_dim))

    def by_rows(x: jax.Array) -> jax.Array:
        return constrain(x, "rows", *(None,) * (x.ndim - 1))

    return _Loop(
        time=jnp.int32(-1),
        token=by_rows(jnp.zeros(rows, jnp.int32)),
        active=by_rows(jnp.ones(rows, bool)),
        matched=None if stop_texts is None else by_rows(stop_texts.start(*rows)),
        cache=tuple(map(empty, memory)),
        sampled=jax.tree.map(by_rows, nothing),
    )


def _record(
    state: _Loop,
    drawn: Draw,
    stop_tokens: tuple[int, ...],
    stop_texts: StopTexts | None,
    limits: jax.Array | None,
) -> _Loop:
    """Writes the drawn tokens down, and ends completions; what is written after a completion's end is beyond it."""
    time, old = state.time + 1, state.sampled
    stopped, matched = stops(drawn.token, state.matched, stop_tokens, stop_texts)
    stopped &= state.active
    ended = stopped if limits is None else stopped | (time >= limits - 1)

    def write(buffer: jax.Array, values: Any) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(
            buffer, jnp.expand_dims(values.astype(buffer.dtype), 2), time, axis=2
        )

    return state._replace(
        time=time,
        token=drawn.token.astype(jnp.int32),
        active=state.active & ~ended,
        matched=matched,
        sampled=Sampled(
            completion=write(old.completion, drawn.token),
            lengths=jnp.where(state.active, time + 1, old.lengths),
            finished=old.finished | stopped,
            logprobs=write(old.logprobs, drawn.logprob),
            sampler_logprobs=write(old.sampler_logprobs, drawn.sampler_logprob),
            kept=None if old.kept is None else write(old.kept, drawn.kept),
            experts=old.experts,
        ),
    )


def _decode(
    model: Transformer, params: Params, prompts: _Prompts, state: _Loop
) -> tuple[jax.Array, tuple[KeyValue, ...], Any]:
    """Runs the tokens drawn last through the layers: states `[P, G, D]`, the cache with their keys, their experts."""
    time, width = state.time, prompts.memory[0].key.shape[-1]
    now = jnp.broadcast_to(time, (*state.token.shape, 1))
    times = jnp.arange(state.cache[0].key.shape[-1])[None, None]
    is_prompt = length_mask(prompts.lengths, width)[:, None, None]
    turns = {
        rope: jax.tree.map(lambda angles: jax.lax.dynamic_index_in_dim(angles, time, axis=1), turn)
        for rope, turn in prompts.turns.items()
    }
    x, caches, told = model.embed(params, state.token), [], []
    layers = zip(prompts.weights.layers, model.config.kinds, prompts.memory, state.cache, strict=True)
    for weights, kind, memory, own in layers:

        def attention(query, key, value, *, sinks, kind=kind, memory=memory, own=own) -> jax.Array:
            own = KeyValue(
                jax.lax.dynamic_update_slice(own.key, key[..., None], (0, 0, 0, 0, time)),
                jax.lax.dynamic_update_slice(own.value, value[..., None, :], (0, 0, 0, time, 0)),
            )
            caches.append(own)
            to_prompt = is_prompt
            if kind.window is not None:
                position = prompts.lengths[:, None, None] + now
                to_prompt = is_prompt & causal_mask(position, jnp.arange(width)[None, None], kind.window)
            to_own = causal_mask(now, times, kind.window)
            ways: Any = {"sinks": sinks, "softcap": model.config.attention_softcap}
            return attend_shared(query[:, :, None], memory, own, to_prompt, to_own, **ways)[:, :, 0]

        x, _, routed = model.block(in_loop(model, weights), kind)(x, turns[kind.rope], attention)
        x = constrain(x, "rows", None, None)
        told.append(model.told_experts(routed, state.token.shape))
    experts = None if model.config.experts is None else jnp.stack(told, axis=-2)
    return model.norm(params, x), tuple(caches), experts
