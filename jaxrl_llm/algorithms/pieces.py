"""What a batch is computed in: pieces, of which those of rows that were laid out ahead are the simplest."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.records import Mean, join_parts, nothing_yet
from jaxrl_llm.sharding import constrain


class Pieces(abc.ABC):
    """A batch of rows as it is computed: piece by piece, to save memory.

    A piece is some rows and their texts, of which `layout_of` makes what a transformer reads. Among its rows may be
    some of which it holds nothing; their masks are empty.
    """

    whole_batch: bool
    """Whether the one piece is all there is."""
    whole_groups: bool
    """Whether all completions of a prompt are in one piece."""

    def divide(self, *, whole_groups: bool, whole_batch: bool) -> bool:
        """Whether what is compared lies in different pieces.

        Args:
            whole_groups: whether the completions of a prompt are.
            whole_batch: whether those of different prompts are.
        """
        return not self.whole_batch and (whole_batch or (whole_groups and not self.whole_groups))

    @property
    @abc.abstractmethod
    def useful(self) -> Mean:
        """How many of the tokens that are computed are real: of prompts, and of what is read of completions."""

    @abc.abstractmethod
    def fold(self, function: Callable[..., Any], beside: Any = ()) -> Any:
        """Joins what `function(rows, texts)` makes of each piece: arrays are summed, records merged.

        Args:
            function: of a piece; its results have the same shapes for each.
            beside: trees of arrays `[P, G, …]` whose parts are further arguments.
        """

    @abc.abstractmethod
    def map(self, function: Callable[[Any, Any], Any]) -> Any:
        """What `function(rows, texts)` makes of completions, a tree of `[P, G, …]`, for the whole batch."""


class LaidOut(Pieces):
    """Rows of tokens that were laid out ahead, with their record: a piece is some of them, as many on each shard.

    Pieces that hold padding alone, behind the last row in use, are not computed.
    """

    whole_groups = True

    def __init__(self, rows: Any, number: int):
        """Deals rows of tokens, each with the completions that it holds, to so many pieces in their order."""
        self.number, self.whole_batch = number, number == 1
        self.parts = self._deal(rows)
        self.is_real = ~jax.vmap(lambda rows: rows.is_padding)(self.parts.layout.rows)  # [pieces, rows, T]
        in_use = jnp.any(self.is_real, axis=(1, 2))
        self.count = jnp.max(jnp.where(in_use, jnp.arange(1, self.number + 1), 0))

    def _deal(self, tree: Any) -> Any:
        def one(x: jax.Array) -> jax.Array:
            return constrain(jnp.reshape(x, (self.number, -1, *x.shape[1:])), None, "rows", *(None,) * (x.ndim - 1))

        return jax.tree.map(one, tree)

    @property
    def useful(self) -> Mean:
        """As `Pieces.useful`."""
        computed = (1 if self.whole_batch else self.count) * self.is_real[0].size
        return Mean(jnp.sum(self.is_real, dtype=jnp.float32), jnp.asarray(computed, jnp.float32))

    def fold(self, function: Callable[..., Any], beside: Any = ()) -> Any:
        """As `Pieces.fold`."""
        parts = (self.parts, *(self._deal(tree) for tree in beside))

        def of(index: jax.Array | int) -> Any:
            rows, *rest = jax.tree.map(lambda x: x[index], parts)
            return function(rows, rows, *rest)

        if self.whole_batch:
            return of(0)
        nothing = nothing_yet(jax.eval_shape(of, jnp.int32(0)))
        return jax.lax.fori_loop(0, self.count, lambda index, total: join_parts(total, of(index)), nothing)

    def map(self, function: Callable[[Any, Any], Any]) -> Any:
        """As `Pieces.map`."""

        def of(index: jax.Array) -> Any:
            rows = jax.tree.map(lambda x: x[index], self.parts)
            return function(rows, rows)

        def fill(index: jax.Array, made: Any) -> Any:
            return jax.tree.map(lambda x, new: x.at[index].set(new), made, of(index))

        shapes = jax.eval_shape(of, jnp.int32(0))
        nothing = jax.tree.map(lambda x: jnp.zeros((self.number, *x.shape), x.dtype), shapes)
        made = jax.lax.fori_loop(0, self.count, fill, nothing)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)
