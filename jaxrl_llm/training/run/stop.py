"""Stopping a run cleanly: SIGTERM and Ctrl-C set a flag that the trainer reads between phases."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_entered: list[GracefulStop] = []
"""Those whose handlers are installed."""
_forking = threading.local()


class GracefulStop:
    """Context manager that turns SIGTERM and the first Ctrl-C into `requested`.

    Schedulers send SIGTERM some seconds before SIGKILL, and a Ctrl-C in the middle of an update would leave
    nothing worth saving. A second Ctrl-C means that the user does not want to wait: it raises
    `KeyboardInterrupt` at once. Further SIGTERMs change nothing.

    The handlers that were installed before are restored on exit, and in a forked child, whose signals are its own
    (`multiprocessing` ends workers by SIGTERM). Outside the main thread Python permits no
    signal handlers: there the object is inert and `requested` stays False unless `request` is called.

    Example:
        >>> with GracefulStop() as stop:
        ...     for step in range(steps):
        ...         train(step)
        ...         if stop.requested:
        ...             break

    Attributes:
        notice: Text written to standard error when a signal arrives (a step may take minutes, and silence
            would look as if the signal were ignored), or None for silence.
        terminated: Whether SIGTERM came.
    """

    def __init__(self, notice: str | None = "Stopping as soon as this phase ends; Ctrl-C again aborts.") -> None:
        self.notice = notice
        self.terminated = False
        self._reason: str | None = None
        self._raised = False
        self._heard = self._handled = 0  # how often Ctrl-C, by another thread and by the handler
        self._first = iter([True])
        self._previous: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_pipe = -1

    @property
    def requested(self) -> bool:
        """Whether the run was asked to stop."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """What asked for the stop: a signal's name ("SIGTERM", "SIGINT") or the text given to `request`."""
        return self._reason

    def request(self, reason: str) -> None:
        """Asks for the stop without a signal; the first reason is kept."""
        if self._reason is None:
            self._reason = reason

    def listen(self, seconds: float) -> None:
        """Returns after so many seconds, or with a signal that came, and answers the first Ctrl-C; for another thread.

        Python's handlers wait until the main thread is back from a call that waits for a device, and this does not.
        """
        said = select.poll()
        if self._pipe is not None:
            said.register(self._pipe[0], select.POLLIN)
        if said.poll(seconds * 1e3) and self._pipe is not None:
            for number in os.read(self._pipe[0], 64):
                self._hear(number)

    @property
    def aborted(self) -> bool:
        """Whether Ctrl-C came again, and the main thread, which should have ended, has not heard of it."""
        return self._heard > 1 and not self._raised

    def _hear(self, number: int) -> None:
        """In the other thread, and often before the handler."""
        if number == signal.SIGINT:
            self._heard += 1 if self._reason in (None, signal.SIGINT.name) else 2
        if number in _SIGNALS:
            self._note(number)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
            _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python, and Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_pipe)
            pipe, self._pipe = self._pipe, None
            for end in pipe:
                os.close(end)
            with contextlib.suppress(ValueError):  # a forked child has emptied it
                _entered.remove(self)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._handled += 1 if self._reason in (None, signal.SIGINT.name) else 2
            if max(self._heard, self._handled) > 1:  # of two while the main thread waited, one call is made
                self._raised = True
                raise KeyboardInterrupt
        self._note(number)

    def _note(self, number: int) -> None:
        name = signal.Signals(number).name
        self.terminated |= number == signal.SIGTERM
        self.request(name)
        if next(self._first, False) and self.notice is not None:
            # Not print: the signal may have interrupted a print, whose buffer may not be entered twice.
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(2, f"\n{name}: {self.notice}\n".encode())


# A forked child gets no signal before it has left: until then the handler would tell the parent of it.


def _hold() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _leave_all() -> None:
    entered, _entered[:] = _entered[::-1], []
    for stop in entered:
        stop.__exit__(None, None, None)
    _let_go()


os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_leave_all)
