"""`report.html` of a run that goes on: written again now and then, by a thread that takes a small share of the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxrl_llm.training.run.page.digest import Digest
from jaxrl_llm.training.run.page.document import PAGE_FILE, write_page

FIRST_SECONDS, SECONDS = 15.0, 60.0
"""From the start to the first page, and between pages."""
_SHARE = 0.01
"""Of the time, at most, that pages may take."""


class LivePage:
    """Reads what a run has written, and writes its page: after a quarter of a minute, each minute, and at the end.

    A page that cannot be made stops no run: that is told once, and `jaxrl-llm report` makes one of the same files.

    Enter it before what writes the files, so that it sees them whole at the end.

    Args:
        folder: of the run.
        defaults: what settings are by default, flat.
        tell: says a line.
        enabled: False makes every method do nothing.
    """

    def __init__(
        self, folder: Path, defaults: Mapping[str, Any], tell: Callable[[str], None], *, enabled: bool = True
    ) -> None:
        self.folder, self.enabled = folder, enabled
        self._defaults, self._tell = defaults, tell
        self._digest: Digest | None = None
        self._ended = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._serve, name="page", daemon=True)

    def begin(self) -> None:
        """Begins to look at the files, once those of a run that goes on are cut."""
        if self.enabled:
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.ident is not None:
            self._ended.set()
            self._thread.join()
            self._write()

    def _serve(self) -> None:
        wait = FIRST_SECONDS
        while not self._ended.wait(wait) and not self._failed:
            began = time.perf_counter()
            self._write()
            wait = max(SECONDS, (time.perf_counter() - began) / _SHARE)

    def _write(self) -> None:
        if self._failed:
            return
        try:
            self._digest = self._digest or Digest(self.folder, self._defaults)
            self._digest.update()
            if not self._digest.curves.curves:  # it has made no step
                return
            write_page(self.folder / PAGE_FILE, [self._digest.data()])
        except Exception as error:  # of any kind: a page is worth no run
            self._failed = True
            self._tell(f"no {PAGE_FILE} is written any more: {error}; jaxrl-llm report {self.folder} makes one")
