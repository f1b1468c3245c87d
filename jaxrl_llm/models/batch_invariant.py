"""Forward passes of which every number depends on its token and those before it alone, and not on the batch.

A sum of floating-point numbers depends on the order of its terms, and a compiler chooses that, and which products and
sums become one rounding, by shapes and by what it fuses: two programs that compute the same token, as a sampler and a
learner do, differ in the last bits. Here both run the same few computations on arrays of the same shapes, a tile of M
tokens at a time, whatever the batch: each of them is the body of a loop of its own (`apart`), across which nothing is
fused. Attention reads keys by their depth in the text, B at a time, from the first one on, wherever these lie.

Kernels of the same shape give a token the same number in whatever row of the tile it is, on the CPU as tested, on
accelerators as far as their libraries choose one kernel for one shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_llm.logprobs import TokenScores, scores_from_logits, scores_of_kept
from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.blocks import Attend, Block, Projected
from jaxrl_llm.models.rope import Rotation
from jaxrl_llm.sharding import MESH_AXES, on_cpu, row_axes, row_shards

_MASKED = -1e30

Read = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Index of a block → keys and values `[M, B, K, H]` of B depths, those from index · B on, of a tile's tokens."""


def tile_tokens() -> int:
    """M: as many rows as a matrix unit likes; fewer on CPUs, where a padded row costs as much as a real one."""
    return 16 if on_cpu() else 128


def block_keys() -> int:
    """B."""
    return 64 if on_cpu() else 128


# ---- Loops of their own ----------------------------------------------------------------------------


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """`function(*given)`, compiled alike wherever it stands: the body of a loop that the compiler cannot see through.

    The loop makes one turn, or, which is as good, two if the first number given is NaN.
    """
    made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *given))
    probe = jax.tree.leaves(given)[0].ravel()[0]
    turns = jnp.where(jnp.isnan(probe), 2, 1)

    def turn(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return carry[0] + 1, function(*given)

    return jax.lax.while_loop(lambda carry: carry[0] < turns, turn, (jnp.int32(0), made))[1]


def by_tile(function: Callable[..., Any], *given: Any) -> Any:
    """What `function(first, *tile)` makes of each tile of M tokens, one after the other.

    Args:
        function: the place of the tile's first token, and trees `[M, …]` → a tree `[M, …]`.
        given: trees `[N, …]`; the last tile is filled up with zeros.

    Returns:
        A tree `[N, …]`.
    """
    count, size = len(jax.tree.leaves(given)[0]), tile_tokens()
    tiles = -(-count // size)
    given = jax.tree.map(lambda x: jnp.pad(x, ((0, tiles * size - count), *((0, 0),) * (x.ndim - 1))), given)

    def of(index: jax.Array) -> Any:
        first = index * size
        return function(first, *jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), given))

    def put(index: jax.Array, made: Any) -> Any:
        def one(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new, index * size, axis=0)

        return jax.tree.map(one, made, of(index))

    shapes = jax.eval_shape(of, jnp.int32(0))
    nothing = jax.tree.map(lambda x: jnp.zeros((tiles * size, *x.shape[1:]), x.dtype), shapes)
    return jax.tree.map(lambda x: x[:count], jax.lax.fori_loop(0, tiles, put, nothing))


def _flat(tree: Any, axes: int) -> Any:
    """Arrays whose first so many axes are one."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), tree)


def of_rows(function: Callable[..., Any], whole: Any, *split: Any) -> Any:
    """`function(whole, *split)` on each device's rows of the ambient mesh, each with all of `whole`.

    Args:
        function: makes trees `[B, …]` of `[B, …]`, row by row.
        whole: a tree, of parameters.
        split: trees `[B, …]`; where devices do not divide the rows, the last one fills up.

    Raises:
        ValueError: the mesh splits more than rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {axis for axis in set(MESH_AXES).intersection(mesh.auto_axes) if mesh.shape[axis] > 1}
    if not free:
        return function(whole, *split)
    check_mesh(mesh)
    count, rows = len(jax.tree.leaves(split)[0]), PartitionSpec(row_axes())
    missing = -count % row_shards(mesh)
    split = jax.tree.map(lambda x: jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), mode="edge"), split)
    made = jax.shard_map(
        function,
        in_specs=(PartitionSpec(), *(rows for _ in split)),
        out_specs=rows,
        axis_names=free,
        check_vma=False,
    )(whole, *split)
    return jax.tree.map(lambda x: x[:count], made)


def check_mesh(mesh: Any) -> None:
    """Raises ValueError if a mesh splits products or rows, whose sums would then be of parts."""
    for axis in ("tensor", "context", "expert"):
        if mesh.shape.get(axis, 1) > 1:
            raise ValueError(
                f"model.batch_invariant=True does not go with {axis}={mesh.shape[axis]} on the mesh of learner or "
                f"sampler, where devices sum parts of products: set mesh.{axis}=1 (mesh.fsdp shares parameters, too)"
            )


def with_plain_backward(exact: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The function `(trained, *given)` with the values of `exact`, and the gradient of `plain` at the same arguments.

    Args:
        exact: `(trained, *given)`; keeps nothing for the backward pass but its arguments.
        plain: the same to within rounding. It has no gradient by `given` unless these are in `trained`.
    """

    @jax.custom_vjp
    def function(trained: Any, given: Any) -> Any:
        return exact(trained, *given)

    def forward(trained: Any, given: Any) -> tuple[Any, Any]:
        return exact(trained, *given), (trained, given)

    def backward(saved: Any, slopes: Any) -> tuple[Any, None]:
        trained, given = saved
        return jax.vjp(lambda trained: plain(trained, *given), trained)[1](slopes)[0], None

    function.defvjp(forward, backward)
    return lambda trained, *given: function(trained, given)


def numbers_by_tile(function: Callable[[jax.Array], Any], x: jax.Array, *, axes: int = 0) -> Any:
    """`function(x)` of all tokens, tile by tile.

    Args:
        function: `[M, …]` → a tree `[M, …]`.
        x: `[…, *]`, the axes of tokens before those of each.
        axes: how many axes those of each are.
    """
    lead = x.shape[: x.ndim - axes]
    flat = x.reshape(-1, *x.shape[len(lead) :])
    flat = flat if jnp.issubdtype(x.dtype, jnp.floating) else flat.astype(jnp.float32)
    made = by_tile(lambda _, tile: apart(function, tile), flat)
    return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), made)


def token_by_token(function: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, jax.Array], jax.Array]:
    """The function `(params, x)` of states `[B, …, D]` by tiles, on each device its rows; with the usual gradient."""

    def exact(trained: Any) -> jax.Array:
        params, x = trained
        return of_rows(lambda whole, x: numbers_by_tile(functools.partial(function, whole), x, axes=1), params, x)

    alike = with_plain_backward(exact, lambda trained: function(*trained))
    return lambda params, x: alike((params, x))


# ---- A layer ---------------------------------------------------------------------------------------


class TiledBlock(NamedTuple):
    """A `Block` whose tokens are computed by tiles, but for the attention, which is passed in."""

    block: Block
    dtype: Any
    """Of queries, keys and values."""

    def __call__(
        self, x: jax.Array, turn: Rotation | None, attention: Attend, chosen: jax.Array | None = None
    ) -> tuple[jax.Array, Projected, None]:
        """As `Block`; `attention` has to be by depth, and no layer has experts."""
        del chosen
        lead = x.shape[:-1]
        flat = functools.partial(_flat, axes=len(lead))

        def project(x: jax.Array, turn: Rotation | None) -> tuple[jax.Array, ...]:
            return tuple(part.astype(self.dtype) for part in self.block.project(x, turn))

        made = by_tile(lambda _, *tile: apart(project, *tile), flat(x), flat(turn))
        query, key, value = (part.reshape(*lead, *part.shape[1:]) for part in made)
        mixed = attention(query, key, value)
        x = by_tile(lambda _, *tile: apart(self.block.finish, *tile)[0], flat(x), flat(mixed)).reshape(x.shape)
        return x, (key, value), None


class _Mixed(NamedTuple):
    """An online softmax as far as it got, `[M, K, N/K]` before the axes of each; a block that is masked leaves it."""

    peak: jax.Array
    total: jax.Array
    mixed: jax.Array
    """`[…, H]`."""


def _with_block(
    softcap: float | None, query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array, so_far: _Mixed
) -> _Mixed:
    grouped = _grouped(query, key.shape[2]) * query.shape[-1] ** -0.5
    scores = jnp.einsum("mkrh,mbkh->mkrb", grouped, key, preferred_element_type=jnp.float32)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    seen = seen[:, None, None]
    peak = jnp.maximum(so_far.peak, jnp.max(jnp.where(seen, scores, _MASKED), axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - peak[..., None]), 0.0)
    fade = jnp.exp(so_far.peak - peak)
    mixed = jnp.einsum("mkrb,mbkh->mkrh", weights.astype(query.dtype), value, preferred_element_type=jnp.float32)
    return _Mixed(peak, fade * so_far.total + jnp.sum(weights, axis=-1), fade[..., None] * so_far.mixed + mixed)


def _grouped(query: jax.Array, kv_heads: int) -> jax.Array:
    """`[M, N, H]` → `[M, K, N/K, H]`."""
    return query.reshape(len(query), kv_heads, -1, query.shape[-1])


def attend_by_depth(
    query: jax.Array,
    depth: jax.Array,
    reader: Callable[[jax.Array], Read],
    *,
    kv_heads: int,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """softmax(q·k/√H)·v of each token over the tokens above it, and itself, in the order of their depth.

    Args:
        query: `[…, heads, H]`, rotated.
        depth: `[…]`: how many tokens are above each.
        reader: the place of a tile's first token → how to read the keys of its tokens.
        kv_heads: K.
        window: as `dense_attention`.
        softcap: as `dense_attention`.

    Returns:
        `[…, heads, H]` in the type of the queries.
    """
    keys, lead = block_keys(), depth.shape

    def of_tile(first: jax.Array, query: jax.Array, depth: jax.Array) -> jax.Array:
        read = reader(first)
        shape = _grouped(query, kv_heads).shape
        numbers = jnp.zeros(shape[:-1], jnp.float32)
        nothing = _Mixed(jnp.full_like(numbers, _MASKED), numbers, jnp.zeros(shape, jnp.float32))

        def visit(index: jax.Array, so_far: _Mixed) -> _Mixed:
            above = depth[:, None] - (index * keys + jnp.arange(keys))
            seen = above >= 0 if window is None else (above >= 0) & (above < window)
            return apart(functools.partial(_with_block, softcap), query, *read(index), seen, so_far)

        begin = 0 if window is None else jnp.maximum(jnp.min(depth) - window + 1, 0) // keys
        end = jax.lax.fori_loop(begin, jnp.max(depth) // keys + 1, visit, nothing)
        return apart(lambda end: (end.mixed / end.total[..., None]).reshape(query.shape).astype(query.dtype), end)

    return by_tile(of_tile, *_flat((query, depth), len(lead))).reshape(query.shape)


def attend_rows(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visibility,
    *,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """`attend_by_depth` of whole rows of tokens; arguments as of `dense_attention`.

    What a query sees are the tokens above it in its tree: one of each depth.
    """
    (rows, length, *_), size, keys = query.shape, tile_tokens(), block_keys()
    padded, depths = -(-length // size) * size, -(-length // keys) * keys

    def flat(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padded - length), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(rows * padded, *x.shape[2:])

    place = flat(visible.place)

    def reader(first: jax.Array) -> Read:
        row = first // padded
        here = jax.lax.dynamic_slice_in_dim(place, first, size)[:, None]
        seen = (visible.key_place[row] <= here) & (here < visible.end[row])
        where = jnp.where(seen, visible.key_depth[row], depths)
        source = jnp.zeros((size, depths), jnp.int32)
        source = source.at[jnp.arange(size)[:, None], where].set(jnp.arange(length, dtype=jnp.int32), mode="drop")

        def read(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            chosen = jax.lax.dynamic_slice_in_dim(source, index * keys, keys, axis=1)
            return key[row, chosen], value[row, chosen]

        return read

    mixed = attend_by_depth(
        flat(query), flat(visible.depth), reader, kv_heads=key.shape[2], window=window, softcap=softcap
    )
    return mixed.reshape(rows, padded, *query.shape[2:])[:, :length]


# ---- Log-probs -------------------------------------------------------------------------------------


def scores_by_tile(
    logits: jax.Array, tokens: jax.Array, kept: jax.Array | None = None, *, temperature: float = 1.0
) -> TokenScores:
    """`scores_from_logits` of `[…, V]`, or `scores_of_kept` where only some tokens are possible, `[…, k]`."""
    made = by_tile(
        lambda _, *tile: _tile_scores(*tile, temperature=temperature), *_flat((logits, tokens, kept), tokens.ndim)
    )
    return jax.tree.map(lambda score: score.reshape(tokens.shape), made)


def _tile_scores(logits: jax.Array, tokens: jax.Array, kept: jax.Array | None, *, temperature: float) -> TokenScores:
    if kept is None:
        return apart(functools.partial(scores_from_logits, temperature=temperature), logits, tokens)

    def of_kept(logits: jax.Array, tokens: jax.Array, kept: jax.Array) -> TokenScores:
        chosen = jnp.take_along_axis(logits, jnp.maximum(kept, 0), axis=-1)
        return scores_of_kept(chosen / temperature, tokens, kept)

    return apart(of_kept, logits, tokens, kept)


def scores_of_states(
    project: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    tokens: jax.Array,
    kept: jax.Array | None,
    *,
    temperature: float,
) -> TokenScores:
    """`scores_by_tile` of the logits `project(hidden)` of states `[…, D]`, of which one tile's exist at a time."""

    def of_tile(_: jax.Array, hidden: jax.Array, tokens: jax.Array, kept: jax.Array | None) -> TokenScores:
        return _tile_scores(apart(project, hidden), tokens, kept, temperature=temperature)

    made = by_tile(of_tile, *_flat((hidden, tokens, kept), tokens.ndim))
    return jax.tree.map(lambda score: score.reshape(tokens.shape), made)
