"""Which run a folder holds: none yet, another one, or the one that is to go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.training.run.checkpoint import Checkpointer
from jaxrl_llm.training.run.damaged_files import reading_checkpoint
from jaxrl_llm.training.run.distributed import from_main_process
from jaxrl_llm.training.run.metrics import METRICS_FILE

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, in the run's own."""


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """The latest checkpoint of a run, without its arrays."""

    step: int
    """Steps done."""
    data: dict[str, Any]
    """Position in the data."""
    evaluations: list[dict[str, float]]
    """Metrics of the first and of the last evaluation."""
    settings: dict[str, Any]
    """What a process that goes on must share."""
    frozen: str | None = None
    """Fingerprint of the parameters that are not trained, which the checkpoint leaves out."""

    def extra(self) -> dict[str, Any]:
        """What is saved beside the arrays."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "step"}


def find_run(run_dir: str | Path, settings: Mapping[str, Any], *, resume: bool) -> SavedRun | None:
    """The run that is to go on; `None`: one starts anew.

    No arrays are loaded and nothing is written: call it before anything that takes long. With several processes
    all must call it, and process 0 looks: the others may look when it has already begun to write.

    Args:
        run_dir: folder of the run.
        settings: what the run must share with the one in the folder, JSON-able and flat.
        resume: whether to go on where the folder's run has a checkpoint.

    Raises:
        ValueError: the folder holds a run and `resume` is False, or that run had other settings (names them).
        DamagedRunError: its latest checkpoint cannot be read.
    """
    folder = Path(run_dir)
    metrics = folder / METRICS_FILE
    has_checkpoints, has_metrics = from_main_process(
        [(folder / CHECKPOINTS).exists(), metrics.exists() and metrics.stat().st_size > 0]
    )
    saved = None
    if has_checkpoints:
        with Checkpointer(folder / CHECKPOINTS, read_only=True) as checkpoints:
            if (step := checkpoints.latest_step()) is not None:
                extra = checkpoints.read_extra(step)
                with reading_checkpoint(checkpoints.folder, step, checkpoints.all_steps()):
                    saved = SavedRun(step, **extra)
    if not resume and (saved or has_metrics):
        known = f"a checkpoint of step {saved.step}" if saved else "no checkpoint"
        raise ValueError(f"{folder} holds a run ({known}): go on with --resume, or choose another --run-dir")
    if saved:
        differing = [
            f"{name} was {saved.settings.get(name)!r} and is {settings.get(name)!r}"
            for name in sorted(saved.settings.keys() | settings.keys())
            if saved.settings.get(name) != settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"cannot resume {folder} with other settings: {'; '.join(differing)}. Give those it had, "
                "or choose another --run-dir"
            )
    return saved
