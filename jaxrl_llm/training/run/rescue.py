"""SIGTERM in the middle of a long phase: another thread saves the last whole step, and ends the process."""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from jaxrl_llm.training.run.notices import Notices
from jaxrl_llm.training.run.stop import GracefulStop

ANOTHER = "another process was stopped"
"""Why a process ends that was not asked to itself."""
_HEARS = 1.0
"""Seconds in which the main thread hears of a signal, unless it waits for a device."""


class _Main(enum.Enum):
    """Where the main thread is."""

    BETWEEN = enum.auto()
    """Between phases: it is quick there, and may be saving."""
    PHASE = enum.auto()
    AGREEING = enum.auto()
    """After a phase, waiting for the other processes, which may be in it for long."""


class Rescue:
    """Cuts a phase that does not end soon after SIGTERM; a context manager around the run, in the main thread.

    The phase is given a third of the grace period. Then the main thread, which may wait for a device and hear of
    nothing, is held where it would leave the phase, and another one saves and ends the process, with status 0. That one
    answers Ctrl-C at once, too; a second Ctrl-C (after SIGTERM the first) of which the main thread does not hear ends
    the process, with nothing saved. In a notebook, whose variables would go with it, it is left to the main thread.

    With several processes all hear of a signal to any of them, cut the same phase, and save together. They can, since
    after each phase they agree on whether to stop: who cuts a phase does not come to the agreement after it, so that no
    other one gets past it, and all get as far.

    Args:
        stop: hears of signals.
        grace: seconds between SIGTERM and the end of the process; 0: no phase is cut.
        save: saves what is `ready`, in the other thread, and says so.
        others: how the processes hear of each other.
        leave: leaves the terminal as it was.
        end: ends the process, with a status.
    """

    def __init__(
        self,
        stop: GracefulStop,
        grace: float,
        save: Callable[[], None],
        others: Notices,
        leave: Callable[[], None] = lambda: None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.ready = False
        """Whether there is something to save, or to be said; the same in all processes, and set between phases."""
        self._stop, self._save, self._others, self._end = stop, save, others, end
        self._leave = leave
        self.patience = grace / 3 if grace else float("inf")
        """Seconds that a phase is given to end."""
        self._main, self._agreements, self._cut = _Main.BETWEEN, 0, False
        self._left_to_main = iter([True])
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rescue", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    @contextlib.contextmanager
    def phase(self) -> Iterator[None]:
        """A phase that may be cut."""
        self._go(_Main.PHASE)
        try:
            yield
        finally:
            self._go(_Main.BETWEEN)

    @contextlib.contextmanager
    def agreement(self) -> Iterator[None]:
        """Around what makes all processes wait for each other, after each phase."""
        self._go(_Main.AGREEING, 1)
        try:
            yield
        finally:
            self._go(_Main.BETWEEN)

    def _go(self, place: _Main, agreements: int = 0) -> None:
        with self._lock:
            if not self._cut:
                self._main, self._agreements = place, self._agreements + agreements
                return
        threading.Event().wait()  # for the end of the process; Ctrl-C is still heard

    # ---- The other thread --------------------------------------------------------------------------

    def _watch(self) -> None:
        began = None
        while began is None or time.monotonic() < began + self.patience or not self._cuts():
            self._stop.listen(self._others.pause())
            if self._over.is_set():
                return
            if self._stop.aborted and not self._over.wait(_HEARS) and self._stop.aborted:
                self._abort()
            if began is None and (self._stop.terminated or self._others.stopping()):
                began = time.monotonic()
                self._stop.request(ANOTHER)
                self._others.tell_stop()
        status = 1
        try:
            self._others.tell_cut(self._agreements)
            self._save()
            status = 0
        except Exception as error:  # of any kind: nobody else is left to say it
            last = traceback.format_exception_only(error)[-1].strip()
            with contextlib.suppress(OSError):
                os.write(2, f"error: stopped in the middle of a phase, and could not save: {last}\n".encode())
        finally:
            with contextlib.suppress(Exception):  # of any kind: it may be closed, or there may be none
                sys.stdout.flush()
            try:
                self._others.leave()
            finally:
                self._end(status)

    def _abort(self) -> None:
        if _interactive():
            if next(self._left_to_main, False):
                os.write(2, b"interrupted as soon as the device is done; only a new kernel is quicker\n")
            return
        with contextlib.suppress(Exception):
            self._leave()
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")
        self._end(130)

    def _cuts(self) -> bool:
        """Cuts the phase, if it may be."""
        with self._lock:
            place, before = self._main, self._agreements - 1
        followed = place is _Main.AGREEING and self._others.has_cut(before)
        with self._lock:
            same = self._main is place and self._agreements == before + 1
            if self.ready and same and (place is _Main.PHASE or followed):
                self._cut = True
                self._agreements = before if followed else self._agreements
        return self._cut


def _interactive() -> bool:
    """Whether someone goes on in this process when the run has ended, and what it holds is theirs."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)
