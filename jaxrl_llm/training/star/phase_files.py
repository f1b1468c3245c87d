"""Files of what the phases of an iteration made, so that a run that was killed goes on after the last one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.training.run.distributed import from_main_process, is_main_process

SETTINGS = "settings.json"
"""File of the settings with which the others were made."""


def once(path: Path, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the file holds or, if there is none yet, what `make` returns, written to it in one piece."""
    if from_main_process(path.exists()):
        return from_main_process(
            [json.loads(line) for line in path.read_text().splitlines()] if is_main_process() else None
        )
    records = make()
    if is_main_process():
        write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def check_settings(folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Compares the settings of the files in `folder`, which may be there before the first checkpoint, with a run's.

    Args:
        folder: of the phases' files, in the run's own.
        settings: what a run that goes on must share, JSON-able.
        resume: whether the run goes on.

    Raises:
        ValueError: there are files and `resume` is False, or they were made with other settings (names them).
    """
    path = folder / SETTINGS
    found = from_main_process(json.loads(path.read_text()) if path.exists() else None)
    if found is None:
        return
    if not resume:
        raise ValueError(f"{folder.parent} holds a run: go on with --resume, or choose another --run-dir")
    ours = json.loads(json.dumps(settings))
    if other := sorted(name for name in found.keys() | ours.keys() if found.get(name) != ours.get(name)):
        raise ValueError(f"cannot resume {folder.parent} with other settings or problems: {', '.join(other)} differ")


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes what `check_settings` reads."""
    if is_main_process():
        write_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
