"""The processes of a run come together before JAX starts, so that who does not come can be named.

JAX's own start waits for all without a word; when its time is over it aborts the process, and does not say who was
missing. So all meet before it, at the address that JAX's service will have: process 0 listens there until the others
have called, tells them to begin, and leaves the address to JAX. A call stays open while its process waits: where it
breaks off, the process is lost.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import time
from collections.abc import Collection, Iterator

_WORD = 30.0
"""Seconds between two words about who is missing."""
_PAUSE = 0.2
"""Seconds between two attempts to call process 0, or to listen."""
_ANSWER = 5.0
"""Seconds that a caller, or who is called, has to say who he is."""
_KEPT_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""What tells of a host that is gone without a word: seconds, seconds and times."""
_NAME, _WELCOME, _BEGIN = b"jaxrl_llm ", b"jaxrl_llm waits\n", b"begin\n"


def gather(address: str, process: int, count: int, within: float) -> None:
    """Returns in all processes, once all have called it.

    Args:
        address: host:port of process 0, the same for all.
        process: this one's number.
        count: of all processes.
        within: seconds that process 0 waits for the others, and the others for process 0.

    Raises:
        ConnectionError: in all that have come: someone has not, is lost while it waits, or is none of these.
    """
    waiting = _Waiting(f"process {process} of {count}", within)
    if process == 0:
        _listen(address, count, waiting)
    else:
        _call(address, process, count, waiting)


class _Waiting:
    """How long this process waits, and what it says meanwhile.

    Args:
        who: this process.
        within: seconds.
    """

    def __init__(self, who: str, within: float) -> None:
        self.who, self.within = who, within
        self._begun, self._next_word = time.monotonic(), _WORD

    @property
    def left(self) -> float:
        """Seconds until there is something to say."""
        return max(self._begun + min(self.within, self._next_word) - time.monotonic(), 0.0)

    def on(self, what: str) -> None:
        """Says what is waited for, now and then; raises at the end."""
        past = time.monotonic() - self._begun
        if past >= self.within:
            raise ConnectionError(
                f"{self.who} waited in vain for {past:.0f} s for {what}; --cluster.join-within is how long it waits"
            )
        if past >= self._next_word:
            self._next_word += _WORD
            print(f"{self.who}: waiting for {past:.0f} s for {what}", file=sys.stderr, flush=True)


def _listen(address: str, count: int, waiting: _Waiting) -> None:
    """Process 0's part."""
    missing, calls = set(range(1, count)), []
    with (
        contextlib.ExitStack() as opened,
        _listener(address, waiting) as listener,
        selectors.DefaultSelector() as selector,
    ):
        selector.register(listener, selectors.EVENT_READ)
        try:
            while missing:
                for key, _ in selector.select(waiting.left):
                    if key.data is not None:
                        raise ConnectionError(f"{waiting.who} lost process {key.data}, which waited for the others")
                    call = opened.enter_context(listener.accept()[0])
                    if caller := _caller(call):
                        calls.append(call)
                        missing.remove(_checked(*caller, count, missing))
                        selector.register(call, selectors.EVENT_READ, caller[0])
                if missing:
                    waiting.on(f"{_names(missing)} to join at {address}")
        except ConnectionError as error:
            _tell(calls, str(error))
            raise
        _tell(calls, _BEGIN.decode().strip())


@contextlib.contextmanager
def _listener(address: str, waiting: _Waiting) -> Iterator[socket.socket]:
    """Listens where JAX's service will. It may take a while until an earlier run has left the port."""
    port = address.rpartition(":")[2]
    host, _, port = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{port}").rpartition(":")
    host = host.strip("[]").removeprefix("::")  # "": everywhere
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    while True:
        try:
            listener = socket.create_server((host, int(port)), family=family, backlog=1024, dualstack_ipv6=both)
            break
        except OSError as error:
            waiting.on(f"its port {port} ({error.strerror}: does an earlier run go on?)")
            time.sleep(_PAUSE)
    with listener:
        yield listener


def _caller(call: socket.socket) -> tuple[int, int] | None:
    """Which process of how many calls; `None`: a stranger."""
    call.settimeout(_ANSWER)
    try:
        call.sendall(_WELCOME)
        process, count = map(int, call.recv(64).removeprefix(_NAME).split())
        _keep_alive(call)
    except (OSError, ValueError):
        return None
    return process, count


def _checked(process: int, of: int, count: int, missing: Collection[int]) -> int:
    """The number of one that is missed."""
    if of != count:
        raise ConnectionError(f"process 0 is one of {count}, and process {process} one of {of}: they are no one run")
    if process not in missing:
        raise ConnectionError(f"two processes join as process {process} of {count}: each needs its own number")
    return process


def _tell(calls: Collection[socket.socket], line: str) -> None:
    for call in calls:
        with contextlib.suppress(OSError):  # it is lost, and JAX will hear of it
            call.sendall(f"{line}\n".encode())


def _names(missing: Collection[int]) -> str:
    """At most eight of them."""
    first, more = sorted(missing)[:8], len(missing) - 8
    named = ", ".join(map(str, first)) + (f" and {more} more" if more > 0 else "")
    return f"process{'es' if len(missing) > 1 else ''} {named}"


def _call(address: str, process: int, count: int, waiting: _Waiting) -> None:
    """The part of all others."""
    while (call := _answered(address, process, count)) is None:
        waiting.on(f"process 0 to answer at {address}")
        time.sleep(_PAUSE)
    with call, call.makefile("rb") as lines:
        call.settimeout(waiting.within + _ANSWER)
        try:
            line = lines.readline()
        except OSError:
            line = b""
    if not line:
        raise ConnectionError(f"{waiting.who} lost process 0, which waited for the others")
    if line != _BEGIN:
        raise ConnectionError(line.decode().strip())
    time.sleep(_PAUSE)  # JAX's service begins: who asks for it before waits for a second


def _answered(address: str, process: int, count: int) -> socket.socket | None:
    """A call that process 0 has taken; `None` if nobody does, or someone else."""
    host, _, port = address.rpartition(":")
    try:
        call = socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        call.sendall(_NAME + f"{process} {count}\n".encode())
        if call.recv(len(_WELCOME), socket.MSG_WAITALL) == _WELCOME:
            _keep_alive(call)
            return call
    call.close()
    return None


def _keep_alive(call: socket.socket) -> None:
    call.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEPT_ALIVE.items():
        if hasattr(socket, option):  # Linux has all of them
            call.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
