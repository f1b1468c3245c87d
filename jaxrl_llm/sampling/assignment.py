"""Who decodes what: between tokens, free slots take the next completions, and prompts are computed in time for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention import KeyValue
from jaxrl_llm.models.config import Params
from jaxrl_llm.sampling.caches import Memory, Slots
from jaxrl_llm.sampling.flight import Batch, Plan, State, prompts_at_a_time
from jaxrl_llm.sampling.sampled import by_token

_VOTERS = 8
"""Earlier completions of a prompt, at most, that are looked at for each slot."""


class Turn(NamedTuple):
    """What holds of the slots until they are looked at again."""

    slots: Slots
    walks: dict[int | None, Any]
    """The pages that they read until then, by window."""
    history: tuple[jax.Array, jax.Array] | None
    """Earlier completions of their prompts, `[S, V, Tc]`, that of the same number first, and their lengths."""

    @classmethod
    def of(cls, plan: Plan, batch: Batch, state: State) -> Turn:
        """That of the slots as they are now."""
        of_place = batch.lengths[jnp.minimum(state.prompt, plan.prompts - 1)]
        slots = Slots(state.sample < plan.number, state.place, of_place[state.place], state.start)
        clock, steps = state.start + state.time, plan.steps * plan.ahead
        walks = {
            window: plan.attention.walk(plan.sizes, slots, clock, steps, window)
            for window in dict.fromkeys(kind.window for kind in plan.model.config.kinds)
        }
        prompt = jnp.minimum(state.sample // plan.group, plan.prompts - 1)[:, None]
        number = (state.sample[:, None] + jnp.arange(min(plan.group, _VOTERS))) % plan.group
        return cls(slots, walks, jax.tree.map(lambda x: x[prompt, number], batch.history))


def wants_prompts(plan: Plan, state: State) -> jax.Array:
    """Whether a slot is free for which there is no completion, but could be."""
    waiting = state.read * plan.group - state.begun
    free = jnp.sum(_is_free(plan, state))
    return (waiting < free) & (state.read < plan.prompts) & jnp.any(state.prompt == plan.prompts)


def is_unfinished(plan: Plan, state: State) -> jax.Array:
    """Whether a completion is being decoded, or waits for it."""
    return jnp.any(state.sample < plan.number) | (state.begun < plan.number)


def _is_free(plan: Plan, state: State) -> jax.Array:
    """`[S]`; those beyond the slots that were asked for never are."""
    return (state.sample == plan.number) & (jnp.arange(len(state.sample)) < plan.slots)


def with_free_places(plan: Plan, state: State) -> State:
    """Forgets the prompts whose completions have all ended."""
    active = state.sample < plan.number
    in_use = jnp.any(active[:, None] & (state.place[:, None] == jnp.arange(len(state.prompt))), axis=0)
    waits = state.begun < (state.prompt + 1) * plan.group
    return state._replace(prompt=jnp.where(in_use | waits, state.prompt, plan.prompts))


def with_prompts(plan: Plan, params: Params, batch: Batch, state: State) -> State:
    """Computes the next prompts, as many as there are and find a place, and keeps what their completions need."""
    sizes, width = plan.sizes, batch.prompt.shape[1]
    at_a_time = prompts_at_a_time(sizes, width, plan.group, plan.slots)
    numbers = state.read + jnp.arange(at_a_time)
    free = jnp.nonzero(state.prompt == plan.prompts, size=at_a_time, fill_value=sizes.places)[0].astype(jnp.int32)
    fits = (numbers < plan.prompts) & (free < sizes.places)
    taken = jnp.minimum(numbers, plan.prompts - 1)
    hidden, made, told, _ = plan.model.causal(params, batch.prompt[taken], collect=True)
    assert made is not None
    prompt_experts = state.prompt_experts
    if prompt_experts is not None and told is not None:
        at = jnp.where(fits, numbers, plan.prompts)  # beyond the last: dropped
        prompt_experts = prompt_experts.at[at].set(by_token(told), mode="drop")
    last = jnp.take_along_axis(hidden, (batch.lengths[taken] - 1)[:, None, None], axis=1)[:, 0]
    pages = _in_pages(made, sizes.page, sizes.prompt_pages)
    layers = [slice(run.first + place, run.end, run.period) for run in plan.runs for place in range(run.period)]

    def keep(rank: jax.Array, memory: tuple[Memory, ...]) -> tuple[Memory, ...]:
        return tuple(
            some.with_prompt(KeyValue(pages.key[at, rank], pages.value[at, rank]), free[rank])
            for some, at in zip(memory, layers, strict=True)
        )

    place = jnp.where(fits, free, sizes.places)  # beyond the last: dropped
    return state._replace(
        memory=jax.lax.fori_loop(0, jnp.sum(fits), keep, state.memory),
        state=state.state.at[place].set(last.astype(state.state.dtype), mode="drop"),
        prompt=state.prompt.at[place].set(numbers, mode="drop"),
        read=state.read + jnp.sum(fits, dtype=jnp.int32),
        prompt_experts=prompt_experts,
    )


def _in_pages(made: KeyValue, page: int, pages: int) -> KeyValue:
    """`[L, P, pages]` before the axes of `KeyValue`, of keys and values with `[L, P]` before these."""
    pad = pages * page - made.value.shape[-2]
    key = jnp.pad(made.key, [(0, 0)] * 4 + [(0, pad)])  # [L, P, K, H, T]
    value = jnp.pad(made.value, [(0, 0)] * 3 + [(0, pad), (0, 0)])
    return KeyValue(
        jnp.moveaxis(key.reshape(*key.shape[:-1], -1, page), -2, 2),
        jnp.moveaxis(value.reshape(*value.shape[:3], -1, page, value.shape[-1]), -3, 2),
    )


def with_new_completions(plan: Plan, batch: Batch, state: State) -> State:
    """Gives free slots the completions that are next, as far as their prompts were computed."""
    free = _is_free(plan, state)
    following = state.begun + jnp.cumsum(free, dtype=jnp.int32) - 1
    begins = free & (following < state.read * plan.group)
    place = jnp.argmax(state.prompt == (following // plan.group)[:, None], axis=1).astype(jnp.int32)
    state = state._replace(
        sample=jnp.where(begins, following, state.sample),
        place=jnp.where(begins, place, state.place),
        time=jnp.where(begins, -1, state.time),
        matched=jax.tree.map(lambda matched: jnp.where(begins, 0, matched), state.matched),
        begun=state.begun + jnp.sum(begins, dtype=jnp.int32),
    )
    if not plan.sizes.drafts:
        return state._replace(start=jnp.where(begins, state.clock + 1, state.start))
    prompt = batch.prompt[jnp.minimum(following // plan.group, plan.prompts - 1)]
    prompt = jnp.pad(prompt, ((0, 0), (0, state.text.shape[1] - prompt.shape[1])))
    return state._replace(text=jnp.where(begins[:, None], prompt, state.text))
