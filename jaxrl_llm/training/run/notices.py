"""What processes tell each other beside the devices, which may be at work for minutes: that one was asked to stop."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import Any

import jax

_ASKED, _CUT, _LEFT = "asked", "cut", "left"
_RUNS = itertools.count()
"""Of this process, one after another."""
_LONG = 3600 * 1000
"""Milliseconds at a barrier: who is lost is the `Lookout`'s affair."""
_LAST = 1.0
"""Seconds by which process 0, with the service that the others talk to, leaves after them."""


class Notices:
    """Of one run, in the store of JAX's coordination service; with one process nothing is told.

    All processes make theirs in the same order.

    Args:
        client: JAX's, of the service; `None`: this process is alone.
        process: this one's number.
        count: of all processes.
    """

    def __init__(self, client: Any = None, process: int = 0, count: int = 1) -> None:
        self._client, self._process, self._count = client, process, count
        self._run = f"jaxrl_llm/stop/{next(_RUNS)}"

    def pause(self) -> float:
        """Seconds to wait between two questions: the service answers all processes."""
        return max(0.2, self._count / 50)

    def tell_stop(self) -> None:
        """Tells the others that they are to stop."""
        self._tell(_ASKED, "")

    def stopping(self) -> bool:
        """Whether any process has told so."""
        return bool(self._told(_ASKED))

    def tell_cut(self, agreements: int) -> None:
        """Tells the others that this process will not come to the agreement after so many, and waits for all to."""
        self._tell(_CUT, str(agreements))
        self._wait(_CUT)

    def has_cut(self, agreements: int) -> bool:
        """Whether another process will not come to the agreement after so many."""
        return str(agreements) in self._told(_CUT)

    def leave(self) -> None:
        """Returns when this process may end: the others have got here, too."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # one is lost
            self._wait(_LEFT)
        if self._client is not None and self._process == 0:
            time.sleep(_LAST)

    def _tell(self, what: str, text: str) -> None:
        if self._client is not None:
            self._client.key_value_set(f"{self._run}/{what}/{self._process}", text, allow_overwrite=True)

    def _told(self, what: str) -> list[str]:
        there = [] if self._client is None else self._client.key_value_dir_get(f"{self._run}/{what}/")
        return [text for _, text in there]

    def _wait(self, what: str) -> None:
        if self._client is not None:
            self._client.wait_at_barrier(f"{self._run}/{what}", _LONG)
