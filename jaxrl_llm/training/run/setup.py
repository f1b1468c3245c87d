"""What every run has, whatever it trains and on what."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm.training.run.metrics import WandbConfig
from jaxrl_llm.training.run.resume import SavedRun, find_run


@dataclasses.dataclass(frozen=True)
class RunSetup:
    """Where a run is computed and written, from which seed, and under which name."""

    folder: Path
    """Of metrics and checkpoints."""
    mesh: jax.sharding.Mesh
    """The devices."""
    seed: int = 0
    """Of samples, orders and noise; what else it seeds, the trainer says."""
    resume: bool = False
    """Go on from the latest checkpoint in `folder` if there is one."""
    grace_period: float = 30.0
    """Seconds between SIGTERM and the end of the process; 0: a phase is never cut in its middle."""
    bare_reference: bool = False
    """The reference is the base alone, also where the model starts with trained adapters."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Flat JSON-able record of all settings that a resumed run must share."""
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the settings are by default, flat, for the page of the run."""
    title: str = ""
    """Name of the run in the report."""
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases."""

    def __post_init__(self) -> None:
        """Writes out `~` in the folder's path."""
        object.__setattr__(self, "folder", Path(os.path.expanduser(self.folder)))

    def find(self) -> SavedRun | None:
        """The run that is to go on, or `None`; errors as in `find_run`."""
        return find_run(self.folder, self.settings, resume=self.resume)
