"""What the libraries below print of a failure that is told in one line of our own."""

from __future__ import annotations

import logging
import sys
from typing import Protocol

_KNOWN = (
    "Requested `tracked_metric`",  # not every checkpoint has an evaluation
    "Metadata file does not exist",  # of a damaged one, which is named when it is read
    "Provided metadata contains unknown key",
)


def hush() -> None:
    """Leaves out what Orbax and TensorStore print of reads and writes that fail; calling it again changes nothing.

    Each of their threads prints the traceback of the same full disk, and reads that end after the first one failed
    say that nobody waits for them. They do so at any time afterwards, so that this holds for the rest of the process.
    What is raised is not touched.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)  # once, however often it is added
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if record.name == "asyncio":
        return not (text.startswith("Task exception was never retrieved") and "orbax" in text)
    return "orbax" not in record.pathname or (not text.startswith(_KNOWN) and record.levelno < logging.ERROR)


class _Hook(Protocol):
    def __call__(self, unraisable: sys.UnraisableHookArgs, /) -> object: ...


class _Unraisable:
    """Passes on what can only be printed, but for reads of a checkpoint that were given up when one of them failed."""

    def __init__(self, otherwise: _Hook) -> None:
        self._otherwise = otherwise

    def __call__(self, unraisable: sys.UnraisableHookArgs, /) -> None:
        error, trace = unraisable.exc_value, unraisable.exc_traceback
        of_closed_loop = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        in_orbax = trace is not None and "orbax" in trace.tb_frame.f_code.co_filename
        if not (of_closed_loop or in_orbax):
            self._otherwise(unraisable)
