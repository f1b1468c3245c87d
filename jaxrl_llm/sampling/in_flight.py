"""The decoding loop of completions in flight: a free slot takes the next completion of whichever prompt is next.

One pure function, compiled as a part of one program. Memory is that of the completions in flight, and a token costs
what the texts in flight cost so far (`caches.py`). Prompts are computed when their turn comes, a few at a time, once
for all of their completions (`assignment.py`).

A pass through the model (`passes.py`) reads the token of each slot that was drawn last and, with speculation, k
proposals of what comes next (`drafts.py`). Behind each of them a token is drawn, with the randomness that the
completion has for that place, and these are the completion's as long as they are what was proposed; the first that is
not is so, too, since what it was drawn behind is right. So proposals decide how many passes it takes, and nothing else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.assignment import (
    Turn,
    is_unfinished,
    wants_prompts,
    with_free_places,
    with_new_completions,
    with_prompts,
)
from jaxrl_llm.sampling.flight import Batch, Plan, State
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sampling.passes import with_pass
from jaxrl_llm.sampling.sampled import Wanted
from jaxrl_llm.sampling.stop_texts import StopTexts


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
    experts: tuple[int, int] | None = None,
    rows: tuple[str, ...] = (),
) -> State:
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
        experts: as `Sampled.nothing`.
        rows: axes of a `shard_map` around it over which prompts are split. Devices take as many turns each, so that
            those that share weights do not wait for one another in different places.

    Returns:
        The loop's last state, in which all N = P·G completions are `sampled`.
    """
    plan = Plan.of(
        model,
        params,
        wanted,
        slots=slots,
        in_loops=in_loops,
        config=config,
        stop_tokens=stop_tokens,
        stop_texts=stop_texts,
        kept=kept,
        experts=experts,
    )
    batch = Batch.of(plan, params, wanted, in_loops=in_loops)

    def anywhere(condition: jax.Array) -> jax.Array:
        return jax.lax.pmax(condition.astype(jnp.int32), rows) > 0 if rows else condition

    def turn(state: State) -> State:
        """New completions for free slots, then a few tokens of each."""
        state = jax.lax.while_loop(
            lambda state: anywhere(wants_prompts(plan, state)),
            lambda state: with_prompts(plan, params, batch, state),
            with_free_places(plan, state),
        )
        state = with_new_completions(plan, batch, state)
        now = Turn.of(plan, batch, state)
        return jax.lax.fori_loop(0, plan.steps, lambda _, state: with_pass(plan, params, batch, now, state), state)

    start = State.start_of(plan, wanted.prompt.shape[1])
    return jax.lax.while_loop(lambda state: anywhere(is_unfinished(plan, state)), turn, start)
