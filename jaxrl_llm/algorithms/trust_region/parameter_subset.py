"""A part of a model's parameters as a flat tree of its own: what a method with costly vectors moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxrl_llm.algorithms.rounding import as_stored, widen
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import split_trainable

Trainable = Literal["all", "last_layers"]
"""What training changes (all parameters; of a model with adapters, these and its heads); or of that the last layers,
the last norm and the head, unless that is the embedding."""
Part = dict[str, jax.Array]
"""Float32 arrays by dotted path; of a stacked leaf the last layers only, if not all of them move."""


class ParameterSubset:
    """Which parameters move, and how they are taken out of the tree and put back.

    Args:
        params: the whole tree, of arrays or shapes.
        trainable: which part of it.
        last_layers: how many layers "last_layers" means.
        owners: which layers have a parameter, by its dotted path below `layers`: one a row of it (`Stack.owners`).
            `None`: all of them have all.
        moves: in place of `trainable`: whether the parameter of a dotted path (`layers.mlp.up.weight`) moves.

    Raises:
        ValueError: nothing would move, or there are not so many layers.
    """

    def __init__(
        self,
        params: Params,
        trainable: Trainable = "all",
        *,
        last_layers: int = 1,
        owners: Mapping[str, Sequence[int]] | None = None,
        moves: Callable[[str], bool] | None = None,
    ):
        if trainable not in get_args(Trainable):
            raise ValueError(f"trainable={trainable!r} must be one of {get_args(Trainable)}")
        leaves = _by_path(split_trainable(params)[0] if moves is None else params)
        last = moves is None and trainable == "last_layers"
        chosen = [path for path in leaves if moves is None or moves(path)]
        if last:
            chosen = [path for path in leaves if path.startswith(("layers.", "final_norm.", "lm_head."))]
        if not chosen:
            raise ValueError(f"none of the parameters is to move; there are {', '.join(leaves)}")
        rows = {path: leaf.shape[0] for path, leaf in leaves.items() if path.startswith("layers.")}
        of_layers = {
            path: range(count) if owners is None else owners[path.removeprefix("layers.")]
            for path, count in rows.items()
        }
        layers = max((layer + 1 for owning in of_layers.values() for layer in owning), default=1)
        if not 1 <= last_layers <= layers:
            raise ValueError(f"last_layers={last_layers} must be between 1 and the {layers} there are")
        first = {path: sum(layer < layers - last_layers for layer in owning) for path, owning in of_layers.items()}
        self._first = {path: first.get(path, 0) if last else 0 for path in chosen}
        self._first = {path: row for path, row in self._first.items() if row < rows.get(path, 1)}

    def take(self, params: Params) -> Part:
        """The part, in float32."""
        leaves = _by_path(params)
        return widen({path: leaves[path][first:] if first else leaves[path] for path, first in self._first.items()})

    def put(self, params: Params, part: Part) -> Params:
        """The whole tree with the part replaced; arrays that it has some of are float32 then."""

        def one(path: tuple, leaf: jax.Array) -> jax.Array:
            if (name := _name(path)) not in part:
                return leaf
            new, first = part[name], self._first[name]
            return jnp.concatenate([leaf[:first].astype(new.dtype), new]) if first else new

        return jax.tree_util.tree_map_with_path(one, params)

    def put_stored(self, params: Params, part: Part) -> Params:
        """The same with the values that the part has once it is stored in the types of `params`; differentiable.

        They are float32 all the same, as their gradient is.
        """
        leaves = _by_path(params)
        return self.put(params, {name: as_stored(new, leaves[name].dtype) for name, new in part.items()})


def _by_path(params: Params) -> Part:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
