"""How a batch is cut: prompts into minibatches, these into pieces, and groups where prompts are too few."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.algorithms.packing import check_room, pack
from jaxrl_llm.algorithms.pieces import LaidOut, Pieces
from jaxrl_llm.checks import check_fields, count
from jaxrl_llm.models.rows import PackedLayout
from jaxrl_llm.records import Mean, join_parts, nothing_yet
from jaxrl_llm.sharding import constrain, row_shards


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """The pieces in which an optimizer step is computed; they change memory and time, not the result."""

    micro_batches: int = 1
    """Pieces in which the gradient of one optimizer step is accumulated, with their padding."""
    tokens_per_micro_batch: int | None = None
    """Pack completions with their prompts into rows of so many tokens, as many rows as the real tokens fill; each of
    the mesh's row shards (data × fsdp) computes one at a time. What all prompts begin with (a system prompt) is there
    once in a row. A row must have room for the longest prompt with the longest completion. `None`: `micro_batches` of
    whole prompts and their padding, which is faster for short texts of about equal length."""

    def __post_init__(self) -> None:
        """Rejects counts below 1, and two ways to cut."""
        tokens = self.tokens_per_micro_batch
        check_fields(
            "update",
            self,
            micro_batches=count(self.micro_batches),
            tokens_per_micro_batch=(True, "") if tokens is None else count(tokens),
        )
        if tokens is not None and self.micro_batches > 1:
            raise ValueError(
                f"update.micro_batches={self.micro_batches} with update.tokens_per_micro_batch={tokens}: how many rows "
                "there are depends on the tokens; set update.micro_batches=1, or leave the tokens out"
            )

    @property
    def _told(self) -> str:
        """How many pieces there are, by the settings that say so."""
        return f"update.micro_batches={self.micro_batches}"

    @property
    def _of(self) -> str:
        """Of what they are, in words."""
        return " of a minibatch"

    def check_width(self, prompt_width: int, width: int) -> None:
        """Raises ValueError unless a row has room for a prompt and a completion of these widths."""
        if self.tokens_per_micro_batch is not None:
            check_room(self.tokens_per_micro_batch, prompt_width, width)

    def check_unpacked(self, rows: Any) -> None:
        """Raises ValueError if rows that are to be packed hold several sequences each already."""
        tokens = self.tokens_per_micro_batch
        if tokens is not None and getattr(rows, "segment_ids", None) is not None:
            raise ValueError(
                f"update.tokens_per_micro_batch={tokens}: these rows hold several sequences each already (packed "
                "data); use one of the two"
            )

    def group_split(self, prompts: int, group: int, row_shards: int, *, whole_groups: bool = False) -> int:
        """Into how many rows a prompt's completions must be dealt to fill micro-batches and devices.

        A prompt is computed once in each of them. 1 where there are prompts enough.

        Raises:
            ValueError: the numbers do not fit; names them and the way out.
        """
        pieces = self.micro_batches * row_shards
        for split in range(1, group + 1):
            if group % split == 0 and (prompts * split) % pieces == 0:
                if split > 1 and whole_groups:
                    break
                return split
        raise ValueError(
            f"{prompts} prompts × {group} samples{self._of} cannot be cut into {self._told} × {row_shards} row shards "
            "of the mesh (data × fsdp)"
            + (
                " without cutting groups, which are needed whole here; change prompts per step"
                if whole_groups
                else "; change prompts per step, samples per prompt"
            )
            + ", micro_batches or the mesh"
        )

    def can_cut(self, prompts: int, group: int, *, whole_groups: bool = False) -> bool:
        """Whether so many prompts fill micro-batches and the ambient mesh's devices (`group_split`)."""
        try:
            self.group_split(prompts, group, row_shards(), whole_groups=whole_groups)
        except ValueError:
            return False
        return True

    def row_pieces(self, rows: int, length: int, row_shards: int) -> int:
        """Into how many pieces so many rows of tokens of one length are dealt, which were laid out ahead.

        Raises:
            ValueError: the numbers do not fit; names them and the way out.
        """
        tokens = self.tokens_per_micro_batch
        if tokens is not None and tokens < length:
            raise ValueError(
                f"update.tokens_per_micro_batch={tokens} is less than the {length} tokens of a row that was laid out; "
                f"raise it to {length} or more, or lay out shorter rows"
            )
        if rows % (multiple := self.micro_batches * row_shards):
            raise ValueError(
                f"{rows} rows of tokens cannot be dealt to {self._told} × {row_shards} row shards of the mesh "
                f"(data × fsdp); lay out a multiple of {multiple}, of which some may be empty, "
                "or change the other two"
            )
        if tokens is None:
            return self.micro_batches
        of_shard = rows // row_shards
        return min(n for n in range(1, of_shard + 1) if of_shard % n == 0 and of_shard // n * length <= tokens)


@dataclasses.dataclass(frozen=True)
class UpdateConfig(MicroBatches):
    """How one batch of rollouts is turned into optimizer steps.

    Prompts per step × samples per prompt = rows. Each epoch cuts the prompts into `minibatches`, one optimizer
    step each, which is computed in pieces.
    """

    epochs: int = 1
    """Passes over the batch."""
    minibatches: int = 1
    """Optimizer steps per pass; must divide the number of prompts."""

    def __post_init__(self) -> None:
        """Rejects counts below 1."""
        super().__post_init__()
        check_fields("update", self, epochs=count(self.epochs), minibatches=count(self.minibatches))

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps per batch."""
        return self.epochs * self.minibatches

    @property
    def of_minibatch(self) -> MicroBatches:
        """How one minibatch is computed."""
        return MicroBatches(self.micro_batches, self.tokens_per_micro_batch)

    @property
    def of_batch(self) -> MicroBatches:
        """How a whole batch is read: in pieces of the size that those of a minibatch have."""
        if self.tokens_per_micro_batch is not None:
            return self.of_minibatch
        return _OfBatch(self.micro_batches * self.minibatches, minibatches=self.minibatches)

    def group_split(self, prompts: int, group: int, row_shards: int, *, whole_groups: bool = False) -> int:
        """That of the prompts of one minibatch."""
        if prompts % self.minibatches:
            raise ValueError(f"{prompts} prompts per step are not divisible by update.minibatches={self.minibatches}")
        return super().group_split(prompts // self.minibatches, group, row_shards, whole_groups=whole_groups)


@dataclasses.dataclass(frozen=True)
class _OfBatch(MicroBatches):
    """The pieces of all minibatches."""

    minibatches: int = 1

    @property
    def _told(self) -> str:
        return f"update.minibatches={self.minibatches} × update.micro_batches={self.micro_batches // self.minibatches}"

    @property
    def _of(self) -> str:
        return ""


def split_groups(rows: Any, split: int) -> Any:
    """Deals the completions of each prompt to `split` rows, each with its own copy of the prompt.

    Arrays `[P, G, …]` become `[P·split, G/split, …]`, arrays of prompts are repeated.

    Args:
        rows: a record with prompts, or any tree of arrays of completions.
        split: how many.
    """
    if split == 1:
        return rows

    def dealt(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] * split, x.shape[1] // split, *x.shape[2:])

    if not hasattr(rows, "prompt"):
        return jax.tree.map(dealt, rows)

    def one(name: str, x: jax.Array) -> jax.Array:
        of_prompt = x.ndim == 1 or name.startswith("prompt")
        return jnp.repeat(x, split, axis=0) if of_prompt else dealt(x)

    return rows._replace(**{name: one(name, x) for name, x in rows._asdict().items() if x is not None})


def join_groups(made: Any, split: int) -> Any:
    """The inverse of `split_groups` on a tree of arrays `[P·split, G/split, …]`."""
    return jax.tree.map(lambda x: x.reshape(len(x) // split, x.shape[1] * split, *x.shape[2:]), made)


# ---- Pieces ----------------------------------------------------------------------------------------


class Dealt(Pieces):
    """Rows as they come, padding included, dealt to a number of pieces that is known."""

    def __init__(self, rows: Any, count: int, split: int, *, whole_groups: bool):
        """Cuts each group to `split` rows, and deals these to `count` pieces."""
        self._given = rows
        self.count, self.split, self.whole_groups, self.whole_batch = count, split, whole_groups, count == 1
        self.parts = self._deal(rows)

    def _deal(self, rows: Any) -> Any:
        rows = split_groups(rows, self.split)
        return jax.tree.map(lambda x: x[None], spread(rows)) if self.count == 1 else deal(rows, self.count)

    @property
    def useful(self) -> Mean:
        """As `Pieces.useful`."""
        return Mean(_needed_tokens(self._given), jnp.float32(self.parts.prompt.size + self.parts.completion.size))

    def fold(self, function: Callable[..., Any], beside: Any = ()) -> Any:
        """As `Pieces.fold`."""
        parts = (self.parts, *(self._deal(tree) for tree in beside))
        rows, *rest = jax.tree.map(lambda x: x[0], parts)
        if self.count == 1:
            return function(rows, rows, *rest)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            rows, *rest = part
            return join_parts(total, function(rows, rows, *rest)), None

        return jax.lax.scan(add, nothing_yet(jax.eval_shape(function, rows, rows, *rest)), parts)[0]

    def map(self, function: Callable[[Any, Any], Any]) -> Any:
        """As `Pieces.map`."""
        made = jax.lax.map(lambda part: function(part, part), self.parts)
        return join_groups(jax.tree.map(collect, made), self.split)


class Packed(Pieces):
    """Rows packed to a token budget: a piece is one row of tokens on each shard, and there are as many as it takes."""

    def __init__(self, rows: Any, tokens: int, split: int, *, whole_groups: bool):
        """Cuts each group to `split` rows, and packs what is read of its completions."""
        self.split, self.rows = split, spread(split_groups(rows, split))
        _, group, width = self.rows.completion.shape
        self.whole_groups = whole_groups and self.rows.prompt.shape[1] + group * width <= tokens
        experts = getattr(self.rows, "experts", None)
        self.packing = pack(
            self.rows.prompt,
            self.rows.prompt_lengths,
            self.rows.completion,
            _read_lengths(self.rows),
            tokens=tokens,
            whole_groups=self.whole_groups,
            experts=(self.rows.prompt_experts, experts) if experts is not None else None,
        )
        self.whole_batch = self.packing.capacity == 1

    @property
    def useful(self) -> Mean:
        """As `Pieces.useful`."""
        shards = self.packing.lengths.shape[0]
        rows = 1 if self.whole_batch else self.packing.count
        computed = jnp.asarray(rows * self.packing.tokens * shards)
        return Mean(self.packing.needed.astype(jnp.float32), computed.astype(jnp.float32))

    def _piece(self, index: jax.Array) -> tuple[Any, PackedLayout]:
        held = self.packing.holds(index)[..., None]
        masks = {name: mask & held for name, mask in _masks(self.rows).items()}
        layout = self.packing.layout(index).replace(kept=getattr(self.rows, "kept", None))
        return self.rows._replace(**masks), layout

    def fold(self, function: Callable[..., Any], beside: Any = ()) -> Any:
        """As `Pieces.fold`."""
        rest = tuple(split_groups(tree, self.split) for tree in beside)
        if self.whole_batch:  # no second copy of what is summed
            return function(*self._piece(jnp.int32(0)), *rest)

        def add(index: jax.Array, total: Any) -> Any:
            return join_parts(total, function(*self._piece(index), *rest))

        nothing = nothing_yet(jax.eval_shape(lambda: function(*self._piece(jnp.int32(0)), *rest)))
        return jax.lax.fori_loop(0, self.packing.count, add, nothing)

    def map(self, function: Callable[[Any, Any], Any]) -> Any:
        """As `Pieces.map`."""

        def fill(index: jax.Array, made: Any) -> Any:
            held = self.packing.holds(index)

            def put(x: jax.Array, new: jax.Array) -> jax.Array:
                return jnp.where(held.reshape(held.shape + (1,) * (x.ndim - 2)), new, x)

            return jax.tree.map(put, made, function(*self._piece(index)))

        shapes = jax.eval_shape(lambda: function(*self._piece(jnp.int32(0))))
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return join_groups(jax.lax.fori_loop(0, self.packing.count, fill, nothing), self.split)


def _masks(rows: Any) -> dict[str, jax.Array]:
    """The masks of completion tokens `[P, G, Tc]` that a record has."""
    masks = {name: getattr(rows, name, None) for name in ("mask", "value_mask", "observations")}
    return {name: mask for name, mask in masks.items() if mask is not None}


def _read_lengths(rows: Any) -> jax.Array:
    """`[P, G]`: how many tokens of each completion must be read for those that some loss looks at."""
    read = functools.reduce(jnp.logical_or, _masks(rows).values())
    return jnp.max(jnp.where(read, jnp.arange(1, read.shape[-1] + 1), 0), axis=-1)


def _needed_tokens(rows: Any) -> jax.Array:
    """Each prompt once, and what is read of completions."""
    lengths = _read_lengths(rows)
    prompts = jnp.where(jnp.any(lengths > 0, axis=1), rows.prompt_lengths, 0)
    return (jnp.sum(lengths) + jnp.sum(prompts)).astype(jnp.float32)


def spread(rows: Any) -> Any:
    """Splits rows `[R, …]` over the mesh."""
    return jax.tree.map(lambda x: constrain(x, "rows", *(None,) * (x.ndim - 1)), rows)


def deal(rows: Any, parts: int) -> Any:
    """`[R, …]` → `[parts, R/parts, …]`, row i to part i mod `parts`, so that each part spans all devices."""

    def one(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
        return constrain(x, None, "rows", *(None,) * (x.ndim - 2))

    return jax.tree.map(one, rows)


def collect(x: jax.Array) -> jax.Array:
    """The inverse of `deal`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def cut(rows: Any, plan: MicroBatches, *, whole_groups: bool = False) -> Pieces:
    """The pieces in which a batch, or a minibatch of it, is computed.

    Args:
        rows: a record of arrays `[P, …]`; prompts and completions among them where pieces are read by a transformer,
            or a `layout` of rows of tokens, each of which holds as many of the P as any other.
        plan: the number of pieces, or the tokens of each.
        whole_groups: whether the completions of a prompt must be in one piece.

    Raises:
        ValueError: the numbers do not fit.
    """
    if getattr(rows, "layout", None) is not None:
        number, length = rows.layout.rows.tokens.shape
        return LaidOut(rows, plan.row_pieces(number, length, row_shards()))
    plan.check_unpacked(rows)
    completion, split = getattr(rows, "completion", None), 1
    if completion is not None:
        prompts, group = completion.shape[:2]
        split = plan.group_split(prompts, group, row_shards(), whole_groups=whole_groups)
    if plan.tokens_per_micro_batch is None:
        return Dealt(rows, plan.micro_batches, split, whole_groups=whole_groups)
    return Packed(rows, plan.tokens_per_micro_batch, split, whole_groups=whole_groups)
