"""The command that writes a checkpoint as a folder that `transformers` loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.checks import expand_home
from jaxrl_llm.config import ModelSource
from jaxrl_llm.launch.errors import plain_errors
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.launch.loading import load_policy
from jaxrl_llm.models.checkpoints.pretrained import save_pretrained
from jaxrl_llm.sharding import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportRun:
    """All settings of the command."""

    model: ModelSource = ModelSource()
    """The checkpoint, with model.adapters where some are to be merged into it."""
    output: str | None = None
    """Folder to write."""
    overwrite: bool = False
    """Replace a model that is in that folder."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""


def run_export(args: Sequence[str] | None = None, *, description: str = "") -> Path:
    """Writes what a command line names; errors end the program with one line.

    Args:
        args: the command line; `None`: the process's.
        description: for `--help`.

    Returns:
        The folder.
    """
    config = read_flags(ExportRun(), args, description)
    with plain_errors():
        if config.model.path is None:
            raise ValueError("no model given: pass --model=<run>/checkpoints/<step>, a folder or a .gguf file")
        if config.output is None:
            raise ValueError("no output given: pass --output=<folder to write>")
        output = Path(expand_home(config.output))
        if output.exists() and not config.overwrite:
            raise ValueError(f"output={output} is there already: choose another, or pass --overwrite")
        model = dataclasses.replace(
            config.model, path=expand_home(config.model.path), adapters=expand_home(config.model.adapters)
        )
        policy = load_policy(model, make_mesh(config.mesh))
        save_pretrained(
            output,
            policy.model,
            policy.params,
            tokenizer=policy.tokenizer,
            generation_config=policy.generation_config,
            overwrite=config.overwrite,
        )
        print(f"{output} has the model: transformers loads it")
    return output
