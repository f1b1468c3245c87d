"""How programs of small models are compiled on CPUs: layers one by one, and machine code with less effort."""

from __future__ import annotations

from jax.sharding import Mesh

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sharding import on_cpu

FEW = 8
"""Layers."""
SMALL = 2**20
"""Numbers in the matrices and vectors of one layer."""


def are_looped(config: ModelConfig) -> bool:
    """Whether the layers of a model become one loop: all do but few small ones on a CPU.

    A loop stacks what its backward pass will read, and cuts out each layer's weights; beside the products of a small
    layer that takes time, and programs of its own to compile. Four layers of width 128, one after another, take three
    quarters of the loop's time to compile and nine tenths to run. The 30 layers of SmolLM2-135M would take twice the
    loop's time to compile (docs/benchmarks.md).
    """
    return not (on_cpu() and _is_small(config))


def compiler_options(config: ModelConfig, mesh: Mesh) -> dict[str, str | bool | int | float] | None:
    """What `jax.jit` is to tell the compiler of a model's programs on a mesh.

    Most of what they compute are products, which are ready-made. The loops around them become machine code that
    is as fast after fewer passes of the optimizer, which for a small model are what starting takes. Not of a batch
    invariant model, whose numbers are to be those of programs that others compile, to the bit.
    """
    fewer = mesh.devices.flat[0].platform == "cpu" and _is_small(config) and not config.batch_invariant
    return {"xla_backend_optimization_level": 1} if fewer else None


def _is_small(config: ModelConfig) -> bool:
    embeddings = config.vocab_size * config.embed_dim * (2 - config.tie_embeddings)
    return config.num_layers <= FEW and config.num_parameters - embeddings <= config.num_layers * SMALL
