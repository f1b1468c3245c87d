"""Which run a folder holds: none yet, another one, or the one that is to go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jaxrl_llm.training.run.checkpoint import Checkpointer
from jaxrl_llm.training.run.damaged_files import DamagedRunError, reading_checkpoint
from jaxrl_llm.training.run.distributed import from_main_process
from jaxrl_llm.training.run.metrics import METRICS_FILE

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, in the run's own."""


Found = TypeVar("Found")


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
        DamagedRunError: none of its checkpoints can be read.
    """
    folder = Path(run_dir)
    metrics = folder / METRICS_FILE
    has_checkpoints, has_metrics = from_main_process(
        [(folder / CHECKPOINTS).exists(), metrics.exists() and metrics.stat().st_size > 0]
    )
    saved = None
    if has_checkpoints:
        with Checkpointer(folder / CHECKPOINTS, read_only=True) as checkpoints:
            saved, _ = _latest_whole(checkpoints, partial(_saved_run, checkpoints))
    if not resume and (saved or has_metrics):
        known = f"a checkpoint of step {saved.step}" if saved else "no checkpoint"
        raise ValueError(f"{folder} holds a run ({known}): go on with --resume, or choose another --run-dir")
    if saved:
        _check_settings(folder, saved, settings)
    return saved


def restore_run(checkpoints: Checkpointer, saved: SavedRun, abstract_state: Any) -> tuple[SavedRun, Any, list[str]]:
    """Reads the arrays of the run that `find_run` found or, where they are damaged, of a checkpoint before it.

    Damaged checkpoints are moved aside, so that later ones can take their places. With several processes all must
    call it.

    Args:
        checkpoints: of the run, to be written to.
        saved: the run that was found.
        abstract_state: shapes, types and shardings of the state.

    Returns:
        The run from which to go on, its state, and what to say about damage.

    Raises:
        DamagedRunError: no checkpoint is whole.
    """

    def read(step: int) -> tuple[SavedRun, Any]:
        run = saved if step == saved.step else _saved_run(checkpoints, step)
        _check_settings(checkpoints.folder.parent, run, saved.settings)
        return run, checkpoints.restore(abstract_state, step)[0]

    found, remarks = _latest_whole(checkpoints, read)
    if found is None:
        raise FileNotFoundError(f"the checkpoints in {checkpoints.folder} are gone")
    run, state = found
    if moved := checkpoints.set_aside_after(run.step):
        folder = checkpoints.folder / "damaged"
        remarks.append(f"checkpoint(s) {moved} moved to {folder}; the run goes on from checkpoint {run.step}")
    return run, state, remarks


def _latest_whole(checkpoints: Checkpointer, read: Callable[[int], Found]) -> tuple[Found | None, list[str]]:
    """What is read of the latest step that is not damaged, and what is wrong with the later ones.

    Raises:
        DamagedRunError: all are damaged.
    """
    steps = checkpoints.all_steps()
    failures: list[str] = []  # not the errors themselves, which would keep what was read in memory
    for step in reversed(steps):
        try:
            return read(step), [failure.partition("; delete")[0] for failure in failures]
        except DamagedRunError as error:
            failures.append(str(error))
    if len(failures) > 1:
        raise DamagedRunError(
            f"none of the checkpoints {steps} in {checkpoints.folder} is whole: delete them all to start anew, or "
            f"choose another --run-dir. The latest: {failures[0]}"
        )
    if failures:
        raise DamagedRunError(failures[0])
    return None, []


def _saved_run(checkpoints: Checkpointer, step: int) -> SavedRun:
    extra = checkpoints.read_extra(step)
    with reading_checkpoint(checkpoints.folder, step, checkpoints.all_steps()):
        return SavedRun(step, **extra)


def _check_settings(folder: Any, saved: SavedRun, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if the run had other settings; names them."""
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
