"""Rows of tokens as the transformer reads them, and where in them the tokens lie that are scored.

A row holds trees of tokens in depth-first order: a prompt with its completions, packed sequences, a conversation with
branches. A `Layout` says how prompts and completions `[P, G, Tc]` are laid out in rows, so that what is made of them
token by token comes back as `[P, G, Tc]` whatever the rows look like.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl_llm.masking import length_mask
from jaxrl_llm.models.attention import SharedPrompt
from jaxrl_llm.models.time_shards import dealt_order
from jaxrl_llm.sharding import constrain, context_shards

Experts = tuple[jax.Array, jax.Array]
"""The experts that computed tokens of prompts `[P, Tp, L, k]` and completions `[P, G, Tc, L, k]`."""


class TokenRows(struct.PyTreeNode):
    """Trees of tokens, in depth-first order; see `Visibility` for what they mean to attention."""

    tokens: jax.Array
    """`[B, T]` int32."""
    depth: jax.Array
    """`[B, T]` int32: how many tokens are above each, its rotary position."""
    end: jax.Array
    """`[B, T]` int32: one past the place of the last token below it; of padding, one past its own."""
    shared: SharedPrompt | None = struct.field(pytree_node=False, default=None)
    """Their shape, where it is known when the program is compiled."""
    place: jax.Array | None = None
    """`[B, T]` int32: where in the depth-first order each token lies. `None`: they are in that order."""
    experts: jax.Array | None = None
    """`[B, T, L, k]` int: the experts that computed each token elsewhere, in each layer; −1: not known."""

    @property
    def is_padding(self) -> jax.Array:
        """`[B, T]` bool: trees of one token, which nothing predicts and which predict nothing."""
        place = jnp.arange(self.tokens.shape[1]) if self.place is None else self.place
        return (self.depth == 0) & (self.end == place + 1)

    @classmethod
    def causal(cls, tokens: jax.Array) -> TokenRows:
        """Plain sequences `[B, T]`, right-padded: padding lies after every real token, which hides it."""
        length = tokens.shape[1]
        depth = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        return cls(tokens, depth, jnp.full_like(depth, length), SharedPrompt(length, 0, 0))

    @classmethod
    def of_segments(cls, tokens: jax.Array, segment_ids: jax.Array) -> TokenRows:
        """Several packed sequences a row, each a run of equal ids `[B, T]`; negative ids are padding."""
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        begins = (segment_ids < 0) | (segment_ids != jnp.roll(segment_ids, 1, axis=1)).at[:, 0].set(True)
        first = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
        ends = jnp.roll(begins, -1, axis=1)  # the last place of a row is one, too
        end = jax.lax.cummin(jnp.where(ends, place + 1, tokens.shape[1]), axis=1, reverse=True)
        return cls(tokens, place - first, end)

    @classmethod
    def of_groups(
        cls, prompt: jax.Array, prompt_lengths: jax.Array, completion: jax.Array, experts: Experts | None = None
    ) -> TokenRows:
        """Each prompt `[P, Tp]` and, after it, its completions `[P, G, Tc]`, padding included.

        Causality alone hides the padding of completions.
        """
        prompts, prompt_width = prompt.shape
        _, group, width = completion.shape
        total = prompt_width + group * width
        place = jnp.arange(total, dtype=jnp.int32)
        times = jnp.arange(width, dtype=jnp.int32)
        own_depth = jnp.broadcast_to(prompt_lengths[:, None, None] + times, completion.shape)
        own_end = prompt_width + width * (1 + jnp.arange(group, dtype=jnp.int32))[:, None]
        own_end = jnp.broadcast_to(own_end, completion.shape)
        prompt_end = jnp.where(length_mask(prompt_lengths, prompt_width), total, place[:prompt_width] + 1)

        def join(of_prompt: jax.Array, own: jax.Array) -> jax.Array:
            return jnp.concatenate([of_prompt, own.reshape(prompts, -1, *own.shape[3:])], axis=1)

        prompt_depth = jnp.broadcast_to(place[:prompt_width], prompt.shape)
        return cls(
            tokens=join(prompt, completion),
            depth=join(prompt_depth, own_depth).astype(jnp.int32),
            end=join(prompt_end, own_end).astype(jnp.int32),
            shared=SharedPrompt(prompt_width, group, width),
            experts=None if experts is None else join(*experts),
        )

    def dealt(self, order: np.ndarray) -> TokenRows:
        """The same rows, filled up with padding, in another order of their places (see `dealt_order`)."""
        length = self.tokens.shape[1]
        place = jnp.broadcast_to(order, (len(self.tokens), len(order)))
        tokens, depth, end = (_reordered(x, order) for x in (self.tokens, self.depth, self.end))
        end = jnp.where(place < length, end, place + 1)
        experts = None if self.experts is None else _reordered(self.experts, order, fill=-1)
        tokens, depth, end, experts = jax.tree.map(
            lambda x: constrain(x, "rows", "time", *(None,) * (x.ndim - 2)), (tokens, depth, end, experts)
        )
        return TokenRows(tokens, depth, end, place=place, experts=experts)


def _reordered(x: jax.Array, order: np.ndarray, fill: int = 0) -> jax.Array:
    """`[B, T, *]` → `[B, T', *]`."""
    more = ((0, 0), (0, len(order) - x.shape[1]), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, more, constant_values=fill)[:, order]


@runtime_checkable
class Layout(Protocol):
    """How completions `[P, G, Tc]` of prompts lie in rows of tokens."""

    @property
    def rows(self) -> TokenRows:
        """What the transformer reads."""
        ...

    @property
    def targets(self) -> jax.Array:
        """The tokens that are scored, `[…]`: those of completions, in the order that suits the rows."""
        ...

    @property
    def kept(self) -> jax.Array | None:
        """`[P, G, Tc, k]`, to be packed: the tokens that each was drawn from, where scores are to be under these."""
        ...

    def before(self, states: jax.Array) -> jax.Array:
        """Of states `[B, T, D]` those that predict the targets, `[…, D]`."""
        ...

    def at(self, states: jax.Array) -> jax.Array:
        """Of states `[B, T, D]` those that have read the targets, `[…, D]`."""
        ...

    def unpack(self, values: Any) -> Any:
        """A tree of what was made of targets, `[…, *]`, as `[P, G, Tc, *]`; 0 at those that these rows do not hold."""
        ...

    def pack(self, values: Any) -> Any:
        """A tree of what is known of completions, `[P, G, Tc, *]`, at the targets `[…, *]`; 0 at all others."""
        ...

    def dealt(self, order: np.ndarray) -> Layout:
        """That of the same completions in rows with the places in another order (`TokenRows.dealt`)."""
        ...


class PaddedLayout(struct.PyTreeNode):
    """Rows are as the prompts and completions come: each a prompt and, after it, its completions, padding included."""

    rows: TokenRows
    prompt_lengths: jax.Array
    """`[P]`."""
    targets: jax.Array
    """`[P, G, Tc]`."""
    kept: jax.Array | None = None
    """`[P, G, Tc, k]`."""

    @classmethod
    def of(
        cls,
        prompt: jax.Array,
        prompt_lengths: jax.Array,
        completion: jax.Array,
        kept: jax.Array | None = None,
        experts: Experts | None = None,
    ) -> PaddedLayout:
        """That of prompts `[P, Tp]` and completions `[P, G, Tc]`, both right-padded."""
        return cls(TokenRows.of_groups(prompt, prompt_lengths, completion, experts), prompt_lengths, completion, kept)

    def before(self, states: jax.Array) -> jax.Array:
        """`[P, G, Tc, D]`: entry 0 is the prompt's last state, shared by the group."""
        assert self.rows.shared is not None
        of_prompt, own = self.rows.shared.split(states)
        last = jnp.take_along_axis(of_prompt, (self.prompt_lengths - 1)[:, None, None], axis=1)
        first = jnp.broadcast_to(last[:, None], (*own.shape[:2], 1, own.shape[-1]))
        return jnp.concatenate([first, own[:, :, :-1]], axis=2)

    def at(self, states: jax.Array) -> jax.Array:
        """`[P, G, Tc, D]`."""
        assert self.rows.shared is not None
        return self.rows.shared.split(states)[1]

    def unpack(self, values: Any) -> Any:
        """The same: targets lie as the completions do."""
        return values

    def pack(self, values: Any) -> Any:
        """The same."""
        return values

    def dealt(self, order: np.ndarray) -> PackedLayout:
        """As rows of which each holds the completions of one prompt."""
        assert self.rows.shared is not None
        (first, group, width), rows = self.rows.shared, self.rows
        source = np.arange(first + group * width, dtype=np.int32) - first
        source[:first] = group * width
        branches = (np.arange(len(source)) >= first) & (source % max(1, width) == 0)
        parent = jnp.where(branches, self.prompt_lengths[:, None] - 1, np.maximum(np.arange(len(source)) - 1, 0))
        place = (first + np.arange(group * width, dtype=np.int32)).reshape(1, group, width)
        return PackedLayout(
            rows=rows,
            parent=parent.astype(jnp.int32),
            place=jnp.broadcast_to(place, (len(rows.tokens), *place.shape)),
            source=jnp.broadcast_to(source, rows.tokens.shape),
            kept=self.kept,
        ).dealt(order)


class PackedLayout(struct.PyTreeNode):
    """Completions one after another in S rows of T tokens, wherever they found room, their prompts before them.

    Row s holds some of the completions `[s·P/S : (s+1)·P/S]`. Its targets are all of its tokens, those of prompts and
    padding included. Completions that begin alike may share what they have in common.
    """

    rows: TokenRows
    """`[S, T]`."""
    parent: jax.Array
    """`[S, T]` int32: the place of what predicts each token."""
    place: jax.Array
    """`[S, P/S, G, Tc]` int32: where in its row each token of a completion lies; −1: nowhere."""
    source: jax.Array | None
    """`[S, T]` int32: which of the P/S·G·Tc tokens each is, ≥ P/S·G·Tc: none of them. `None`: some are several, and
    then gradients of what is unpacked are sums over the completions that share a token."""
    kept: jax.Array | None = None
    """`[P, G, Tc, k]`."""

    @classmethod
    def of_segments(cls, tokens: jax.Array, segment_ids: jax.Array) -> PackedLayout:
        """Rows of several sequences, prompts included, as if each row were one completion: `[P, 1, T]`, P = S.

        What is made of the first token of a sequence, and of padding, means nothing.
        """
        rows = TokenRows.of_segments(tokens, segment_ids)
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return cls(rows, parent=jnp.maximum(place - 1, 0), place=place[:, None, None], source=place)

    @property
    def targets(self) -> jax.Array:
        """`[S, T]`."""
        return self.rows.tokens

    def before(self, states: jax.Array) -> jax.Array:
        """`[S, T, D]`."""
        found = jax.vmap(lambda row, parent: row[parent])(self._whole(states), self.parent)
        return self._by_time(self._whole(found))

    def at(self, states: jax.Array) -> jax.Array:
        """The same: every token is a target."""
        return states

    def unpack(self, values: Any) -> Any:
        """`[S, T, *]` → `[P, G, Tc, *]`."""
        shape = self.place.shape
        flat = self.place.reshape(shape[0], -1)

        def one(x: jax.Array) -> jax.Array:
            x = self._whole(x)
            found = _gather(x, flat) if self.source is None else _exchange(x, flat, self.source)
            return found.reshape(-1, *shape[2:], *x.shape[2:])

        return jax.tree.map(one, values)

    def pack(self, values: Any) -> Any:
        """`[P, G, Tc, *]` → `[S, T, *]`."""
        if self.source is None:
            raise ValueError("a token that several sequences share has no value of one of them: gather it instead")
        shape, source = self.place.shape, self.source
        flat = self.place.reshape(shape[0], -1)
        size = shape[1] * shape[2] * shape[3]
        inside = jnp.where(source < size, source, -1)

        def one(x: jax.Array) -> jax.Array:
            found = _exchange(x.reshape(shape[0], size, *x.shape[3:]), inside, flat)
            return self._by_time(self._whole(found))

        return jax.tree.map(one, values)

    def dealt(self, order: np.ndarray) -> PackedLayout:
        """The same with all that tells places translated."""
        where = jnp.asarray(np.argsort(order).astype(np.int32))
        size = math.prod(self.place.shape[1:])
        return PackedLayout(
            rows=self.rows.dealt(order),
            parent=where[_reordered(self.parent, order)],
            place=jnp.where(self.place < 0, -1, where[self.place]),
            source=None if self.source is None else _reordered(self.source, order, fill=size),
            kept=self.kept,
        )

    def _whole(self, x: jax.Array) -> jax.Array:
        """`[S, T, *]` before something is looked up along rows whose time is split: each device has whole rows.

        Of states that is a part of their entries, so that they are exchanged and never gathered.
        """
        if self.rows.place is None:
            return x
        split = x.ndim > 2 and x.shape[-1] % context_shards() == 0
        return constrain(x, "rows", *(None,) * (x.ndim - 2), "entries_activation" if split else None)

    def _by_time(self, x: jax.Array) -> jax.Array:
        """`[S, T, *]` as the rows lie on the devices."""
        return x if self.rows.place is None else constrain(x, "rows", "time", *(None,) * (x.ndim - 2))


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[s, index[s]]` of `[S, M, *]`; 0 where the index is outside."""
    inside = (index >= 0) & (index < x.shape[1])
    found = jax.vmap(lambda row, at: row[at])(x, jnp.clip(index, 0, x.shape[1] - 1))
    return jnp.where(inside.reshape(inside.shape + (1,) * (x.ndim - 2)), found, jnp.zeros((), x.dtype))


@jax.custom_vjp
def _exchange(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """`_gather(x, index)` whose gradient is a gather, too, since no entry of `x` is asked for twice."""
    return _gather(x, index)


def _exchange_forward(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _gather(x, index), inverse


def _exchange_backward(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return _gather(gradient, inverse), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def layout_of(texts: Any) -> Layout:
    """The layout of texts: itself, or that of any record with `prompt`, `prompt_lengths` and `completion`.

    Records that have a `layout` were laid out before; those that have `segment_ids` hold several sequences a row. Where
    the ambient mesh splits the time of rows, their places are dealt to its devices.
    """
    layout, shards = _plain_layout_of(texts), context_shards()
    if shards == 1 or layout.rows.place is not None:
        return layout
    return layout.dealt(dealt_order(layout.rows.tokens.shape[1], shards))


def _plain_layout_of(texts: Any) -> Layout:
    if isinstance(texts, Layout):
        return texts
    layout = getattr(texts, "layout", None)
    if layout is not None:
        return layout
    segment_ids = getattr(texts, "segment_ids", None)
    if segment_ids is not None:
        return PackedLayout.of_segments(texts.completion[:, 0], segment_ids[:, 0])
    kept, experts = getattr(texts, "kept", None), getattr(texts, "experts", None)
    if experts is not None:
        experts = (texts.prompt_experts, experts)
    return PaddedLayout.of(texts.prompt, texts.prompt_lengths, texts.completion, kept, experts)
