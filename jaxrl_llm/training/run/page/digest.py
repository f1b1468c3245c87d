"""A run's folder, read bit by bit as it grows, and what of it a page shows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.training.run.completions import COMPLETIONS_FILE, COMPLETIONS_FOLDER, completion_of, completions_of_file
from jaxrl_llm.training.run.metrics import METRICS_FILE, metrics_of
from jaxrl_llm.training.run.page.curves import Curves
from jaxrl_llm.training.run.page.samples import KeptSteps, groups_of, held_out_over_time
from jaxrl_llm.training.run.page.tallies import Lengths, Prompts

SETTINGS_FILE = "config.json"
"""In a run's folder, where a command made it."""
_STEPS, _EVALUATIONS = 20, 16


class Digest:
    """What a page shows of a run: bounded, however long the run is.

    Args:
        folder: of the run.
        defaults: what settings are by default, flat.
    """

    def __init__(self, folder: str | os.PathLike[str], defaults: Mapping[str, Any] | None = None) -> None:
        self.folder, self.defaults = Path(folder), dict(defaults or {})
        path = self.folder / SETTINGS_FILE
        self.settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self._metrics, self._completions = Tail(self.folder / METRICS_FILE), Tail(self.folder / COMPLETIONS_FILE)
        self._files: set[Path] = set()
        self.curves, self.lengths = Curves(), Lengths()
        self.prompts = Prompts(self.settings.get("evaluation.solved_by"))
        self.samples = {"train": KeptSteps(_STEPS), "eval": KeptSteps(_EVALUATIONS)}

    def update(self) -> None:
        """Reads what the run has written since the last time.

        Raises:
            DamagedRunError: a line is not what was written.
        """
        for number, line in self._metrics:
            self.curves.add(metrics_of(line, self._metrics.path, number))
        for row in self._rows():
            kind = row.get("kind", "train")
            self.samples[kind].add(row)
            if kind == "train":
                self.lengths.add(row)
                self.prompts.add(row)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for number, line in self._completions:
            yield completion_of(line, self._completions.path, number)
        for path in sorted((self.folder / COMPLETIONS_FOLDER).glob("*.parquet")):
            if path not in self._files:
                self._files.add(path)
                yield from completions_of_file(path)

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        train = [{"step": rows[0]["step"], "groups": groups_of(rows)} for rows in self.samples["train"].steps]
        length = self.settings.get("training.steps", self.settings.get("star.iterations"))
        return {
            "name": str(self.settings.get("name", self.folder.absolute().name)),
            "folder": str(self.folder),
            "step": self.curves.last_step,
            "steps": length if isinstance(length, int) else None,
            **self.curves.data(),
            "settings": self.settings,
            "defaults": {name: value for name, value in self.defaults.items() if name in self.settings},
            "samples": train,
            "held_out": held_out_over_time(self.samples["eval"].steps),
            "lengths": self.lengths.data(),
            "prompts": self.prompts.data(),
        }


class Tail:
    """The lines of a file that have come since the last time, with their numbers; one that is being written waits."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.number = path, 0, 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset, self.number = self.offset + len(line), self.number + 1
                yield self.number, line
