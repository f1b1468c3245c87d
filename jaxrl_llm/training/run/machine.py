"""What the system could do for a run on a CPU, where nobody has asked it to."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import jax

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FIRST_GLIBC = (2, 35)
"""Whose malloc can ask for huge pages."""


def machine_remark(mesh: jax.sharding.Mesh) -> str | None:
    """A line on huge pages, where Linux gives them on request alone and nothing requests them; else `None`.

    XLA takes its temporaries anew from the system at every call, on a CPU from malloc: page by page.
    """
    if mesh.devices.flat[0].platform != "cpu" or not _malloc_can_ask():
        return None
    environment = os.environ
    if "glibc.malloc.hugetlb" in environment.get("GLIBC_TUNABLES", "") or environment.get("LD_PRELOAD"):
        return None
    with contextlib.suppress(OSError):
        if "[madvise]" in _HUGE_PAGES.read_text():
            return "Faster here with huge pages: set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment."
    return None


def _malloc_can_ask() -> bool:
    library, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".") if part.isdecimal())
    return library == "glibc" and numbers >= _FIRST_GLIBC
