"""The decoding loop: each prompt is computed once, its G completions share its keys and values.

One pure function, compiled as one program: prefill, then a `while_loop` that ends soon after every row has ended.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxrl_llm.masking import length_mask
from jaxrl_llm.models.attention import KeyValue, attend_shared, causal_mask
from jaxrl_llm.models.config import LayerKind, Params, RopeConfig
from jaxrl_llm.models.rope import Rotation
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.logits import Draw, SamplingConfig, draw, uniforms
from jaxrl_llm.sharding import constrain
from jaxrl_llm.types import Rollout

_STEPS_BETWEEN_LOOKS = 8
"""Tokens that are decoded, at most, before devices have to agree again on whether all rows have ended."""

_SMALL = 2**18
"""Elements, at most, of the largest of weights that are turned around before the loop."""

WeightsT = TypeVar("WeightsT")


class _Loop(NamedTuple):
    """State of the loop. A slot decodes one completion at a time; there are M of them for each prompt."""

    time: jax.Array
    """Index of `token` in its completion: a scalar while slots march together, else `[P, M]`; −1: none yet."""
    token: jax.Array
    """`[P, M]` the token drawn last."""
    sample: jax.Array
    """`[P, M]` which of the G completions the slot is decoding; ≥ G: none, the slot is idle."""
    begun: jax.Array
    """`[P]` how many of the completions have been taken up."""
    cache: tuple[KeyValue, ...]
    """Keys and values of the slots' own tokens in each layer, `[P, M]` before the axes of `KeyValue`."""
    completion: jax.Array
    """`[P, G, Tc]` tokens so far."""
    lengths: jax.Array
    """`[P, G]`."""
    finished: jax.Array
    """`[P, G]` a stop token was drawn."""
    logprobs: jax.Array
    """`[P, G, Tc]`."""
    sampler_logprobs: jax.Array
    """`[P, G, Tc]`."""


class _Layer(NamedTuple):
    """One layer, cut out of the stacked arrays before the loop: cutting it in the loop would copy its weights."""

    params: Params
    """As `_turn` leaves them."""
    kind: LayerKind
    memory: KeyValue
    """The prompts' keys and values, `[P]` before the axes of `KeyValue`."""


class _Prompt(NamedTuple):
    """What the loop reads of the prompts."""

    lengths: jax.Array
    """`[P]`."""
    layers: tuple[_Layer, ...]
    head: jax.Array
    """Weight of the LM head as `_turn` leaves it."""
    logits: jax.Array
    """`[P, V]` of each completion's first token."""
    uniform: jax.Array
    """`[P, G, Tc, 2]` the randomness of each token."""
    turns: dict[RopeConfig | None, Rotation | None]
    """`[P, Tc]` of the completions' positions: in the loop, each layer would compute them again."""


def row_keys(key: jax.Array, prompt_index: jax.Array, group: int) -> jax.Array:
    """A PRNG key `[P, G]` for each completion: `key` with the prompt's index, then the sample's, folded in.

    So a row's sample does not depend on the batch that it is in.
    """

    def of_prompt(index: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, index), jnp.arange(group))

    return jax.vmap(of_prompt)(prompt_index)


def sample(
    model: Transformer,
    params: Params,
    prompt: jax.Array,
    prompt_lengths: jax.Array,
    keys: jax.Array,
    *,
    config: SamplingConfig,
    stop_tokens: tuple[int, ...],
    greedy: jax.Array | None = None,
) -> Rollout:
    """Samples G completions of each prompt.

    Args:
        model: the transformer.
        params: its parameters, in the type to decode with.
        prompt: `[P, Tp]` int32, right-padded.
        prompt_lengths: `[P]` int32, each at least 1.
        keys: `[P, G]` PRNG keys, see `row_keys`.
        config: distribution, longest completion, slots.
        stop_tokens: ids that end a completion; the one drawn is part of it.
        greedy: `[P, G]` bool: completions that are decoded greedily instead; `None`: none.

    Returns:
        `Rollout`; positions beyond a completion's length hold token 0 and log-prob 0.
    """
    group = keys.shape[1]
    slots = min(config.slots or group, group)
    prompts = _read(model, params, prompt, prompt_lengths, uniforms(keys, config.max_tokens))
    state = _start(model, prompts, prompt.shape[0], group, slots, config)

    def drawn_by(state: _Loop, logits: jax.Array) -> Draw:
        of_slots = None if greedy is None else jnp.take_along_axis(greedy, jnp.minimum(state.sample, group - 1), axis=1)
        return draw(_pick(prompts.uniform, state.sample, state.time + 1), logits, config, greedy=of_slots)

    first = drawn_by(state, prompts.logits[:, None])
    state = _record(state, first, stop_tokens, recycle=slots < group)

    def unfinished(state: _Loop) -> jax.Array:
        active = jnp.any(state.sample < group)
        return active if slots < group else active & (state.time < config.max_tokens - 1)

    def step(state: _Loop) -> _Loop:
        hidden, cache = _decode(model, params, prompts, state)
        logits = model.project(_turn(prompts.head), hidden)
        if slots < group:  # a slot that has just taken up a completion draws its first token
            logits = jnp.where((state.time < 0)[..., None], prompts.logits[:, None], logits)
        return _record(state._replace(cache=cache), drawn_by(state, logits), stop_tokens, recycle=slots < group)

    def steps(state: _Loop) -> _Loop:
        """A few steps; those after the end of all rows change nothing that is returned.

        While slots march together, one or an eighth of those before, so that short completions cost little more.
        """
        count = _STEPS_BETWEEN_LOOKS
        if slots == group:
            count = jnp.minimum(jnp.clip(state.time // 8, 1, count), config.max_tokens - 1 - state.time)
        return jax.lax.fori_loop(0, count, lambda _, state: step(state), state)

    state = jax.lax.while_loop(unfinished, steps, state)
    mask = length_mask(state.lengths, config.max_tokens)
    return Rollout(
        prompt=prompt,
        prompt_lengths=prompt_lengths,
        completion=jnp.where(mask, state.completion, 0),
        completion_lengths=state.lengths,
        finished=state.finished,
        logprobs=jnp.where(mask, state.logprobs, 0.0),
        sampler_logprobs=jnp.where(mask, state.sampler_logprobs, 0.0),
    )


def _read(
    model: Transformer, params: Params, prompt: jax.Array, prompt_lengths: jax.Array, uniform: jax.Array
) -> _Prompt:
    """Computes the prompts, and makes ready what the loop reads."""
    hidden, memory = model.causal(params, prompt, collect=True)
    assert memory is not None
    last = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)[:, 0]
    # Without the barrier XLA would undo the turning.
    layers, head = jax.lax.optimization_barrier((_turn(model.layers(params)), _turn(model.head(params))))
    memories = [KeyValue(*parts) for parts in zip(*(jnp.unstack(part) for part in memory), strict=True)]
    return _Prompt(
        lengths=prompt_lengths,
        layers=tuple(map(_Layer, layers, model.config.kinds, memories)),
        head=head,
        logits=model.head_logits(params, last),
        uniform=uniform,
        turns=model.rotations(prompt_lengths[:, None] + jnp.arange(uniform.shape[2])),
    )


def _turn(weights: WeightsT) -> WeightsT:
    """Turns weights around if all are small, `[out, in]` to `[in, out]` before the loop and back in it.

    Layers have weights of the same shapes, so that one of them is judged as all of them.

    The way back is no work: XLA then reads the weight as it lies. For products of a few rows XLA's CPU compiler packs
    `[out, in]` weights anew at every token, up to half of a small model's time. Weights that do not stay in a core's
    cache from one token to the next are better packed.
    """
    small = max(leaf.size for leaf in jax.tree.leaves(weights)) <= _SMALL
    return jax.tree.map(lambda leaf: leaf.T if small and leaf.ndim == 2 else leaf, weights)


def _start(model: Transformer, prompts: _Prompt, size: int, group: int, slots: int, config: SamplingConfig) -> _Loop:
    """The state before the first token."""

    def empty(memory: KeyValue) -> KeyValue:
        _, kv_heads, _, head_dim = memory.value.shape

        def zeros(*shape: int) -> jax.Array:
            cache = jnp.zeros((size, slots, kv_heads, *shape), memory.value.dtype)
            return constrain(cache, "rows", None, "heads_activation", None, None)

        return KeyValue(key=zeros(head_dim, config.max_tokens), value=zeros(config.max_tokens, head_dim))

    def rows(x: jax.Array) -> jax.Array:
        return constrain(x, "rows", *(None,) * (x.ndim - 1))

    blank = rows(jnp.zeros((size, group, config.max_tokens)))
    return _Loop(
        time=jnp.int32(-1) if slots == group else rows(jnp.full((size, slots), -1, jnp.int32)),
        token=rows(jnp.zeros((size, slots), jnp.int32)),
        sample=rows(jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (size, slots))),
        begun=rows(jnp.full((size,), slots, jnp.int32)),
        cache=tuple(empty(layer.memory) for layer in prompts.layers),
        completion=blank.astype(jnp.int32),
        lengths=rows(jnp.zeros((size, group), jnp.int32)),
        finished=rows(jnp.zeros((size, group), bool)),
        logprobs=blank,
        sampler_logprobs=blank,
    )


def _pick(uniform: jax.Array, sample: jax.Array, time: jax.Array) -> jax.Array:
    """The randomness `[P, M, 2]` of what the slots draw next; `_put` says why prompt by prompt."""
    if time.ndim == 0:
        return jax.lax.dynamic_index_in_dim(uniform, time, axis=2, keepdims=False)
    return jax.vmap(lambda row, *at: row.at[at].get(mode="clip"))(uniform, sample, time)


def _at(values: jax.Array, time: jax.Array) -> jax.Array:
    """Of `[P, Tc, …]` what belongs to the slots' times: `[P, 1, …]` while they march together, else `[P, M, …]`."""
    if time.ndim == 0:
        return jax.lax.dynamic_index_in_dim(values, time, axis=1)
    return jax.vmap(lambda row, at: row[at])(values, time)


def _record(state: _Loop, drawn: Draw, stop_tokens: tuple[int, ...], *, recycle: bool) -> _Loop:
    """Writes the drawn tokens down, ends completions, and gives freed slots their next one."""
    _, group, width = state.completion.shape
    time = state.time + 1
    active = state.sample < group
    stopped = jnp.any(drawn.token[..., None] == jnp.array(stop_tokens, jnp.int32), axis=-1) & active
    ended = stopped | (jnp.broadcast_to(time, active.shape) == width - 1)

    def write(buffer: jax.Array, values: jax.Array) -> jax.Array:
        return _put(buffer, values.astype(buffer.dtype), state.sample, time)

    def settle(buffer: jax.Array, values: jax.Array) -> jax.Array:
        """What holds of a completion so far, `[P, G]`."""
        if recycle:
            return _put(buffer, values, state.sample)
        return jnp.where(active, values, buffer)

    following, begun = jnp.full_like(state.sample, group), state.begun
    if recycle:
        taken = jnp.cumsum(ended & active, axis=1, dtype=jnp.int32)
        following = jnp.minimum(begun[:, None] + taken - 1, group)
        begun = begun + taken[:, -1]
    return state._replace(
        time=jnp.where(ended, -1, time) if recycle else time,
        token=drawn.token.astype(jnp.int32),
        sample=jnp.where(ended & active, following, state.sample),
        begun=begun,
        completion=write(state.completion, drawn.token),
        lengths=settle(state.lengths, jnp.broadcast_to(state.time + 2, active.shape)),
        finished=settle(state.finished, stopped),
        logprobs=write(state.logprobs, drawn.logprob),
        sampler_logprobs=write(state.sampler_logprobs, drawn.sampler_logprob),
    )


def _put(buffer: jax.Array, values: jax.Array, sample: jax.Array, time: jax.Array | None = None) -> jax.Array:
    """`buffer` `[P, G]` or `[P, G, Tc]` with `values` `[P, M]` at each slot's completion, and time.

    Prompt by prompt, so that prompts on different devices need no word from each other; idle slots have a sample
    ≥ G: out of bounds, hence dropped. Where slots march together slot m decodes completion m, and what is written
    after a completion's end is cut off with the rest beyond its length.
    """
    if time is not None and time.ndim == 0:
        return jax.lax.dynamic_update_slice(buffer, values[..., None], (0, 0, time))
    places = (sample,) if time is None else (sample, time)
    return jax.vmap(lambda row, new, *at: row.at[at].set(new, mode="drop"))(buffer, values, *places)


def _decode(
    model: Transformer, params: Params, prompts: _Prompt, state: _Loop
) -> tuple[jax.Array, tuple[KeyValue, ...]]:
    """Runs the tokens drawn last through the layers: states `[P, M, D]`, and the cache with their keys."""
    time = jnp.maximum(state.time, 0)
    size, slots = state.token.shape
    now = jnp.broadcast_to(time, (size, slots))[..., None]  # [P, M, 1]
    times = jnp.arange(state.completion.shape[-1])[None, None]
    prompt_width = prompts.layers[0].memory.key.shape[-1]
    is_prompt = length_mask(prompts.lengths, prompt_width)[:, None, None]
    turns = {
        rope: None if turn is None else Rotation(*(_at(angles, time) for angles in turn))
        for rope, turn in prompts.turns.items()
    }
    softcap = model.config.attention_softcap
    x, caches = model.embed(params, state.token), []
    for layer, own in zip(prompts.layers, state.cache, strict=True):

        def attention(query: jax.Array, key: jax.Array, value: jax.Array, layer=layer, own=own) -> jax.Array:
            own = _write(own, key, value, time)
            caches.append(own)
            to_own = causal_mask(now, times, layer.kind.window)
            to_prompt = is_prompt
            if layer.kind.window is not None:
                position = prompts.lengths[:, None, None] + now
                to_prompt = is_prompt & causal_mask(position, jnp.arange(prompt_width)[None, None], layer.kind.window)
            return attend_shared(query[:, :, None], layer.memory, own, to_prompt, to_own, softcap=softcap)[:, :, 0]

        x, _ = model.block(_turn(layer.params), layer.kind)(x, turns[layer.kind.rope], attention)
        x = constrain(x, "rows", None, None)
    return model.norm(params, x), tuple(caches)


def _write(cache: KeyValue, key: jax.Array, value: jax.Array, time: jax.Array) -> KeyValue:
    """Puts the keys and values `[P, M, K, H]` of the slots' tokens where they belong in time."""
    if time.ndim == 0:
        return KeyValue(
            jax.lax.dynamic_update_slice(cache.key, key[..., None], (0, 0, 0, 0, time)),
            jax.lax.dynamic_update_slice(cache.value, value[..., None, :], (0, 0, 0, time, 0)),
        )
    put_key = jax.vmap(jax.vmap(lambda own, new, at: own.at[:, :, at].set(new)))
    put_value = jax.vmap(jax.vmap(lambda own, new, at: own.at[:, at].set(new)))
    return KeyValue(put_key(cache.key, key, time), put_value(cache.value, value, time))
