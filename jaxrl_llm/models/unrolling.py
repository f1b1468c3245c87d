"""Whether layers are compiled as one loop, where nobody has said."""

from __future__ import annotations

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
    embeddings = config.vocab_size * config.embed_dim * (2 - config.tie_embeddings)
    return not (
        on_cpu() and config.num_layers <= FEW and config.num_parameters - embeddings <= config.num_layers * SMALL
    )
