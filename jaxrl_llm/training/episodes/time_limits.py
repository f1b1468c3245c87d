"""Ends a call of the user's code that takes too long."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

GRACE = 30.0
"""Seconds in which a call that is being ended must end."""


class TimeIsUpError(BaseException):
    """Raised inside a function that takes too long: no Exception, which the function may well catch."""


class NotMainThreadError(Exception):
    """A function cannot be interrupted here."""


@contextlib.contextmanager
def interrupting(seconds: float | None, what: str) -> Iterator[None]:
    """Raises `TimeIsUpError` inside the block once it has taken so long, and again each second.

    Python does that between two steps of its own. A block that waits in code which knows no signals, or that catches
    everything, is given `GRACE` seconds more; then the process ends with status 1 and one line, since nothing else in
    it could end the block.

    Args:
        seconds: `None`: any time.
        what: is called, for that line.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        raise NotMainThreadError(f"cannot be stopped after {seconds:g} s outside the main thread: give no time limit")

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeIsUpError

    def end() -> None:
        sys.stdout.flush()
        os.write(2, f"error: {what} took longer than {seconds:g} s, and did not end when interrupted\n".encode())
        os._exit(1)

    last_resort = threading.Timer(seconds + GRACE, end)
    last_resort.daemon = True
    before = signal.signal(signal.SIGALRM, stop)
    last_resort.start()
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        last_resort.cancel()
        signal.signal(signal.SIGALRM, before)
