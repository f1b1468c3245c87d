"""The teachers that a distillation names: their tokenizers are looked at before any weights are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm.config import DistillationExperiment, Experiment, ModelSource
from jaxrl_llm.launch.loading import load_model, load_tokenizer_of
from jaxrl_llm.training.teachers import Teacher, check_same_tokens


@dataclasses.dataclass(frozen=True)
class TeacherSource:
    """A checkpoint to learn from."""

    name: str
    """The last part of its path, with a number where several have the same."""
    model: ModelSource
    tokenizer: Any

    def load(self, mesh: jax.sharding.Mesh) -> Teacher:
        """The model, on the mesh."""
        return Teacher(self.name, *load_model(self.model, mesh), self.tokenizer)


def find_teachers(config: Experiment, tokenizer: Any) -> list[TeacherSource]:
    """The teachers of a run, as yet without their weights; none where the run is no distillation.

    They compute in the policy's type, and are stored in it.

    Raises:
        ValueError: none is named, one cannot be found, or has another tokenizer than the policy.
    """
    if not isinstance(config, DistillationExperiment):
        return []
    if not config.teachers and config.algorithm.needs_teachers:
        raise ValueError(
            "no teacher given: pass --teachers <folder, .gguf file or hub id> [<another> …], or let the policy be its "
            "own (--preset=sdft, --preset=sdpo)"
        )
    found = []
    for path in config.teachers:
        name = Path(path).name.removesuffix(".gguf")
        alike = sum(other.name.partition("#")[0] == name for other in found)
        source = ModelSource(path=path, dtype=config.model.dtype, param_dtype=config.model.dtype)
        theirs = load_tokenizer_of(source)
        check_same_tokens(tokenizer, theirs, path)
        found.append(TeacherSource(f"{name}#{alike + 1}" if alike else name, source, theirs))
    return found
