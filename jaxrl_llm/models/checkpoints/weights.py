"""From named tensors on disk to sharded parameters, each process reading only the slices that it holds."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxrl_llm.models.config import Params
from jaxrl_llm.models.integers import Blocks, blocks_in, with_blocks
from jaxrl_llm.models.stack import Stack
from jaxrl_llm.models.transformer import Transformer

Index = tuple[slice, ...]

HARMLESS = re.compile(
    r"rotary_emb\.inv_freq$|attn_rot_embd\.weight$|rope_freqs\.weight$|rope_factors_\w+\.weight$|masked_bias$"
)
"""Tensors beside the parameters in some checkpoints: tables that are computed here from the configuration."""


class TensorSource(Protocol):
    """A checkpoint's tensors, readable by name and slice."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """The slice `index` of a tensor, without reading the rest of it."""
        ...


class Layout(NamedTuple):
    """How a parameter lies in a tensor, if otherwise than as it is: the tensor's columns in turns, or turned over.

    In tables of names it is written behind the tensor's as NumPy would read the parameter out of it: `x[..., 1::2].mT`.
    """

    first: int = 0
    every: int = 1
    """The first column that is its own, and how many parameters the columns belong to, in turns."""
    turned: bool = False
    """Whether the last two axes are the other way round, `[…, in, out]`."""

    @classmethod
    def split(cls, name: str) -> tuple[str, Layout]:
        """The tensor's name, and the layout that is written behind it."""
        match = re.fullmatch(r"(.*?)(?:\[\.\.\., (\d+)::(\d+)\])?(\.mT)?", name)
        assert match is not None
        tensor, first, every, turned = match.groups()
        return tensor, cls(int(first or 0), int(every or 1), turned is not None)

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, of a parameter's."""
        *rest, row, column = shape if len(shape) > 1 else (1, *shape)
        if self.turned:
            row, column = column, row
        return (*rest, row, column * self.every)[-len(shape) :]

    def index(self, place: Index) -> Index:
        """Where in the tensor a part of the parameter lies, and what of others between it."""
        *rest, last = (*place[:-2], place[-1], place[-2]) if self.turned else place
        return (*rest, slice(last.start * self.every, last.stop * self.every))

    def own(self, part: np.ndarray) -> np.ndarray:
        """That part of the parameter, out of that of the tensor."""
        part = part[..., self.first :: self.every]
        return np.swapaxes(part, -1, -2) if self.turned else part

    def tensor(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor of all parameters whose columns it has, in their order."""
        columns = np.stack([np.swapaxes(part, -1, -2) if self.turned else part for part in parts], axis=-1)
        return columns.reshape(*columns.shape[:-2], -1)


class Leaf(NamedTuple):
    """One parameter: where it is in the tree, and the tensors that make it up."""

    path: str
    """Keys joined by dots."""
    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: tuple[str, ...]
    """One tensor, or one for each layer that has the parameter, or for each expert of each layer."""
    stacked: int
    """Leading axes that are no tensor's own: 0, 1 (layers) or 2 (layers and experts)."""
    first_row: int = 0
    """Where it begins in a tensor that holds several parameters, one below the other."""
    rows: int | None = None
    """How many rows such a tensor has."""
    layout: Layout = Layout()
    """How it lies in each of the tensors."""

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of what it has in each of the tensors."""
        return self.shape[self.stacked :]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each of the tensors."""
        shape = self.own_shape if self.rows is None else (self.rows, *self.own_shape[1:])
        return self.layout.stored(shape)


def leaves(tree: Params, names: Mapping[str, str], stack: Stack) -> list[Leaf]:
    """The parameters of a tree (of arrays or of shapes) with their tensors' names, in the tree's order.

    Args:
        tree: a model's parameters, or some of them.
        names: parameter → tensor name, `{layer}` standing for each layer, `{expert}` for each expert. Parameters of one
            name are its rows, one after another in this order, or what the layout behind it says.
        stack: says which layers have a parameter.
    """
    found: dict[str, Leaf] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        if path not in names:
            raise ValueError(f"parameter {path} has no tensor name in this format")
        inner = path.removeprefix("layers.")
        owners = (None,) if inner == path else stack.owners[inner]
        experts = range(leaf.shape[1]) if "{expert}" in names[path] else (None,)
        name, layout = Layout.split(names[path])
        tensors = tuple(name.format(layer=layer, expert=expert) for layer in owners for expert in experts)
        stacked = (inner != path) + (experts != (None,))
        found[path] = Leaf(path, tuple(leaf.shape), np.dtype(leaf.dtype), tensors, stacked, layout=layout)
    sharing: dict[str, list[str]] = {}
    for path, name in names.items():
        if path in found:
            sharing.setdefault(name, []).append(path)
    for paths in sharing.values():
        if len(paths) > 1:
            starts = list(itertools.accumulate((found[path].tensor_shape[0] for path in paths), initial=0))
            for path, start in zip(paths, starts, strict=False):
                found[path] = found[path]._replace(first_row=start, rows=starts[-1])
    return list(found.values())


def load_weights(
    source: TensorSource,
    names: Mapping[str, str],
    transformer: Transformer,
    shardings: Any = None,
    *,
    where: str,
    told: Callable[[int], None] = lambda size: None,
) -> Params:
    """Reads the parameters of `transformer`.

    At no time is there a second copy of more than one parameter (stacked over the layers) in host memory, and
    of that only what the devices of this process hold.

    Args:
        source: the checkpoint's tensors.
        names: parameter → tensor name, `{layer}` standing for each layer.
        transformer: gives shapes and types; values are cast to its `param_dtype`, slice by slice.
        shardings: tree of `Sharding` like the parameters; `None` puts all on the default device.
        where: the checkpoint's name for error messages.
        told: as `load_leaves`.

    Raises:
        ValueError: tensors are missing, unexpected, of the wrong shape, or not finite; they are named.
    """
    abstract = transformer.floats.abstract_params()
    wanted = leaves(abstract, names, transformer.stack)
    tied = names["lm_head.weight"] if transformer.config.tie_embeddings else None
    check_tensors(wanted, source.shapes, tied=tied, head=names["lm_head.weight"], where=where)
    if transformer.config.tie_embeddings and names["lm_head.weight"] in source.shapes:
        _check_tied(source, names["embed.weight"], names["lm_head.weight"], where=where)
    kept = transformer.base.abstract_params()

    def blocks_at(tree: Params, path: str) -> Blocks | None:
        return blocks_in(_at(tree, path.removesuffix(".weight"))) if path.endswith(".weight") else None

    def finish(leaf: Leaf, array: jax.Array) -> Any:
        """The parameter as it is kept: where that is integers, the float one goes at once."""
        if transformer.config.base_dtype is None or blocks_at(kept, leaf.path) is None:
            return array
        ends = None if shardings is None else blocks_at(shardings, leaf.path)
        lies = array.sharding if ends is None else ends.scale
        made = jax.jit(Blocks.of, static_argnums=1, out_shardings=lies)(array, transformer.config.base_dtype)
        return made if ends is None else jax.device_put(made, ends)

    def place(leaf: Leaf) -> Any:
        """Where its floats go: of what is rounded, whole blocks of a row to one device."""
        blocks = blocks_at(shardings, leaf.path)
        if blocks is None:
            return _at(shardings, leaf.path)
        of_scales: Any = blocks.scale
        *outer, inner, out = of_scales.spec
        return jax.sharding.NamedSharding(of_scales.mesh, jax.sharding.PartitionSpec(*outer, out, inner))

    places = None if shardings is None else [place(leaf) for leaf in wanted]
    arrays = load_leaves(source, wanted, places, where=where, told=told, finish=finish)
    return with_blocks(jax.tree.unflatten(jax.tree.structure(abstract), arrays))


def _at(tree: Any, path: str) -> Any:
    """What lies in a tree at keys that are joined by dots."""
    return functools.reduce(lambda part, key: part[key], path.split("."), tree)


def load_leaves(
    source: TensorSource,
    wanted: Sequence[Leaf],
    shardings: Any = None,
    *,
    where: str,
    told: Callable[[int], None] = lambda size: None,
    finish: Callable[[Leaf, jax.Array], Any] = lambda leaf, array: array,
) -> list[Any]:
    """Reads parameters onto their devices; without shardings, onto the default one.

    Args:
        source: the checkpoint's tensors, which `check_tensors` found to be those that are wanted.
        wanted: the parameters.
        shardings: tree of them like the parameters, or `None`.
        where: the checkpoint's name for error messages.
        told: is called with the bytes of each piece that has been read; together they are those of all parameters.
        finish: what becomes of each before the next one is read.

    Raises:
        ValueError: a tensor has values that are NaN, infinite or too large for the parameters' type; it is named.
    """
    placements = [None] * len(wanted) if shardings is None else jax.tree.leaves(shardings)
    if len(placements) != len(wanted):
        raise ValueError(f"{where}: {len(placements)} shardings for {len(wanted)} parameters")
    reader = _Reader(source, told, bad=set())
    arrays, are_here = [], True
    for leaf, place in zip(wanted, placements, strict=True):
        array = _load_leaf(reader, leaf, place)
        are_here = are_here and array.is_fully_addressable
        arrays.append(finish(leaf, array))
    tensors = [(leaf, tensor) for leaf in wanted for tensor in leaf.tensors]
    bad = np.array([tensor in reader.bad for _, tensor in tensors])
    if not are_here:
        # Every process must hear of each tensor, also of one whose slices lie elsewhere.
        bad = np.any(multihost_utils.process_allgather(bad), axis=0)
    for leaf, tensor in itertools.compress(tensors, bad):
        raise ValueError(f"{where}: {_describe_bad_values(source, tensor, leaf.dtype)}")
    return arrays


class _Reader(NamedTuple):
    source: TensorSource
    told: Callable[[int], None]
    """Of bytes that have been read."""
    bad: set[str]
    """Tensors in which something is not finite."""

    def read(self, tensor: str, place: Index, layout: Layout, out: np.ndarray) -> None:
        out[...] = layout.own(self.source.read(tensor, layout.index(place)))
        if not _is_finite(out):
            self.bad.add(tensor)
        self.told(out.nbytes)


_BFLOAT16_EXPONENT = np.uint16(0x7F80)
"""Bits that are all set in what is not finite."""


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype == jnp.bfloat16:  # NumPy would look at each number by itself
        return bool(((values.view(np.uint16) & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT).all())
    return bool(np.isfinite(values).all())


def _load_leaf(reader: _Reader, leaf: Leaf, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(_read_slice(reader, leaf, (slice(None),) * len(leaf.shape)))
    pieces: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}  # replicas share what was read

    def piece(index: Index | None) -> np.ndarray:
        index = index or ()  # None is how JAX spells the index of a scalar
        key = tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
        if key not in pieces:
            pieces[key] = _read_slice(reader, leaf, index)
        return pieces[key]

    array = jax.make_array_from_callback(leaf.shape, sharding, piece, dtype=leaf.dtype)
    reader.told(array.nbytes - sum(part.nbytes for part in pieces.values()))  # what other processes read
    return array


def _read_slice(reader: _Reader, leaf: Leaf, index: Index) -> np.ndarray:
    bounds = [part.indices(size) for part, size in zip(index, leaf.shape, strict=True)]
    out = np.empty([stop - start for start, stop, _ in bounds], leaf.dtype)
    place = tuple(slice(start, stop, step) for start, stop, step in bounds[leaf.stacked :])
    if leaf.first_row:
        place = slice(place[0].start + leaf.first_row, place[0].stop + leaf.first_row, place[0].step), *place[1:]
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named
        wanted = np.arange(len(leaf.tensors)).reshape(leaf.shape[: leaf.stacked])[index[: leaf.stacked]]
        for number, tensor in np.ndenumerate(wanted):
            reader.read(leaf.tensors[tensor], place, leaf.layout, out[(*number, ...)])
    return out


def _describe_bad_values(source: TensorSource, tensor: str, dtype: np.dtype) -> str:
    shape = source.shapes[tensor]
    with np.errstate(over="ignore", invalid="ignore"):
        values = source.read(tensor, (slice(None),) * len(shape))
        bad = np.argwhere(~np.isfinite(values.astype(dtype)))
    first = tuple(int(place) for place in bad[0])
    return (
        f"tensor {tensor!r} holds {values[first]} at {list(first)}, which is no finite {dtype.name} "
        f"({len(bad)} of its {values.size} values are not): the file is damaged, or its training diverged"
    )


def _check_tied(source: TensorSource, embed: str, head: str, *, where: str, rows: int = 4096) -> None:
    total = source.shapes[embed][0]
    for start in range(0, total, rows):
        part = (slice(start, min(start + rows, total)), slice(None))
        if not np.array_equal(source.read(embed, part), source.read(head, part), equal_nan=True):
            raise ValueError(
                f"{where}: {head} differs from {embed}, though tie_word_embeddings says that they are one; "
                "set it to false in config.json to use both"
            )


def check_tensors(
    wanted: Sequence[Leaf],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    where: str,
    head: str | None = None,
    tied: str | None = None,
) -> None:
    """Checks that a checkpoint has the tensors that are wanted, and no others.

    Args:
        wanted: the parameters.
        shapes: of the checkpoint's tensors.
        where: the checkpoint's name.
        head: the LM head's tensor, if it has one.
        tied: a tensor that may be there though it is not wanted.

    Raises:
        ValueError: tensors are missing, unexpected or of the wrong shape; all of them are named.
    """
    expected = {tensor: leaf.tensor_shape for leaf in wanted for tensor in leaf.tensors}
    missing = [name for name in expected if name not in shapes]
    # A tied checkpoint may carry its head nonetheless: the embedding a second time.
    unexpected = [name for name in shapes if name not in expected and not HARMLESS.search(name) and name != tied]
    wrong = [
        f"{name} has shape {list(shapes[name])}, the configuration says {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    problems = list(_lists(("missing tensors", missing), ("unexpected tensors", unexpected), ("wrong shapes", wrong)))
    if problems:
        hint = "; is it tied to the embedding (tie_word_embeddings)?" if missing == [head] else ""
        raise ValueError(f"{where} does not fit its configuration: {'; '.join(problems)}{hint}")


def _lists(*kinds: tuple[str, Sequence[str]], most: int = 6) -> Iterator[str]:
    for kind, items in kinds:
        if items:
            more = f" and {len(items) - most} more" if len(items) > most else ""
            yield f"{len(items)} {kind}: {', '.join(items[:most])}{more}"
