"""The memory of devices: how much they have, and how much of it arrays take."""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxrl_llm.sharding import HOST


def device_memory(mesh: Mesh) -> float | None:
    """Bytes that each of the mesh's devices here can hold, or `None` where they do not say; CPUs share the host's."""
    local = mesh.local_devices
    if local[0].platform == "cpu":
        host = host_memory()
        return None if host is None else host / len(local)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in local]
    return min((limit for limit in limits if limit), default=None)


def smallest_device_memory(mesh: Mesh) -> float | None:
    """`device_memory` of the process that has least of it: the same number on all.

    With several processes a collective: all of them must call it, in the same order.
    """
    own = device_memory(mesh)
    if jax.process_count() == 1:
        return own
    least = np.min(multihost_utils.process_allgather(np.float32(math.inf if own is None else own)))
    return float(least) if np.isfinite(least) else None


def host_memory() -> int | None:
    """Bytes that this process can have: of the machine with its swap, of its control group, of its own limit."""
    limits = [resource.getrlimit(resource.RLIMIT_AS)[0]]
    with contextlib.suppress(OSError, ValueError):
        swap = re.search(r"SwapTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + 1024 * int(swap[1] if swap else 0))
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min((limit for limit in limits if limit > 0), default=None)


def bytes_per_device(arrays: Any) -> int:
    """What arrays, abstract or not, take on one device, without padding; none in the host's memory.

    Those that say nothing of their sharding lie whole on each.
    """

    def size(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        if sharding is None:
            return math.prod(x.shape) * x.dtype.itemsize
        return 0 if sharding.memory_kind == HOST else math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(arrays)))


def readable(size: float) -> str:
    """A number of bytes with three digits and a unit."""
    power = min(max(int(math.log10(max(size, 1)) // 3), 0), 6)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"
