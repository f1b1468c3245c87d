"""Adapters of layers that a family keeps in one tensor (Phi-3's queries, keys and values): here apart, in PEFT one.

Of the parts of one tensor, with weights W₁, W₂, … one below the other, ours are A₁, B₁, A₂, B₂, …; PEFT's one adapter
that does the same has all rows of A₁, A₂, … and B = diag(B₁, B₂, …): as many times the rank as there are parts. The
other way round, every part has the whole of PEFT's A and its own rows of B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.checkpoints.expert_adapters import stacked
from jaxrl_llm.models.checkpoints.weights import Index, Layout, TensorSource
from jaxrl_llm.models.config import LoraConfig, LoraTarget, ModelConfig, Params
from jaxrl_llm.models.families import Family
from jaxrl_llm.models.stack import flat, nested

_PART = "#"
"""Parts a tensor's name from the number of the part that reads all of it."""


def modules(family: Family) -> dict[str, tuple[str, ...]]:
    """The linear layers of a block, as a checkpoint has them → their parts, as paths in our parameters.

    Experts that lie in one tensor (GPT-OSS) are no such layers: `expert_adapters` has them.
    """
    found: dict[str, tuple[str, ...]] = {}
    for path, tensor in family.tensor_names.items():
        *_, target, kind = path.split(".")
        if kind == "weight" and target in get_args(LoraTarget) and Layout.split(tensor)[1] == Layout():
            module = tensor.removesuffix(".weight")
            found[module] = (*found.get(module, ()), path.removesuffix(".weight"))
    return found


def written_as(family: Family, lora: LoraConfig) -> LoraConfig:
    """The adapters as PEFT has them: all of one rank, that of the most parts, and of the same scale; whole tensors."""
    parts = _adapted(family, lora)
    most = max(map(len, parts))
    whole = {path.split(".")[-1] for paths in parts for path in paths}
    return LoraConfig(
        most * lora.rank,
        (math.sqrt(most) if lora.use_rslora else most) * lora.alpha,
        tuple(target for target in get_args(LoraTarget) if target in whole),
        lora.use_rslora,
    )


def to_peft(adapters: Params, weights: Params, family: Family, lora: LoraConfig) -> Params:
    """Adapters whose tensors, one below the other where they share a name, are those of `written_as`.

    Args:
        adapters: ours.
        weights: shapes of all parameters; of a part that has no adapter, one that does nothing is written.
        family: says which parts share a tensor.
        lora: of the adapters.
    """
    rank, wide = lora.rank, written_as(family, lora).rank
    if wide == rank:
        return adapters
    ours, shapes = flat(adapters), flat(weights)
    made = {}
    for paths in _adapted(family, lora):
        for place, path in enumerate(paths):
            *outer, out, inner = shapes[f"{path}.weight"].shape
            a = ours.get(f"{path}.lora_a", jnp.zeros((*outer, rank, inner), jnp.float32))
            b = ours.get(f"{path}.lora_b", jnp.zeros((*outer, out, rank), jnp.float32))
            below, whole = wide - rank * len(paths) if place == len(paths) - 1 else 0, ((0, 0),) * (a.ndim - 1)
            made[f"{path}.lora_a"] = jnp.pad(a, (*whole[1:], (0, below), (0, 0)))
            made[f"{path}.lora_b"] = jnp.pad(b, (*whole, (rank * place, wide - rank * (place + 1))))
    return nested(made)


def _adapted(family: Family, lora: LoraConfig) -> list[tuple[str, ...]]:
    tensors = (*modules(family).values(), *stacked(family).values())
    return [paths for paths in tensors if any(path.split(".")[-1] in lora.targets for path in paths)]


def names_read(names: Mapping[str, str]) -> dict[str, str]:
    """Names by which every part of a tensor reads the whole of PEFT's A."""
    seen: dict[str, int] = {}
    found = {}
    for path, tensor in names.items():
        place = seen[tensor] = seen.get(tensor, -1) + 1
        found[path] = f"{tensor}{_PART}{place}" if place and path.endswith("lora_a") else tensor
    return found


class Parted:
    """The tensors of a folder of adapters, also by the names of `names_read`."""

    def __init__(self, source: TensorSource, names: Mapping[str, str], config: ModelConfig):
        """Names are those of a model."""
        self._source = source
        parts = [name for name in names.values() if _PART in name]
        wanted = {name.format(layer=layer) for name in parts for layer in range(config.num_layers)}
        whole = {name: name.partition(_PART)[0] for name in wanted}
        also = {name: source.shapes[tensor] for name, tensor in whole.items() if tensor in source.shapes}
        self.shapes = {**source.shapes, **also}

    def read(self, name: str, index: Index) -> np.ndarray:
        """As the tensors' source."""
        return self._source.read(name.partition(_PART)[0], index)
