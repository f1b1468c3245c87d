"""Packing: completions of ragged lengths, with their prompts, into rows of a token budget; inside the program.

Lengths are traced, so that one compiled program serves all of them: what depends on them is the number of rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm.masking import length_mask
from jaxrl_llm.models.rows import PackedLayout, TokenRows
from jaxrl_llm.sharding import constrain, row_shards


class Packing(struct.PyTreeNode):
    """Where each completion lies: shard by shard, in rows of its own, in the order in which they come.

    Arrays of completions are `[S, N]`: S shards (as many as rows are split over devices), N = P/S·G. Completions of one
    prompt that lie in one row share a copy of the prompt, which precedes the first of them.
    """

    prompt: jax.Array
    """`[S, P/S, Tp]`."""
    prompt_lengths: jax.Array
    """`[S, P/S]`."""
    completion: jax.Array
    """`[S, P/S, G, Tc]`."""
    lengths: jax.Array
    """`[S, N]`: tokens of each completion that are read; those without any lie nowhere."""
    row: jax.Array
    """`[S, N]`."""
    start: jax.Array
    """`[S, N]`: the place of its first token."""
    opens: jax.Array
    """`[S, N]` bool: a copy of the prompt precedes it."""
    prompt_start: jax.Array
    """`[S, N]`: the place of that copy, or of the one that it shares."""
    prompt_end: jax.Array
    """`[S, N]`: one past the last token of the completions that share it."""
    tokens: int = struct.field(pytree_node=False)
    """T, the length of a row."""

    @property
    def count(self) -> jax.Array:
        """Rows that the fullest shard has; all shards compute as many."""
        return jnp.max(jnp.where(self.lengths > 0, self.row + 1, 0))

    @property
    def useful(self) -> jax.Array:
        """Number of tokens of completions and of copies of prompts, of all S shards."""
        group = self.completion.shape[2]
        prompts = jnp.where(self.opens, jnp.repeat(self.prompt_lengths, group, axis=1), 0)
        return jnp.sum(self.lengths + prompts)

    def holds(self, row: jax.Array) -> jax.Array:
        """`[P, G]` bool: which completions lie in row `row` of their shard."""
        return ((self.row == row) & (self.lengths > 0)).reshape(-1, self.completion.shape[2])

    def layout(self, row: jax.Array) -> PackedLayout:
        """Row `row` of each shard."""
        shards = jax.vmap(_layout, in_axes=(0, None))(self, row)
        rows = jax.tree.map(lambda x: constrain(x, "rows", None), shards.rows)
        return shards.replace(rows=rows)


def pack(
    prompt: jax.Array,
    prompt_lengths: jax.Array,
    completion: jax.Array,
    lengths: jax.Array,
    *,
    tokens: int,
    whole_groups: bool = False,
) -> Packing:
    """Packs completions in the order in which they come: each into the row of the one before it, or into a new one.

    Args:
        prompt: `[P, Tp]` int, right-padded; P a multiple of the shards.
        prompt_lengths: `[P]` int.
        completion: `[P, G, Tc]` int, right-padded.
        lengths: `[P, G]` int: tokens of each that are read; 0: it is left out.
        tokens: T, the length of a row.
        whole_groups: let all completions of a prompt lie in one row.

    Raises:
        ValueError: a row may be too short for what must lie in it.
    """
    (prompts, prompt_width), (_, group, width), shards = prompt.shape, completion.shape, row_shards()
    check_room(tokens, prompt_width, group * width if whole_groups else width)

    def split(x: jax.Array) -> jax.Array:
        return constrain(x.reshape(shards, prompts // shards, *x.shape[1:]), "rows", *(None,) * x.ndim)

    prompt, prompt_lengths, completion, lengths = map(split, (prompt, prompt_lengths, completion, lengths))
    places = jax.vmap(lambda p, c: _places(p, c, tokens, whole_groups))(prompt_lengths, lengths)
    return Packing(prompt, prompt_lengths, completion, lengths.reshape(shards, -1), *places, tokens=tokens)


def check_room(tokens: int, prompt_width: int, width: int) -> None:
    """Raises ValueError unless a row has room for a prompt and what must follow it in the same row."""
    if prompt_width + width > tokens:
        raise ValueError(
            f"update.tokens_per_micro_batch={tokens} is less than a prompt of up to {prompt_width} tokens and {width} "
            f"tokens of completions, which may all be real: raise it to {prompt_width + width} or more, or shorten "
            "prompts or completions"
        )


def _places(
    prompt_lengths: jax.Array, lengths: jax.Array, tokens: int, whole_groups: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of one shard: row, start, opens, prompt_start and prompt_end of each completion, `[N]`."""
    group = lengths.shape[1]
    prompt = jnp.repeat(jnp.arange(len(lengths), dtype=jnp.int32), group)
    prompt_length = jnp.repeat(prompt_lengths, group).astype(jnp.int32)
    needed = lengths.astype(jnp.int32)
    if whole_groups:  # what the first of a group asks room for
        needed = jnp.zeros_like(needed).at[:, 0].set(jnp.sum(needed, axis=1))
    length, needed = lengths.reshape(-1).astype(jnp.int32), needed.reshape(-1)

    def place(
        carry: tuple[jax.Array, ...], completion: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        row, used, last_prompt, prompt_start = carry
        prompt, prompt_length, length, needed = completion
        is_new = prompt != last_prompt
        full = used + needed + jnp.where(is_new, prompt_length, 0) > tokens
        opens = (is_new | full) & (length > 0)
        full &= (length > 0) | (needed > 0)
        row, used = jnp.where(full, row + 1, row), jnp.where(full, 0, used)
        prompt_start = jnp.where(opens, used, prompt_start)
        start = used + jnp.where(opens, prompt_length, 0)
        used = jnp.where(length > 0, start + length, used)
        last_prompt = jnp.where(opens, prompt, jnp.where(full, -1, last_prompt))
        return (row, used, last_prompt, prompt_start), (row, start, opens, prompt_start)

    first = (jnp.int32(0), jnp.int32(0), jnp.int32(-1), jnp.int32(0))
    _, (row, start, opens, prompt_start) = jax.lax.scan(place, first, (prompt, prompt_length, length, needed))
    copy = jnp.cumsum(opens) - 1
    ends = jnp.where(length > 0, start + length, 0)
    prompt_end = jnp.zeros_like(ends).at[copy].max(ends)[copy]
    return row, start, opens, prompt_start, prompt_end


def _layout(packing: Packing, row: jax.Array) -> PackedLayout:
    """Row `row` of one shard: `packing` without the axis of shards."""
    prompts, group, width = packing.completion.shape
    length, size = packing.lengths, packing.completion.size
    prompt_length = jnp.repeat(packing.prompt_lengths, group)
    copied = jnp.where(packing.opens, prompt_length, 0)
    # A completion and the copy of the prompt before it are one segment, and segments lie in order.
    begin = packing.row * packing.tokens + packing.start - copied
    place = jnp.arange(packing.tokens, dtype=jnp.int32)
    segment = jnp.searchsorted(begin, row * packing.tokens + place, side="right") - 1
    segment = jnp.maximum(segment, 0)
    offset = row * packing.tokens + place - begin[segment]
    is_prompt = offset < copied[segment]
    time = offset - copied[segment]
    is_own = ~is_prompt & (time < length[segment]) & (offset >= 0)
    source = jnp.where(is_own, segment * width + time, size)
    of_prompt = packing.prompt[segment // group, jnp.clip(offset, 0, packing.prompt.shape[1] - 1)]
    own = packing.completion.reshape(-1)[jnp.minimum(source, size - 1)]
    depth = jnp.where(is_prompt, offset, prompt_length[segment] + time)
    own_end = packing.start[segment] + length[segment]
    end = jnp.where(is_prompt, packing.prompt_end[segment], own_end)
    real = is_prompt | is_own
    branches = is_own & (time == 0)
    parent = jnp.where(branches, packing.prompt_start[segment] + prompt_length[segment] - 1, place - 1)
    held = (packing.row == row)[:, None] & length_mask(length, width)
    where = jnp.where(held, packing.start[:, None] + jnp.arange(width), -1)
    return PackedLayout(
        rows=TokenRows(
            tokens=jnp.where(is_prompt, of_prompt, jnp.where(is_own, own, 0)),
            depth=jnp.where(real, depth, 0).astype(jnp.int32),
            end=jnp.where(real, end, place + 1).astype(jnp.int32),
        ),
        parent=jnp.maximum(parent, 0).astype(jnp.int32),
        place=where.reshape(prompts, group, width).astype(jnp.int32),
        source=source.astype(jnp.int32),
    )
