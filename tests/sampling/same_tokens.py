"""What one small model samples on any devices; imported by tests, and by the processes that they start."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh

MODEL = Transformer(ModelConfig(72, 48, 48, 2, 12, 12, 4, max_position_embeddings=64, tie_embeddings=True))
"""Of sizes that 2, 3, 4, 6 and 8 divide."""


def sampled(
    axes: dict[str, int], slots: int | None, tensor: int | None = None, devices: Any = None
) -> dict[str, list[Any]]:
    """Eight prompts × six completions, and their log-probs.

    Args:
        axes: sizes of the learner's mesh.
        slots: of the sampler.
        tensor: of the sampler.
        devices: `None`: all.
    """
    rng = np.random.default_rng(0)
    prompts, lengths = rng.integers(2, 72, (8, 7)).astype(np.int32), rng.integers(1, 8, 8)
    mesh = make_mesh(MeshConfig(**axes), devices)

    def init(key: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: 4 * leaf, MODEL.init(key))

    params = jax.jit(init, out_shardings=MODEL.shardings(mesh))(jax.random.key(0))
    config = SamplingConfig(max_tokens=20, slots=slots, tensor=tensor)
    sampler = Sampler(MODEL, config, group=6, stop_tokens=(1, 5, 9), mesh=mesh)
    rollout = sampler(params, prompts, lengths, np.array([0, 7], np.uint32), 1)
    names = ("completion", "completion_lengths", "finished", "logprobs", "sampler_logprobs")
    return {name: np.asarray(getattr(rollout, name)).tolist() for name in names}
