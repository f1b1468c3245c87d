"""What the decoding loop of completions in flight holds: what stays as it is, what is read, and where it has got to."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models.config import Params
from jaxrl_llm.models.rope import Rotation
from jaxrl_llm.models.stack import Run
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.attention import Attention, slot_attention
from jaxrl_llm.sampling.caches import Memory, Sizes, as_kept, bytes_of, page_tokens
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sampling.sampled import Sampled, Wanted, unknown_experts
from jaxrl_llm.sampling.stop_texts import StopTexts
from jaxrl_llm.sampling.weights import Weights

STEPS_BETWEEN_LOOKS = 8
"""Tokens that are decoded, at most, before ended slots take up new completions."""

_PROMPT_TOKENS = 1024
"""Tokens of prompts that are computed at a time, about: enough to be worth reading all weights for."""


class Plan(NamedTuple):
    """What stays as it is; all static but the tables of stop texts."""

    model: Transformer
    config: SamplingConfig
    prompts: int
    """P."""
    group: int
    """G, completions of each."""
    slots: int
    """Completions that are decoded at a time; `sizes` may have more slots, which stay idle."""
    sizes: Sizes
    runs: tuple[Run, ...]
    """Of layers."""
    value: jax.ShapeDtypeStruct
    """Of a token in a layer, `[K, H]`, as it is kept."""
    attention: Attention
    stop_tokens: tuple[int, ...]
    stop_texts: StopTexts | None
    kept: int
    """As `Sampled.nothing`."""
    experts: tuple[int, int] | None
    """As `Sampled.nothing`."""

    @classmethod
    def of(
        cls,
        model: Transformer,
        params: Params,
        wanted: Wanted,
        *,
        slots: int,
        in_loops: bool,
        config: SamplingConfig,
        stop_tokens: tuple[int, ...],
        stop_texts: StopTexts | None,
        kept: int,
        experts: tuple[int, int] | None,
    ) -> Plan:
        """That for what is wanted; arguments as of `sample_in_flight`."""
        prompts, group, tokens, _ = wanted.uniform.shape
        value, heads = as_kept(_value_of_a_token(model, params), config.cache_dtype), model.config.num_heads
        shape: Any = {"prompts": prompts, "group": group, "prompt_width": wanted.prompt.shape[1], "tokens": tokens}
        sizes = sizes_of(value, slots=slots, **shape, drafts=config.drafts)
        return cls(
            model=model,
            config=config,
            prompts=prompts,
            group=group,
            slots=slots,
            sizes=sizes,
            runs=model.stack.runs(in_loops=in_loops),
            value=value,
            attention=slot_attention(config.attention, sizes.page, value, heads, queries=1 + config.drafts),
            stop_tokens=stop_tokens,
            stop_texts=stop_texts,
            kept=kept,
            experts=experts,
        )

    @property
    def number(self) -> int:
        """N, completions."""
        return self.prompts * self.group

    @property
    def ahead(self) -> int:
        """1 + k, tokens of a slot in a pass."""
        return 1 + self.config.drafts

    @property
    def steps(self) -> int:
        """Passes before ended slots take up new completions."""
        return min(STEPS_BETWEEN_LOOKS, max(1, self.sizes.tokens // (16 * self.ahead)))


class Batch(NamedTuple):
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

    @classmethod
    def of(cls, plan: Plan, params: Params, wanted: Wanted, *, in_loops: bool) -> Batch:
        """That of what is wanted."""
        positions = jnp.arange(wanted.prompt.shape[1] + plan.sizes.tokens)
        completions = wanted.uniform, wanted.greedy, wanted.limits
        return cls(
            prompt=wanted.prompt,
            lengths=wanted.lengths,
            completions=jax.tree.map(lambda x: x.reshape(plan.number, *x.shape[2:]), completions),
            history=wanted.history,
            weights=None if in_loops else Weights.of(plan.model, params),
            turns=list(plan.model.rotations(positions).values()),
        )


class State(NamedTuple):
    """Where the loop has got to."""

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
    prompt_experts: jax.Array | None
    """`[P, Tp, L, k]`: the experts that computed prompts; `None`: they are not written down."""

    @classmethod
    def start_of(cls, plan: Plan, width: int) -> State:
        """Before the first prompt, of Tp = `width`, is read."""
        sizes, config = plan.sizes, plan.model.config

        def idle(value: int, *more: int) -> jax.Array:
            return jnp.full((sizes.slots, *more), value, jnp.int32)

        return cls(
            clock=jnp.int32(0),
            sample=idle(plan.number),
            place=idle(0),
            time=idle(-1),
            token=idle(0),
            matched=None if plan.stop_texts is None else plan.stop_texts.start(sizes.slots),
            start=idle(0),
            text=idle(0, width + sizes.tokens if sizes.drafts else 0),
            begun=jnp.int32(0),
            read=jnp.int32(0),
            prompt=jnp.full((sizes.places,), plan.prompts, jnp.int32),
            state=jnp.zeros((sizes.places, config.embed_dim), config.dtype),
            memory=tuple(
                Memory.empty(sizes, run.repeats, kind.window, plan.value)
                for run in plan.runs
                for kind in config.kinds[run.first : run.first + run.period]
            ),
            sampled=Sampled.nothing(plan.number, sizes.tokens, kept=plan.kept, experts=plan.experts)._replace(
                passes=jnp.zeros(plan.number, jnp.int32) if sizes.drafts else None
            ),
            prompt_experts=None if plan.experts is None else unknown_experts(plan.prompts, width, *plan.experts),
        )


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
    """Of the caches for so many slots; `value` is that of a token, `[K, H]`, as it is kept."""
    return Sizes.of(
        slots=slots,
        prompts=prompts,
        group=group,
        prompt_width=prompt_width,
        tokens=tokens,
        page=page_tokens(),
        token_bytes=bytes_of(value),
        drafts=drafts,
    )


def prompts_at_a_time(sizes: Sizes, width: int, group: int, slots: int) -> int:
    """How many prompts of so many tokens are computed at a time."""
    return min(sizes.places, max(1, _PROMPT_TOKENS // width), -(-slots // group))


def _value_of_a_token(model: Transformer, params: Params) -> jax.ShapeDtypeStruct:
    """`[K, H]` as the layers make them."""
    made = jax.eval_shape(lambda: model.causal(params, jnp.zeros((1, 1), jnp.int32), collect=True).memory)
    assert made is not None
    _, _, kv_heads, _, head_dim = made.value.shape
    return jax.ShapeDtypeStruct((kv_heads, head_dim), made.value.dtype)
