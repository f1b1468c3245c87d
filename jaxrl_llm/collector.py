"""Imports without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Imports what stays to the end: nothing of it is garbage, and the collector does not look for any, then or later.

    It would look at all again and again: a sixth of the time of importing, and at each pass while programs are traced.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
