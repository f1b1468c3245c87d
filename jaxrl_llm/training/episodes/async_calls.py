"""`async def` functions of the user's, in an event loop of their own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, NamedTuple

from jaxrl_llm.training.episodes.time_limits import GRACE, TimeIsUpError


class BackgroundLoop:
    """An event loop in a thread: the main one may have a loop already, as that of a notebook has.

    It is the same for all calls, since what an async function keeps (a session of HTTP, a lock) belongs to the loop in
    which it was made. It ends with this object.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_serve, args=(self._loop,), name="rewards", daemon=True).start()
        weakref.finalize(self, _stop, self._loop)

    def begin(self, function: Callable[[], Coroutine[Any, Any, Any]], *, timeout: float | None) -> AsyncCall:
        """Begins a call; it goes on while others are made."""
        return AsyncCall(asyncio.run_coroutine_threadsafe(_guarded(function, timeout), self._loop), timeout)


class AsyncCall(NamedTuple):
    """A call under way."""

    future: concurrent.futures.Future[_Outcome]
    timeout: float | None

    def result(self) -> Any:
        """What it returned, once it has ended (`as_they_end`).

        Raises:
            TimeIsUpError: it took longer than it may; where it awaited, that is the cause.
            BlockedError: it has not ended, since something holds the loop.
            BaseException: what it raised.
        """
        if not self.future.done():
            raise BlockedError
        outcome = self.future.result()
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def cancel(self) -> None:
        """Ends it where it awaits next."""
        self.future.cancel()


class BlockedError(TimeIsUpError):
    """An async function neither returned nor awaited, nor can any other of its loop go on."""


def as_they_end(calls: Iterable[AsyncCall]) -> Iterator[AsyncCall]:
    """Waits for calls, and yields each when it has ended; one that is long overdue, though it has not."""
    waiting = {call.future: call for call in calls}
    while waiting:
        limited = [call for call in waiting.values() if call.timeout is not None]
        next_due = min(limited, key=lambda call: call.timeout or 0.0, default=None)
        patience = None if next_due is None or next_due.timeout is None else next_due.timeout + GRACE
        ended, _ = concurrent.futures.wait(waiting, patience, concurrent.futures.FIRST_COMPLETED)
        if not ended and next_due is not None:
            ended = {next_due.future}
        yield from [waiting.pop(future) for future in ended]


class _Outcome(NamedTuple):
    """Errors are values here: some kinds would end the loop."""

    value: Any = None
    error: BaseException | None = None


async def _guarded(function: Callable[[], Coroutine[Any, Any, Any]], timeout: float | None) -> _Outcome:
    scope = asyncio.timeout(timeout)
    try:
        async with scope:
            return _Outcome(await function())
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        if isinstance(error, TimeoutError) and scope.expired():
            up = TimeIsUpError()
            up.__cause__ = error.__cause__ or error
            return _Outcome(error=up)
        return _Outcome(error=error)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(loop.stop)
