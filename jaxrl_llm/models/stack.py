"""The stack of layers: in which runs it is scanned, and which layer each row of the stacked parameters belongs to.

Each leaf under `layers` is stacked over the layers that have it, in their order: over all of them, `[L, …]`, wherever
all have the same parameters, whatever else tells their kinds apart.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.config import LayerKind, Params

_Repeat = tuple[Params, jax.Array | int]
"""The parameters of one repeat of a run, and its number."""


class Run(NamedTuple):
    """Layers next to each other that are a pattern of kinds, again and again."""

    first: int
    """Its first layer."""
    period: int
    """Layers of the pattern."""
    repeats: int
    """How often it comes."""

    @property
    def end(self) -> int:
        """The layer after its last one."""
        return self.first + self.period * self.repeats


class Layer(NamedTuple):
    """Which layer a step is that of."""

    kind: LayerKind
    place: int
    """Its place among those that are compiled: of the first run's pattern, of the second one's, …"""
    number: jax.Array | int
    """Which repeat of its run it belongs to."""
    index: jax.Array | int
    """Its place among all layers."""


@functools.lru_cache
def runs(kinds: tuple[LayerKind, ...]) -> tuple[Run, ...]:
    """The runs of a stack in which the fewest layers are compiled: one for each place of each pattern.

    26 layers, each sixth of another kind, are four times a pattern of six, and twice one of one; 21 layers of a kind
    and seven of another are 21 times a pattern of one, and seven times another.
    """
    best: list[tuple[Run, ...]] = [()]  # of no layers, of the last one, of the last two, …
    for first in reversed(range(len(kinds))):
        here: list[tuple[Run, ...]] = []
        for period in range(1, len(kinds) - first + 1):
            if here and period > min(map(_cost, here))[0]:
                break
            repeats = 1
            while kinds[first : first + period] == kinds[first + repeats * period :][:period]:
                repeats += 1
            run = Run(first, period, repeats)
            here.append((run, *best[len(kinds) - run.end]))
        best.append(min(here, key=_cost))
    return best[-1]


def _cost(runs: tuple[Run, ...]) -> tuple[int, int]:
    return sum(run.period for run in runs), len(runs)


@dataclasses.dataclass(frozen=True)
class Stack:
    """A model's layers, and where the parameters of each lie in the stacked ones."""

    kinds: tuple[LayerKind, ...]
    """Of each layer."""
    leaves: Mapping[LayerKind, tuple[str, ...]]
    """The parameters of a layer of each kind: their dotted paths, which begin below `layers`."""

    @functools.cached_property
    def owners(self) -> dict[str, tuple[int, ...]]:
        """Dotted path of a parameter → the layers that have it, one a row."""
        paths = dict.fromkeys(path for kind in self.kinds for path in self.leaves[kind])
        return {path: tuple(i for i, kind in enumerate(self.kinds) if path in self.leaves[kind]) for path in paths}

    def build(self, make: Callable[[LayerKind, jax.Array], Params], keys: jax.Array) -> Params:
        """The stacked parameters.

        Args:
            make: a kind and the keys of the layers that have its parameters → these layers' parameters, stacked.
            keys: `[L]`, of each layer.
        """
        alike: dict[tuple[str, ...], list[int]] = {}
        for layer, kind in enumerate(self.kinds):
            alike.setdefault(self.leaves[kind], []).append(layer)
        if len(alike) == 1:
            return make(self.kinds[0], keys)
        made = [(layers, flat(make(self.kinds[layers[0]], keys[jnp.array(layers)]))) for layers in alike.values()]

        def gather(path: str) -> jax.Array:
            parts = [(layers, leaves[path]) for layers, leaves in made if path in leaves]
            order = np.argsort([layer for layers, _ in parts for layer in layers])
            return jnp.concatenate([leaf for _, leaf in parts])[order]

        return nested({path: gather(path) for path in self.owners})

    def each(self, layers: Params) -> list[Params]:
        """The parameters of each layer."""
        return [self._place(part, run, 0) for run, part in self._cut(layers, self.runs(in_loops=False))]

    def scan(
        self,
        step: Callable[[Any, Params, Layer], tuple[Any, Any]],
        x: Any,
        layers: Params,
        wrap: Callable[..., Callable[[Any, _Repeat], tuple[Any, Any]]],
        *,
        in_loops: bool,
    ) -> tuple[Any, Any]:
        """Runs the layers one after the other.

        Args:
            step: what goes in, a layer's parameters and which it is → what comes out, and what is collected.
            x: what goes into the first layer, an array or a tree.
            layers: the stacked parameters.
            wrap: put around each layer, and told whether it is `in_loop`.
            in_loops: whether the repeats of a run are one compiled loop, or all layers compiled one by one.

        Returns:
            What comes out of the last layer, and what was collected, stacked over the layers.
        """
        collected, before, runs = [], 0, self.runs(in_loops=in_loops)
        for run, part in self._cut(layers, runs):
            loop = run.repeats > 1
            whole = layers if loop and len(runs) > 1 else None
            steps = [self._at(step, run, place, before, wrap, whole) for place in range(run.period)]
            before += run.period

            def repeat(x: Any, one: _Repeat, steps: Any = steps) -> tuple[Any, list[Any]]:
                found = []
                for layer in steps:
                    x, collected = layer(x, one)
                    found.append(collected)
                return x, found

            each = (part, jnp.arange(run.repeats) if loop else 0)
            x, found = jax.lax.scan(repeat, x, each) if loop else repeat(x, each)
            collected.append(jax.tree.map(functools.partial(_in_order, run), *found))
        return x, jax.tree.map(lambda *parts: _joined(parts), *collected)

    def _at(
        self,
        step: Callable[..., Any],
        run: Run,
        place: int,
        before: int,
        wrap: Callable[..., Any],
        whole: Params | None,
    ) -> Callable[..., Any]:
        """A layer of a run, `before` which so many were compiled.

        `whole` are all parameters where it reads these and not the run's, which are a copy.
        """

        # Cut out inside of what is wrapped: what a backward pass keeps is then the stacked parameters themselves.
        def layer(x: Any, one: _Repeat) -> tuple[Any, Any]:
            part, number = one
            if whole is not None:
                part = self._read(whole, run, part, number)
            index = run.first + place + run.period * number
            kind = self.kinds[run.first + place]
            return step(x, self._place(part, run, place), Layer(kind, before + place, number, index))

        return wrap(layer, in_loop=run.repeats > 1)

    def _read(self, whole: Params, run: Run, part: Params, number: jax.Array | int) -> Params:
        """The parameters of a repeat, out of all; their gradient is that of `part`."""
        stacked = flat(whole)

        def rows(path: str, leaf: jax.Array) -> jax.Array:
            count = leaf.shape[0] if run.period > 1 else 1
            return _rows(jax.lax.stop_gradient(stacked[path]), leaf, self._row(path, run.first) + count * number, count)

        return nested({path: rows(path, leaf) for path, leaf in flat(part).items()})

    def runs(self, *, in_loops: bool) -> tuple[Run, ...]:
        """The runs in which the layers are scanned, or each layer as a run of its own."""
        return runs(self.kinds) if in_loops else tuple(Run(layer, 1, 1) for layer in range(len(self.kinds)))

    def _cut(self, layers: Params, runs: tuple[Run, ...]) -> list[tuple[Run, Params]]:
        """Each run with its parameters: `[repeats, …]`, or those of a pattern `[repeats, rows of a leaf, …]`.

        A single run's are the arrays themselves.
        """
        cut: list[dict[str, jax.Array]] = [{} for _ in runs]
        for path, leaf in flat(layers).items():
            sizes = [self._row(path, run.end) - self._row(path, run.first) for run in runs]
            parts = [leaf] if len(runs) == 1 else jax.lax.split(leaf, sizes)
            for run, size, part, found in zip(runs, sizes, parts, cut, strict=True):
                if size:
                    rows = (run.repeats, size // run.repeats) if run.period > 1 else (run.repeats,)
                    part = part.reshape(*rows, *part.shape[1:])
                    found[path] = part if run.repeats > 1 else part[0]
        return [(run, nested(found)) for run, found in zip(runs, cut, strict=True)]

    def _place(self, part: Params, run: Run, place: int) -> Params:
        """The parameters of the layer at a place of a run's pattern, out of those of one repeat of it."""
        if run.period == 1:
            return part
        layer = run.first + place
        leaves = {path: leaf for path, leaf in flat(part).items() if layer in self.owners[path]}
        rows = {path: self._row(path, layer) - self._row(path, run.first) for path in leaves}
        return nested({path: leaf[rows[path]] for path, leaf in leaves.items()})

    def _row(self, path: str, layer: int) -> int:
        """How many of a leaf's rows belong to the layers before this one."""
        return bisect.bisect_left(self.owners[path], layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rows(stacked: jax.Array, part: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """Some rows of a stack that is not differentiated, in the shape of a cut out `part` of it that is.

    They have the same values. A loop over the part alone would need it as an array of its own, which is a second copy
    of the parameters; that is never made where only its gradient is asked for. A gradient of the stack itself would be
    as long as the stack at every repeat.
    """
    return jax.lax.dynamic_slice_in_dim(stacked, first, count).reshape(part.shape)


def _rows_forward(stacked: jax.Array, part: jax.Array, first: jax.Array, count: int) -> tuple[jax.Array, None]:
    return _rows(stacked, part, first, count), None


def _rows_backward(count: int, _: None, gradient: jax.Array) -> tuple[None, jax.Array, None]:
    return None, gradient, None


_rows.defvjp(_rows_forward, _rows_backward)


def _in_order(run: Run, *places: jax.Array) -> jax.Array:
    """What each place of a pattern gave, `[repeats, …]` in a loop, as rows of layers."""
    if run.repeats == 1:
        return jnp.stack(places)
    if run.period == 1:
        return places[0]
    rows = jnp.stack(places, axis=1)
    return rows.reshape(-1, *rows.shape[2:])


def _joined(parts: tuple[jax.Array, ...]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def flat(tree: Params) -> dict[str, Any]:
    """The leaves of a tree of parameters by dotted path."""
    found = {}
    for name, part in tree.items():
        if isinstance(part, dict):
            found |= {f"{name}.{path}": leaf for path, leaf in flat(part).items()}
        else:
            found[name] = part
    return found


def nested(leaves: Mapping[str, Any]) -> Params:
    """The inverse of `flat`."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *rooms, name = path.split(".")
        functools.reduce(lambda room, inner: room.setdefault(inner, {}), rooms, tree)[name] = leaf
    return tree
