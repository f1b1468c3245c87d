"""Files of what the phases of an iteration made, so that a run that was killed goes on after the last one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrl_llm.training.run.distributed import from_main_process, is_main_process


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


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
