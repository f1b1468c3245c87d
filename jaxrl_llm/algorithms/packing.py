"""Packing: completions of ragged lengths, with their prompts, into rows of a token budget; inside the program.

Lengths are traced, so that one compiled program serves all of them: what depends on them is the number of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm.masking import length_mask
from jaxrl_llm.models.rows import Experts, PackedLayout, TokenRows
from jaxrl_llm.sharding import constrain, row_shards


class Packing(struct.PyTreeNode):
    """Where each completion lies: shard by shard, in rows of its own.

    Arrays of completions are `[S, N]`: S shards (as many as rows are split over devices), N = P/S·G. Completions of one
    prompt that lie in one row share a copy of the prompt, which precedes the first of them. With what all prompts of a
    shard have in common, such as a system prompt, each of its rows begins, and copies of prompts are without it.
    """

    prompt: jax.Array
    """`[S, P/S, Tp]`."""
    prompt_lengths: jax.Array
    """`[S, P/S]`."""
    completion: jax.Array
    """`[S, P/S, G, Tc]`."""
    common: jax.Array
    """`[S]`: how many tokens all prompts begin with; each has one more at least."""
    lengths: jax.Array
    """`[S, N]`: tokens of each completion that are read; those without any lie nowhere."""
    row: jax.Array
    """`[S, N]`."""
    start: jax.Array
    """`[S, N]`: the place of its first token."""
    opens: jax.Array
    """`[S, N]` bool: a copy of its prompt precedes it."""
    prompt_start: jax.Array
    """`[S, N]`: the place of that copy, or of the one that it shares."""
    prompt_end: jax.Array
    """`[S, N]`: one past the last token of the completions that share it."""
    begin: jax.Array
    """`[S, N]`: where it begins, its copy of the prompt included, if all rows of its shard were one."""
    order: jax.Array
    """`[S, N]`: the completions in that order."""
    tokens: int = struct.field(pytree_node=False)
    """T, the length of a row."""
    capacity: int = struct.field(pytree_node=False)
    """Rows that a shard may have, whatever the lengths."""
    experts: Experts | None = None
    """Those that computed prompts and completions elsewhere, `[S, P/S]` before the axes of tokens."""

    @property
    def count(self) -> jax.Array:
        """Rows that the fullest shard has; all shards compute as many."""
        return jnp.max(jnp.where(self.lengths > 0, self.row + 1, 0))

    @property
    def needed(self) -> jax.Array:
        """Tokens that shards cannot do without: what is read of completions, prompts once, what all share once."""
        lengths = self.lengths.reshape(*self.prompt_lengths.shape, -1)
        is_read = jnp.any(lengths > 0, axis=-1)
        prompts = jnp.where(is_read, self.prompt_lengths - self.common[:, None], 0)
        return jnp.sum(lengths) + jnp.sum(prompts) + jnp.sum(jnp.where(jnp.any(is_read, axis=1), self.common, 0))

    def holds(self, row: jax.Array) -> jax.Array:
        """`[P, G]` bool: which completions lie in row `row` of their shard."""
        return ((self.row == row) & (self.lengths > 0)).reshape(-1, self.completion.shape[2])

    def layout(self, row: jax.Array) -> PackedLayout:
        """Row `row` of each shard."""
        shards = jax.vmap(_layout, in_axes=(0, None))(self, row)
        rows = jax.tree.map(lambda x: constrain(x, "rows", *(None,) * (x.ndim - 1)), shards.rows)
        return shards.replace(rows=rows)


def pack(
    prompt: jax.Array,
    prompt_lengths: jax.Array,
    completion: jax.Array,
    lengths: jax.Array,
    *,
    tokens: int,
    whole_groups: bool = False,
    experts: Experts | None = None,
) -> Packing:
    """Packs completions prompt by prompt, the longest of each first, into the first row that has room.

    Args:
        prompt: `[P, Tp]` int, right-padded; P a multiple of the shards.
        prompt_lengths: `[P]` int.
        completion: `[P, G, Tc]` int, right-padded.
        lengths: `[P, G]` int: tokens of each that are read; 0: it is left out.
        tokens: T, the length of a row.
        whole_groups: let all completions of a prompt lie in one row.
        experts: those that computed the tokens elsewhere, or `None`.

    Raises:
        ValueError: a row may be too short for what must lie in it.
    """
    (prompts, prompt_width), (_, group, width), shards = prompt.shape, completion.shape, row_shards()
    check_room(tokens, prompt_width, group * width if whole_groups else width)

    def split(x: jax.Array) -> jax.Array:
        return constrain(x.reshape(shards, prompts // shards, *x.shape[1:]), "rows", *(None,) * x.ndim)

    prompt, prompt_lengths, completion, lengths = map(split, (prompt, prompt_lengths, completion, lengths))
    capacity = _capacity(tokens, prompts // shards, prompt_width, group, width, whole_groups=whole_groups)
    common = jax.vmap(_common)(prompt, prompt_lengths)
    copied = prompt_lengths - common[:, None]
    row, start, opens, prompt_start = jax.vmap(lambda b, p, c: _places(b, p, c, tokens, capacity, whole_groups))(
        common, copied, lengths
    )
    # Those of one prompt in one row share its copy.
    together = (row[..., :, None] == row[..., None, :]) & (lengths[..., None, :] > 0)
    prompt_end = jnp.max(jnp.where(together, (start + lengths)[..., None, :], 0), axis=-1)
    # A completion and the copy of the prompt before it are one segment; those without tokens come last.
    begin = row * tokens + start - jnp.where(opens, copied[..., None], 0)
    begin = jnp.where(lengths > 0, begin, jnp.iinfo(jnp.int32).max)
    flat = [x.reshape(shards, -1) for x in (lengths, row, start, opens, prompt_start, prompt_end, begin)]
    order = jnp.argsort(flat[-1], axis=1)
    return Packing(
        *(prompt, prompt_lengths, completion, common, *flat),
        order=order,
        tokens=tokens,
        capacity=capacity,
        experts=jax.tree.map(split, experts),
    )


def check_room(tokens: int, prompt_width: int, width: int) -> None:
    """Raises ValueError unless a row has room for a prompt and what must follow it in the same row."""
    if prompt_width + width > tokens:
        raise ValueError(
            f"update.tokens_per_micro_batch={tokens} is less than a prompt of up to {prompt_width} tokens and {width} "
            f"tokens of completions, which may all be real: raise it to {prompt_width + width} or more, or shorten "
            "prompts or completions"
        )


def _capacity(tokens: int, prompts: int, prompt_width: int, group: int, width: int, *, whole_groups: bool) -> int:
    """Rows of `tokens` that so many prompts and their completions of these widths may take."""
    if prompts * (prompt_width + group * width) <= tokens:
        return 1
    pieces, room = (prompts, group * width) if whole_groups else (prompts * group, width)
    # First fit fills all rows but one to more than a half.
    return min(pieces, -(-2 * pieces * (prompt_width + room) // tokens) + 1)


def _common(prompt: jax.Array, lengths: jax.Array) -> jax.Array:
    """How many tokens prompts `[P, Tp]` have in common at their beginning, without the last one of any."""
    same = jnp.all(prompt == prompt[:1], axis=0)
    return jnp.minimum(jnp.sum(jnp.cumprod(same)), jnp.min(lengths) - 1).astype(jnp.int32)


class _Rows(NamedTuple):
    """The rows of one shard while completions are laid into them, `[R]` each."""

    used: jax.Array
    """Tokens."""
    prompt: jax.Array
    """Which prompt lies there last; −1: none."""
    prompt_start: jax.Array
    """Where."""


def _places(
    common: jax.Array, prompt_lengths: jax.Array, lengths: jax.Array, tokens: int, capacity: int, whole_groups: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of one shard: row, start, opens, prompt_start of each completion, `[P/S, G]`.

    Args:
        common: tokens with which each row begins.
        prompt_lengths: `[P/S]`, without these.
        lengths: `[P/S, G]`.
        tokens: T.
        capacity: rows.
        whole_groups: as `pack`.
    """
    prompts, group = lengths.shape
    descending = jnp.argsort(-lengths, axis=1)
    ordered = jnp.take_along_axis(lengths, descending, axis=1).astype(jnp.int32)
    needed = ordered
    if whole_groups:  # the first of a group asks for all of it, and the others follow
        needed = jnp.zeros_like(ordered).at[:, 0].set(jnp.sum(ordered, axis=1))

    def place(
        carry: tuple[_Rows, jax.Array], completion: tuple[jax.Array, ...]
    ) -> tuple[tuple[_Rows, jax.Array], tuple[jax.Array, ...]]:
        taken, last = carry
        prompt, prompt_length, length, needed, follows = completion
        cost = needed + jnp.where(taken.prompt == prompt, 0, prompt_length)
        row = jnp.where(follows, last, jnp.argmax(taken.used + cost <= tokens).astype(jnp.int32))
        is_real = length > 0
        opens = is_real & (taken.prompt[row] != prompt)
        prompt_start = jnp.where(opens, taken.used[row], taken.prompt_start[row])
        start = taken.used[row] + jnp.where(opens, prompt_length, 0)
        after = (jnp.where(is_real, start + length, taken.used[row]), jnp.where(is_real, prompt, taken.prompt[row]))
        taken = _Rows(*(old.at[row].set(new) for old, new in zip(taken, (*after, prompt_start), strict=True)))
        return (taken, row), (row, start, opens, prompt_start)

    number = jnp.repeat(jnp.arange(prompts, dtype=jnp.int32), group)
    prompt_length = jnp.repeat(prompt_lengths.astype(jnp.int32), group)
    follows = jnp.tile(jnp.arange(group) > 0, prompts) & whole_groups
    empty = _Rows(*(jnp.full((capacity,), value, jnp.int32) for value in (common, -1, 0)))
    completions = (number, prompt_length, ordered.reshape(-1), needed.reshape(-1), follows)
    _, made = jax.lax.scan(place, (empty, jnp.int32(0)), completions)
    back = jnp.argsort(descending, axis=1)
    row, start, opens, prompt_start = (jnp.take_along_axis(x.reshape(prompts, group), back, axis=1) for x in made)
    return row, start, opens, prompt_start


def _layout(packing: Packing, row: jax.Array) -> PackedLayout:
    """Row `row` of one shard: `packing` without the axis of shards."""
    prompts, group, width = packing.completion.shape
    length, size, common = packing.lengths, packing.completion.size, packing.common
    own_prompt = jnp.repeat(packing.prompt_lengths, group) - common
    copied = jnp.where(packing.opens, own_prompt, 0)
    used = jnp.max(jnp.where((packing.row == row) & (length > 0), packing.start + length, 0))
    place = jnp.arange(packing.tokens, dtype=jnp.int32)
    is_common = (place < common) & (used > 0)
    whole = row * packing.tokens + place
    nearest = jnp.searchsorted(packing.begin[packing.order], whole, side="right") - 1
    segment = packing.order[jnp.maximum(nearest, 0)]
    offset = whole - packing.begin[segment]
    is_prompt = (nearest >= 0) & (offset < copied[segment])
    time = offset - copied[segment]
    is_own = (nearest >= 0) & ~is_prompt & (time < length[segment])
    source = jnp.where(is_own, segment * width + time, size)
    depth = common + jnp.where(is_prompt, offset, own_prompt[segment] + time)
    depth = jnp.where(is_common, place, depth)

    def at(of_prompts: jax.Array, own: jax.Array, fill: int) -> jax.Array:
        """What is known of each token, `[T, *]`, of what is known of prompts and of completions."""
        of_prompt = of_prompts[segment // group, jnp.clip(depth, 0, of_prompts.shape[1] - 1)]
        own = own.reshape(-1, *own.shape[3:])[jnp.minimum(source, size - 1)]
        is_own_here, real_here = (x.reshape(-1, *(1,) * (own.ndim - 1)) for x in (is_own, real))
        return jnp.where(is_own_here, own, jnp.where(real_here, of_prompt, fill))

    end = jnp.where(is_prompt, packing.prompt_end[segment], packing.start[segment] + length[segment])
    end = jnp.where(is_common, used, end)
    real = is_common | is_prompt | is_own
    parent = jnp.where(is_prompt & (offset == 0), common, place) - 1
    branches = is_own & (time == 0)
    parent = jnp.where(branches, packing.prompt_start[segment] + own_prompt[segment] - 1, parent)
    held = (packing.row == row)[:, None] & length_mask(length, width)
    where = jnp.where(held, packing.start[:, None] + jnp.arange(width), -1)
    return PackedLayout(
        rows=TokenRows(
            tokens=at(packing.prompt, packing.completion, 0),
            depth=jnp.where(real, depth, 0).astype(jnp.int32),
            end=jnp.where(real, end, place + 1).astype(jnp.int32),
            experts=None if packing.experts is None else at(*packing.experts, -1),
        ),
        parent=jnp.maximum(parent, 0).astype(jnp.int32),
        place=where.reshape(prompts, group, width).astype(jnp.int32),
        source=source.astype(jnp.int32),
    )
