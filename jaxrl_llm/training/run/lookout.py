"""Looks out for the other processes of a run: one that is lost ends all, one that keeps the others waiting is named.

Every process tells the store of JAX's coordination service, every few seconds, where it is; all enter the same places
in the same order, so that who has entered fewer of them is late. JAX itself hears the hearts of all, by threads of its
own, and decides who is lost.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import glob
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

_KEYS = "jaxrl_llm/lookout"
_LONG = 7 * 24 * 3600 * 1000
"""Milliseconds at a barrier that no one passes."""
_BEAT = 2.0
"""Seconds between two looks, of few processes."""
_FIRST_WORD = 60.0
"""Seconds of waiting before a late process is named for the first time."""
_LAST_WORDS = 6
"""Seconds that an abort leaves to say why."""

_LOST_TASK = re.compile(r"[Tt]ask[: ](\d+) heartbeat timeout")


class Place(NamedTuple):
    """Where a process is."""

    name: str
    number: int
    """How many places it has entered."""
    since: float
    """Seconds that it has been there."""
    inside: bool = True
    """Not between two places."""
    ended: bool = False
    """The process is on its way out."""

    def __str__(self) -> str:
        if self.ended:
            return f"has ended, {'in' if self.inside else 'after'} {self.name!r}; its own output says why"
        return f"has been {'in' if self.inside else 'past'} {self.name!r} for {self.since:.0f} s"


class Lookout:
    """Looks out, on threads of its own, from `begin` to the end of the process.

    Args:
        client: JAX's, of the coordination service.
        address: of the service, which process 0 runs; host:port.
        process: this one's number.
        count: of all processes.
        lost_after: seconds without a heartbeat after which JAX counts a process as lost.
    """

    def __init__(self, client: Any, address: str, process: int, count: int, lost_after: float) -> None:
        self._client, self._address = client, address
        self._process, self._count, self._lost_after = process, count, lost_after
        self._name, self._number, self._entered = "start", 0, time.monotonic()
        self._depth, self._inside = 0, True
        self._beat = max(_BEAT, count / 25)  # the store answers all of them
        tasks = (self._listen, self._look, self._await_abort)
        self._threads = [threading.Thread(target=task, name=f"lookout{task.__name__}", daemon=True) for task in tasks]
        self._ended, self._all_ended, self._speaking = threading.Event(), threading.Event(), threading.Lock()
        self._seen: dict[int, tuple[Place, float]] = {}  # when what a process told changed for the last time
        self._next_word = _FIRST_WORD
        self.resume = "--resume"
        """What the command needs to go on."""

    def begin(self) -> None:
        """Starts to look out."""
        # JAX aborts a process that lost another one, sometimes before it tells. An abort that sleeps first (the number
        # of the signal is 6, and so are the seconds) leaves time to say why; any other abort is that much later.
        assert signal.SIGABRT == _LAST_WORDS
        library = ctypes.CDLL(None)
        library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
        for thread in self._threads:
            thread.start()
        atexit.register(self._end)

    @contextlib.contextmanager
    def at(self, name: str) -> Iterator[None]:
        """A place that all processes enter in the same order, and in which they may wait for each other."""
        outer, self._entered = self._name, time.monotonic()
        self._name = f"{outer}: {name}" if self._depth else name
        self._number, self._depth, self._inside = self._number + 1, self._depth + 1, True
        try:
            yield
        finally:
            self._depth, self._entered = self._depth - 1, time.monotonic()
            self._inside = self._depth > 0
            if self._inside:
                self._name = outer

    def someone_is_lost(self, cause: str) -> None:
        """To be called where a collective failed: ends the process when it is known who is lost.

        Returns where no one is, as far as can be seen in the time after which JAX would say so.
        """
        until = time.monotonic() + self._lost_after + 2 * self._beat
        while time.monotonic() < until:
            if silent := self._silent(4 * self._beat):
                self._give_up(f"lost process {silent[0]}, {self._last_seen(silent[0])} ({cause:.160})")
            time.sleep(self._beat / 4)

    def _silent(self, seconds: float) -> list[int]:
        """Those who have told nothing for so long and should have, the longest silent first."""
        before = time.monotonic() - seconds
        heard = {other: when for other, (place, when) in list(self._seen.items()) if not place.ended and when < before}
        return sorted(heard, key=heard.__getitem__)

    def _await_abort(self) -> None:
        """Says why JAX aborts this process, where it does."""
        while not self._all_ended.wait(1.0):
            if not _aborting():
                continue
            silent = self._silent(self._lost_after / 2)
            lost = 0 if self._process and not _answers(self._address) else silent[0] if silent else None
            if lost is not None:
                self._give_up(f"lost process {lost}, {self._last_seen(lost)}")
            return  # it is no other one's fault

    def _end(self) -> None:
        """Waits for the others, who may still write a model, and ends JAX's part in the run.

        JAX would do so a little later: deaf to its lost ones, and with a thread that it lets go on when Python is gone,
        which aborts the process.
        """
        self._ended.set()
        try:
            self._tell()
            self._client.wait_at_barrier(f"{_KEYS}/end", _LONG)
            self._all_ended.set()
        except jax.errors.JaxRuntimeError:
            self._threads[0].join()  # someone is lost: `_listen` hears of it, too, says so, and ends the process
        jax.distributed.shutdown()
        for thread in self._threads:
            thread.join()

    def _here(self) -> Place:
        return Place(self._name, self._number, time.monotonic() - self._entered, self._inside, self._ended.is_set())

    def _tell(self) -> None:
        self._client.key_value_set(f"{_KEYS}/{self._process}", json.dumps(self._here()), allow_overwrite=True)

    def _look(self) -> None:
        """Tells where this process is, and names who is late."""
        while not self._ended.wait(self._beat):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # `_listen` hears of it
                self._tell()
                found = dict(self._client.key_value_dir_get(f"{_KEYS}/"))
                self._note({int(key.rpartition("/")[2]): Place(*json.loads(text)) for key, text in found.items()})

    def _note(self, places: Mapping[int, Place]) -> None:
        """What the others have told."""
        here, now = self._here(), time.monotonic()
        for other, place in places.items():
            if other != self._process and (other not in self._seen or self._seen[other][0] != place):
                self._seen[other] = place, now
        late = {other: place for other, (place, _) in self._seen.items() if place.number < here.number}
        if not here.inside or not late or here.since < 4 * self._beat:
            self._next_word = _FIRST_WORD
            return
        for other, place in late.items():
            if place.ended:
                self._give_up(f"waits in {here.name!r} for process {other}, which {place}")
        if here.since > self._next_word:
            self._next_word *= 2
            self._say(f"waiting for {here.since:.0f} s in {here.name!r}: " + _names(late))

    def _listen(self) -> None:
        """Waits at a barrier that no other process comes to: JAX fails it when one of them is lost."""
        for turn in range(1_000):
            try:
                barrier = f"{_KEYS}/{self._process}/{turn}"
                self._client.wait_at_barrier(barrier, _LONG, list(range(self._count)))
            except jax.errors.JaxRuntimeError as error:
                cause = " ".join(str(error).split())
                if "DEADLINE_EXCEEDED" in cause:
                    continue
                if lost := _LOST_TASK.search(cause):
                    self._give_up(f"lost process {lost[1]}, {self._last_seen(int(lost[1]))}")
                elif not self._all_ended.is_set():
                    who = f"process 0, {self._last_seen(0)}" if self._process else "another one"
                    self._give_up(f"lost {who} ({cause:.160})")
                return

    def _last_seen(self, process: int) -> str:
        return f"which {self._seen[process][0]}" if process in self._seen else "which told nothing yet"

    def _say(self, text: str) -> None:
        os.write(2, f"process {self._process} of {self._count}: {text}\n".encode())

    def _give_up(self, why: str) -> None:
        """Ends the process, at once: what closes files would wait for the lost one until JAX aborts.

        A checkpoint that was being written is left unfinished, as by a kill.
        """
        with self._speaking:  # once
            sys.stdout.flush()
            line = (
                f"error: process {self._process} of {self._count} {why}. Go on with the same command and "
                f"{self.resume} in all of them, from the latest checkpoint\n"
            )
            os.write(2, line.encode())
            os._exit(1)


def _names(late: Mapping[int, Place]) -> str:
    """At most three of them."""
    named = [f"process {other} has not arrived, it {place}" for other, place in sorted(late.items())[:3]]
    return "; ".join(named) + (f"; and {len(late) - 3} more" if len(late) > 3 else "")


def _aborting() -> bool:
    """Whether a thread of this process is on its way to an abort: the signal is blocked while it is handled."""
    for status in glob.glob("/proc/self/task/*/status"):
        with contextlib.suppress(OSError):  # the thread has ended
            blocked = re.search(r"SigBlk:\s*(\w+)", Path(status).read_text())
            if blocked and int(blocked[1], 16) >> (signal.SIGABRT - 1) & 1:
                return True
    return False


def _answers(address: str) -> bool:
    """Whether there is someone at an address."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True
