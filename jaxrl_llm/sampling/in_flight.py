"""The decoding loop of completions in flight: a free slot takes the next completion of whichever prompt is next.

One pure function, compiled as a part of one program. Memory is that of the completions in flight, and a token costs
what the texts in flight cost so far (`caches.py`). Prompts are computed when their turn comes, a few at a time, once
for all of their completions.

A pass through the model reads the token of each slot that was drawn last and, with speculation, k proposals of what
comes next (`drafts.py`). Behind each of them a token is drawn, with the randomness that the completion has for that
place, and these are the completion's as long as they are what was proposed; the first that is not is so, too, since
what it was drawn behind is right. So proposals decide how many passes it takes, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention import KeyValue
from jaxrl_llm.models.batch_invariant import attend_by_depth
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.rope import Rotation
from jaxrl_llm.models.stack import Layer, Run
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.attention import slot_attention
from jaxrl_llm.sampling.caches import Memory, Sizes, Slots, page_tokens, read_by_depth
from jaxrl_llm.sampling.drafts import propose
from jaxrl_llm.sampling.logits import Draw, SamplingConfig, draw, scored_alike
from jaxrl_llm.sampling.sampled import Sampled, Wanted
from jaxrl_llm.sampling.stop_texts import StopTexts, stops
from jaxrl_llm.sampling.weights import Weights, in_loop
from jaxrl_llm.sharding import constrain

_STEPS_BETWEEN_LOOKS = 8
"""Tokens that are decoded, at most, before ended slots take up new completions."""

_VOTERS = 8
"""Earlier completions of a prompt, at most, that are looked at for each slot."""

_PROMPT_TOKENS = 1024
"""Tokens of prompts that are computed at a time, about: enough to be worth reading all weights for."""


class _Loop(NamedTuple):
    """State of the loop."""

    clock: jax.Array
    """How many passes there were so far."""
    sample: jax.Array
    """`[S]` which completion the slot is decoding; N: none, it is idle."""
    place: jax.Array
    """`[S]` where that completion's prompt lies."""
    time: jax.Array
    """`[S]` index of `token` in its completion; −1: none yet."""
    token: jax.Array
    """`[S]` the token drawn last."""
    matched: jax.Array | None
    """`[S]` how much of a stop text its completion ends with; see `StopTexts`."""
    start: jax.Array
    """`[S]` the clock at which the completion's first token is read; with speculation 0, of a clock of its own."""
    text: jax.Array
    """`[S, Tp + Tc]` its prompt and what was drawn so far; `[S, 0]` without speculation."""
    begun: jax.Array
    """How many completions were taken up."""
    read: jax.Array
    """How many prompts were computed."""
    prompt: jax.Array
    """`[R]` which prompt lies at each place; P: none."""
    state: jax.Array
    """`[R, D]` of its last token, after the last norm."""
    memory: tuple[Memory, ...]
    """Of each layer that is compiled."""
    sampled: Sampled
    """`[N]`, prompt by prompt."""


class _Batch(NamedTuple):
    """What the loop reads."""

    prompt: jax.Array
    """`[P, Tp]`."""
    lengths: jax.Array
    """`[P]`."""
    completions: tuple[jax.Array, jax.Array | None, jax.Array | None]
    """`[N]`: randomness, whether it is greedy, and the most tokens."""
    history: tuple[jax.Array, jax.Array] | None
    """`[P, G]`: earlier completions of the prompts, and their lengths."""
    weights: Weights | None
    """`None`: the loop cuts each layer's out of the stacked ones."""
    turns: list[Rotation | None]
    """`[Tp + Tc]` positions, of each rotary embedding: a table, since XLA's CPU compiler would take sines into every
    layer."""


def sample_in_flight(
    model: Transformer,
    params: Params,
    wanted: Wanted,
    *,
    slots: int,
    in_loops: bool,
    config: SamplingConfig,
    stop_tokens: tuple[int, ...],
    stop_texts: StopTexts | None = None,
    kept: int = 0,
    rows: tuple[str, ...] = (),
) -> tuple[Sampled, jax.Array]:
    """Samples G completions of each prompt, of which so many at a time are decoded.

    Args:
        model: the transformer.
        params: its parameters, in the type to decode with.
        wanted: the prompts of one device, or of those that share weights along `tensor`, and what is wanted of them.
        slots: S.
        in_loops: compile layers as loops, see `Stack`.
        config: distribution.
        stop_tokens: ids that end a completion; the one drawn is part of it.
        stop_texts: texts that do, with the token that completes one; `None`: none.
        kept: as `Sampled.nothing`.
        rows: axes of a `shard_map` around it over which prompts are split. Devices take as many turns each, so that
            those that share weights do not wait for one another in different places.

    Returns:
        `Sampled` `[N]`, N = P·G, prompt by prompt, and how many passes through the model there were.
    """
    (prompts, group, tokens, _), width = wanted.uniform.shape, wanted.prompt.shape[1]
    number = prompts * group
    runs = model.stack.runs(in_loops=in_loops)
    value = _value_of_a_token(model, params)
    shape: Any = {"prompts": prompts, "group": group, "prompt_width": width, "tokens": tokens}
    sizes = sizes_of(value, slots=slots, **shape, drafts=config.drafts)
    attention = slot_attention(config.attention, sizes.page, value, model.config.num_heads, queries=1 + config.drafts)
    ahead, text = 1 + config.drafts, (width + tokens if config.drafts else 0)
    steps = min(_STEPS_BETWEEN_LOOKS, max(1, tokens // (16 * ahead)))
    at_a_time = prompts_at_a_time(sizes, width, group, slots)
    completions = wanted.uniform, wanted.greedy, wanted.limits
    batch = _Batch(
        prompt=wanted.prompt,
        lengths=wanted.lengths,
        completions=jax.tree.map(lambda x: x.reshape(number, *x.shape[2:]), completions),
        history=wanted.history,
        weights=None if in_loops else Weights.of(model, params),
        turns=list(model.rotations(jnp.arange(width + tokens)).values()),
    )

    def anywhere(condition: jax.Array) -> jax.Array:
        return jax.lax.pmax(condition.astype(jnp.int32), rows) > 0 if rows else condition

    def wants_prompts(state: _Loop) -> jax.Array:
        """A slot is free and there is no completion for it, but could be."""
        waiting = state.read * group - state.begun
        free = jnp.sum(_is_free(state, number, slots))
        return anywhere((waiting < free) & (state.read < prompts) & jnp.any(state.prompt == prompts))

    def turn(state: _Loop) -> _Loop:
        """New completions for free slots, then a few tokens of each."""
        state = _with_free_places(state, group, prompts, number)
        state = jax.lax.while_loop(
            wants_prompts, lambda state: _read_prompts(model, params, batch, state, sizes, runs, at_a_time), state
        )
        state = _with_new_completions(state, batch, group, number, slots, config.drafts)
        view = _view(state, batch, number)
        walks = {
            window: attention.walk(sizes, view, state.start + state.time, steps * ahead, window)
            for window in dict.fromkeys(kind.window for kind in model.config.kinds)
        }
        history = _history(state, batch, group)

        def step(_: jax.Array, state: _Loop) -> _Loop:
            drafts = _propose(state, view, history, config.drafts)
            hidden, memory = _decode(model, params, batch, state, drafts, view, walks, sizes, attention.attend)
            head = model.head(params) if batch.weights is None else in_loop(model, batch.weights.head)
            logits = model.project(head, hidden)
            at = jnp.minimum(state.sample, number - 1)[:, None]
            uniform, *settings = batch.completions
            greedy, limits = jax.tree.map(lambda x: x[at], settings)
            time = state.time[:, None] + 1 + jnp.arange(ahead)
            drawn = draw(uniform[at, time], logits, config, greedy=greedy)
            if model.config.batch_invariant:
                drawn = scored_alike(drawn, logits, config, keeps_mask=kept > 0)
            return _record(state._replace(memory=memory), drawn, drafts, view, stop_tokens, stop_texts, limits)

        return jax.lax.fori_loop(0, steps, step, state)

    def unfinished(state: _Loop) -> jax.Array:
        return anywhere(jnp.any(state.sample < number) | (state.begun < number))

    start = _start(model, sizes, runs, value, prompts, number, text, stop_texts, kept)
    end = jax.lax.while_loop(unfinished, turn, start)
    return end.sampled, end.clock


def sizes_of(
    value: jax.ShapeDtypeStruct,
    *,
    slots: int,
    prompts: int,
    group: int,
    prompt_width: int,
    tokens: int,
    drafts: int = 0,
) -> Sizes:
    """Of the caches for so many slots; `value` is that of a token, `[K, H]`."""
    return Sizes.of(
        slots=slots,
        prompts=prompts,
        group=group,
        prompt_width=prompt_width,
        tokens=tokens,
        page=page_tokens(),
        token_bytes=value.size * value.dtype.itemsize,
        drafts=drafts,
    )


def prompts_at_a_time(sizes: Sizes, width: int, group: int, slots: int) -> int:
    """How many prompts of so many tokens are computed at a time."""
    return min(sizes.places, max(1, _PROMPT_TOKENS // width), -(-slots // group))


def _value_of_a_token(model: Transformer, params: Params) -> jax.ShapeDtypeStruct:
    """`[K, H]` as the layers make them."""
    made = jax.eval_shape(lambda: model.causal(params, jnp.zeros((1, 1), jnp.int32), collect=True)[1])
    assert made is not None
    _, _, kv_heads, _, head_dim = made.value.shape
    return jax.ShapeDtypeStruct((kv_heads, head_dim), made.value.dtype)


def _start(
    model: Transformer,
    sizes: Sizes,
    runs: tuple[Run, ...],
    value: jax.ShapeDtypeStruct,
    prompts: int,
    number: int,
    text: int,
    stop_texts: StopTexts | None,
    kept: int,
) -> _Loop:
    """The state before the first prompt is read."""

    def idle(value: int, *more: int) -> jax.Array:
        return jnp.full((sizes.slots, *more), value, jnp.int32)

    return _Loop(
        clock=jnp.int32(0),
        sample=idle(number),
        place=idle(0),
        time=idle(-1),
        token=idle(0),
        matched=None if stop_texts is None else stop_texts.start(sizes.slots),
        start=idle(0),
        text=idle(0, text),
        begun=jnp.int32(0),
        read=jnp.int32(0),
        prompt=jnp.full((sizes.places,), prompts, jnp.int32),
        state=jnp.zeros((sizes.places, model.config.embed_dim), model.config.dtype),
        memory=tuple(
            Memory.empty(sizes, run.repeats, kind.window, value)
            for run in runs
            for kind in model.config.kinds[run.first : run.first + run.period]
        ),
        sampled=Sampled.nothing(number, sizes.tokens, kept=kept)._replace(
            passes=jnp.zeros(number, jnp.int32) if sizes.drafts else None
        ),
    )


# ---- Between tokens: who decodes what --------------------------------------------------------------


def _is_free(state: _Loop, number: int, slots: int) -> jax.Array:
    """`[S]`; those beyond the slots that were asked for never are."""
    return (state.sample == number) & (jnp.arange(len(state.sample)) < slots)


def _with_free_places(state: _Loop, group: int, prompts: int, number: int) -> _Loop:
    """Forgets the prompts whose completions have all ended."""
    active = state.sample < number
    in_use = jnp.any(active[:, None] & (state.place[:, None] == jnp.arange(len(state.prompt))), axis=0)
    waits = state.begun < (state.prompt + 1) * group
    return state._replace(prompt=jnp.where(in_use | waits, state.prompt, prompts))


def _read_prompts(
    model: Transformer,
    params: Params,
    batch: _Batch,
    state: _Loop,
    sizes: Sizes,
    runs: tuple[Run, ...],
    at_a_time: int,
) -> _Loop:
    """Computes the next prompts, as many as there are and find a place, and keeps what their completions need."""
    (prompts, width), ranks = batch.prompt.shape, jnp.arange(at_a_time)
    numbers = state.read + ranks
    free = jnp.nonzero(state.prompt == prompts, size=at_a_time, fill_value=sizes.places)[0].astype(jnp.int32)
    fits = (numbers < prompts) & (free < sizes.places)
    taken = jnp.minimum(numbers, prompts - 1)
    hidden, made = model.causal(params, batch.prompt[taken], collect=True)
    assert made is not None
    last = jnp.take_along_axis(hidden, (batch.lengths[taken] - 1)[:, None, None], axis=1)[:, 0]
    pad = sizes.prompt_pages * sizes.page - width
    key = jnp.pad(made.key, [(0, 0)] * 4 + [(0, pad)])  # [L, P', K, H, T]
    value = jnp.pad(made.value, [(0, 0)] * 3 + [(0, pad), (0, 0)])
    key = jnp.moveaxis(key.reshape(*key.shape[:-1], -1, sizes.page), -2, 2)  # [L, P', pages, K, H, B]
    value = jnp.moveaxis(value.reshape(*value.shape[:3], -1, sizes.page, value.shape[-1]), -3, 2)

    layers = [slice(run.first + place, run.end, run.period) for run in runs for place in range(run.period)]

    def keep(rank: jax.Array, memory: tuple[Memory, ...]) -> tuple[Memory, ...]:
        return tuple(
            some.with_prompt(KeyValue(key[at, rank], value[at, rank]), free[rank])
            for some, at in zip(memory, layers, strict=True)
        )

    place = jnp.where(fits, free, sizes.places)  # beyond the last: dropped
    return state._replace(
        memory=jax.lax.fori_loop(0, jnp.sum(fits), keep, state.memory),
        state=state.state.at[place].set(last.astype(state.state.dtype), mode="drop"),
        prompt=state.prompt.at[place].set(numbers, mode="drop"),
        read=state.read + jnp.sum(fits, dtype=jnp.int32),
    )


def _with_new_completions(state: _Loop, batch: _Batch, group: int, number: int, slots: int, drafts: int) -> _Loop:
    """Gives free slots the completions that are next, as far as their prompts were computed."""
    free = _is_free(state, number, slots)
    following = state.begun + jnp.cumsum(free, dtype=jnp.int32) - 1
    begins = free & (following < state.read * group)
    place = jnp.argmax(state.prompt == (following // group)[:, None], axis=1).astype(jnp.int32)
    state = state._replace(
        sample=jnp.where(begins, following, state.sample),
        place=jnp.where(begins, place, state.place),
        time=jnp.where(begins, -1, state.time),
        matched=jax.tree.map(lambda matched: jnp.where(begins, 0, matched), state.matched),
        begun=state.begun + jnp.sum(begins, dtype=jnp.int32),
    )
    if not drafts:
        return state._replace(start=jnp.where(begins, state.clock + 1, state.start))
    prompt = batch.prompt[jnp.minimum(following // group, len(batch.prompt) - 1)]
    prompt = jnp.pad(prompt, ((0, 0), (0, state.text.shape[1] - prompt.shape[1])))
    return state._replace(text=jnp.where(begins[:, None], prompt, state.text))


# ---- A token ---------------------------------------------------------------------------------------


_Stream = tuple[jax.Array, tuple[Memory, ...]]
"""The residual stream `[S, 1 + k, D]`, and what all layers remember."""


def _view(state: _Loop, batch: _Batch, number: int) -> Slots:
    of_place = batch.lengths[jnp.minimum(state.prompt, len(batch.lengths) - 1)]
    return Slots(state.sample < number, state.place, of_place[state.place], state.start)


def _history(state: _Loop, batch: _Batch, group: int) -> tuple[jax.Array, jax.Array] | None:
    """Earlier completions of the slots' prompts, `[S, V, Tc]`, that of the same number first, and their lengths."""
    prompt = jnp.minimum(state.sample // group, len(batch.prompt) - 1)[:, None]
    number = (state.sample[:, None] + jnp.arange(min(group, _VOTERS))) % group
    return jax.tree.map(lambda x: x[prompt, number], batch.history)


def _propose(state: _Loop, view: Slots, history: tuple[jax.Array, jax.Array] | None, count: int) -> jax.Array:
    """What the completions may go on with, `[S, k]`."""
    if not count:
        return jnp.zeros((len(state.token), 0), jnp.int32)
    length = view.prompt_length + state.time + 1
    return propose(state.text, length, *(history or (None, None)), view.prompt_length, count)


def _decode(
    model: Transformer,
    params: Params,
    batch: _Batch,
    state: _Loop,
    drafts: jax.Array,
    view: Slots,
    walks: dict[int | None, Any],
    sizes: Sizes,
    attend: Callable[..., jax.Array],
) -> tuple[jax.Array, tuple[Memory, ...]]:
    """Runs the tokens drawn last, and the drafts behind them, through the layers.

    A slot that has none drawn yet gets the state of its prompt in place of the first.

    Returns:
        States `[S, 1 + k, D]`, and the memory with these tokens' keys.
    """
    token = jnp.concatenate([state.token[:, None], drafts], axis=1)
    position = jnp.maximum((view.prompt_length + state.time)[:, None] + jnp.arange(token.shape[1]), 0)
    turns = {
        rope: jax.tree.map(lambda angles: jnp.take(angles, position, axis=0, mode="clip"), turn)
        for rope, turn in zip(dict.fromkeys(kind.rope for kind in model.config.layer_kinds), batch.turns, strict=True)
    }

    def step(carry: _Stream, weights: Params, layer: Layer) -> tuple[_Stream, None]:
        x, memory = carry
        own, window = memory[layer.place], layer.kind.window

        def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            nonlocal own
            clock, softcap = view.start + state.time, model.config.attention_softcap
            if sizes.drafts:
                own = own.with_stretches(layer.number, key, value, clock)
            else:
                own = own.with_tokens(layer.number, key[:, 0], value[:, 0], state.clock)
            if model.config.batch_invariant:
                read, kv_heads = read_by_depth(own, layer.number, view, sizes), key.shape[-2]
                return attend_by_depth(query, position, read, kv_heads=kv_heads, window=window, softcap=softcap)
            walk = walks[window]
            return attend(query, own, layer.number, view, walk, clock, sizes, window=window, softcap=softcap)

        x, _ = model.block(weights, layer.kind)(x, turns[layer.kind.rope], attention)
        return (constrain(x, None, None, None), (*memory[: layer.place], own, *memory[layer.place + 1 :])), None

    x = model.embed(params, token)
    carry = model.residual(x) if model.config.batch_invariant else x, state.memory
    if batch.weights is None:
        carry, _ = model.stack.scan(step, carry, params["layers"], lambda layer, **_: layer, in_loops=True)
    else:
        for number, (weights, kind) in enumerate(zip(batch.weights.layers, model.config.kinds, strict=True)):
            carry, _ = step(carry, in_loop(model, weights), Layer(kind, number, 0))
    hidden, memory = model.norm(params, carry[0].astype(x.dtype)), carry[1]
    of_prompt = ((state.time < 0)[:, None] & (jnp.arange(token.shape[1]) == 0))[..., None]
    return jnp.where(of_prompt, state.state[view.place].astype(x.dtype)[:, None], hidden), memory


def _record(
    state: _Loop,
    drawn: Draw,
    drafts: jax.Array,
    view: Slots,
    stop_tokens: tuple[int, ...],
    stop_texts: StopTexts | None,
    limits: jax.Array | None,
) -> _Loop:
    """Writes the drawn tokens down, `[S, 1 + k]`, as far as they were drawn behind what is right, and ends completions.

    What is idle, or too much, is out of bounds, and dropped.
    """
    (number, tokens), ranks, old = state.sampled.completion.shape, jnp.arange(drawn.token.shape[1]), state.sampled
    active, time = state.sample < number, state.time[:, None] + 1 + ranks
    stopped, matched = _stops(drawn.token, state.matched, stop_tokens, stop_texts)
    ended = stopped | (time >= (tokens if limits is None else limits) - 1)
    goes_on = (drawn.token[:, :-1] == drafts) & ~ended[:, :-1]
    good = active[:, None] & jnp.cumprod(jnp.pad(goes_on, ((0, 0), (1, 0)), constant_values=True), axis=1).astype(bool)
    count = jnp.sum(good, axis=1, dtype=jnp.int32)
    sample, at = state.sample[:, None], jnp.where(good, time, tokens)

    def write(buffer: jax.Array, values: Any) -> jax.Array:
        return buffer.at[sample, at].set(values.astype(buffer.dtype), mode="drop", unique_indices=True)

    def of_last(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]

    text, passes = state.text, old.passes
    if passes is not None:
        passes = passes.at[state.sample].add(1, mode="drop")
        place = jnp.where(good, view.prompt_length[:, None] + time, text.shape[1])
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
        ),
    )


def _stops(
    token: jax.Array, matched: jax.Array | None, stop_tokens: tuple[int, ...], stop_texts: StopTexts | None
) -> tuple[jax.Array, jax.Array | None]:
    """`stops` of tokens `[S, 1 + k]` one after another: whether each ends its completion, and what matches then."""
    found = []
    for one in jnp.unstack(token, axis=1):
        ends, matched = stops(one, matched, stop_tokens, stop_texts)
        found.append((ends, matched))
    return jax.tree.map(lambda *each: jnp.stack(each, axis=1), *found)
