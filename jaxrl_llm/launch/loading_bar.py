"""How much of a checkpoint has been read."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from jaxrl_llm.device_memory import readable
from jaxrl_llm.training.run.formatting import duration

_PATIENCE = 1.0
"""Seconds of loading that are not worth a word."""
_SECONDS_BETWEEN_LINES = 10.0


class LoadingBar:
    """Shows on standard error what is being loaded, once that takes more than a second; a context manager.

    On a terminal it is a bar that goes when all is read; in a notebook one line that changes; elsewhere a line every
    ten seconds, and one at the end.

    Args:
        name: of the checkpoint.
        total: bytes to be read.
        console: where to show it.
        enabled: False shows nothing at all: for processes other than 0.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        console: Console | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._enabled, self._clock = name, total, enabled, clock
        self._console = console or Console(stderr=True)
        self._done, self._began, self._said = 0, clock(), None
        self._bar: tuple[Progress, TaskID] | None = None

    def __call__(self, size: int) -> None:
        """So many more bytes have been read."""
        self._done += size
        now = self._clock()
        if not self._enabled or now - self._began < _PATIENCE:
            return
        if self._console.is_terminal and not self._console.is_jupyter:
            self._draw()
        elif self._said is None or now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            self._line(f"loading {self._name}: {readable(self._done)} of {readable(self._total)}")

    def _draw(self) -> None:
        if self._bar is None:
            columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
            progress = Progress(
                TextColumn("loading {task.description}", markup=False), *columns, console=self._console, transient=True
            )
            self._bar = progress, progress.add_task(self._name, total=self._total)
            progress.start()
        progress, task = self._bar
        progress.update(task, completed=self._done)

    def _line(self, text: str, end: str = "") -> None:
        """A line, or in a notebook what takes the place of the last one."""
        notebook = self._console.is_jupyter
        file = None if notebook else self._console.file
        print(("\r" if notebook else "") + text, end=end if notebook else "\n", file=file, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()
        if self._said is not None and error is None:
            took = duration(self._clock() - self._began)
            self._line(f"loaded {self._name}: {readable(self._total)} in {took}".ljust(72), end="\n")
