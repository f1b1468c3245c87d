"""Adapters of experts that a family keeps in one tensor of a layer (GPT-OSS): here of each expert, in PEFT of all.

PEFT calls them `target_parameters`. Of E experts, of rank r, A is `[E·r, in]` and B `[out, r·E]`: the ranks of an
expert are neighbours in A, and E apart in B. Where the tensor has several of our parameters in its columns, in turns
(gate and up), the adapter is that of `fused_adapters`: the rows of A of both, and those of B in turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.checkpoints.weights import Index, Layout, TensorSource
from jaxrl_llm.models.config import LoraTarget, ModelConfig, Params
from jaxrl_llm.models.families import Family
from jaxrl_llm.models.stack import flat, nested

_LAYER = "model.layers.{layer}."


def stacked(family: Family) -> dict[str, tuple[str, ...]]:
    """Tensors of all experts of a layer → their parts in turns, as paths in our parameters; in the family's order."""
    found: dict[str, tuple[str, ...]] = {}
    for path, name in family.tensor_names.items():
        (*_, target, kind), (tensor, layout) = path.split("."), Layout.split(name)
        if kind == "weight" and target in get_args(LoraTarget) and layout != Layout():
            found[tensor] = (*found.get(tensor, ()), path.removesuffix(".weight"))
    return found


def target_parameters(family: Family, targets: Iterable[str]) -> list[str]:
    """What PEFT calls the tensors of these targets."""
    return [
        tensor.removeprefix(_LAYER)
        for tensor, paths in stacked(family).items()
        if any(path.split(".")[-1] in targets for path in paths)
    ]


def names_written(family: Family, parameters: Iterable[str]) -> dict[str, str]:
    """Leaf of the first part of each tensor → the name of PEFT's, which has one wrapper around the other."""
    adapted = [tensor for tensor in stacked(family) if tensor.removeprefix(_LAYER) in tuple(parameters)]
    names = {}
    for place, tensor in enumerate(adapted):
        module, within = tensor.rpartition(".")[0], "base_layer." * (len(adapted) - 1 - place)
        for letter in "ab":
            leaf = f"{stacked(family)[tensor][0]}.lora_{letter}"
            names[leaf] = f"base_model.model.{module}.{within}lora_{letter.upper()}.weight"
    return names


def to_peft(adapters: Params, family: Family) -> Params:
    """Adapters of one rank, of whose experts the parts of a tensor are PEFT's, as the first part's."""
    made = flat(adapters)
    for paths in stacked(family).values():
        if f"{paths[0]}.lora_a" not in made:
            continue
        a, b = ([made.pop(f"{path}.lora_{letter}") for path in paths] for letter in "ab")
        joined = jnp.concatenate(a, axis=-2)  # [L, E, r, in]
        turns = jnp.stack(b, axis=-2)  # [L, E, out, parts, r]
        turns = turns.reshape(*turns.shape[:2], -1, turns.shape[-1])
        made[f"{paths[0]}.lora_a"] = joined.reshape(len(joined), -1, joined.shape[-1])
        made[f"{paths[0]}.lora_b"] = jnp.moveaxis(turns, 1, -1).reshape(len(turns), turns.shape[2], -1)
    return nested(made)


class _Part(NamedTuple):
    """Where a part of PEFT's tensor lies in it."""

    tensor: str
    is_a: bool
    first: int
    every: int


class OfExperts:
    """The tensors of a folder of adapters, those of experts `[E, r, in]` and `[E, out, r]` of each part by itself."""

    def __init__(self, source: TensorSource, family: Family, config: ModelConfig, parameters: Iterable[str]):
        """Other tensors are those of `source`."""
        self._source, self.shapes = source, dict(source.shapes)
        self.names: dict[str, str] = {}
        """Leaf of an adapter → name of its tensor, `{layer}` for each layer."""
        self._parts: dict[str, _Part] = {}
        self._experts = 0 if config.experts is None else config.experts.count
        paths = {parts[0]: parts for parts in stacked(family).values()}
        for leaf, name in names_written(family, parameters).items():
            parts, is_a = paths[leaf.rpartition(".")[0]], leaf.endswith("a")
            for place, path in enumerate(parts):
                self.names[f"{path}.{leaf[-6:]}"] = f"{name}#{path.split('.')[-1]}"
                for layer in range(config.num_layers):
                    part = _Part(name.format(layer=layer), is_a, place, 1 if is_a else len(parts))
                    self._add(f"{part.tensor}#{path.split('.')[-1]}", part)
        for part in self._parts.values():
            self.shapes.pop(part.tensor, None)

    def _add(self, name: str, part: _Part) -> None:
        out, inner = self._source.shapes.get(part.tensor, (0, 0))
        ranks = out if part.is_a else inner
        if not ranks or ranks % self._experts:
            return
        rank = ranks // self._experts
        self.shapes[name] = (self._experts, rank, inner) if part.is_a else (self._experts, out // part.every, rank)
        self._parts[name] = part

    def read(self, name: str, index: Index) -> np.ndarray:
        """As the tensors' source."""
        if name not in self._parts:
            return self._source.read(name, index)
        part = self._parts[name]
        whole = self._source.read(part.tensor, (slice(None), slice(None)))
        if part.is_a:
            return whole.reshape(self._experts, -1, whole.shape[-1])[index]
        return np.moveaxis(whole.reshape(len(whole), -1, self._experts), -1, 0)[:, part.first :: part.every][index]
