"""One environment for every test: eight virtual CPU devices and a compilation cache that outlives the run."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

# JAX reads these when it is imported, and the processes that tests start inherit them. Loading a program from
# the cache still counts as a compilation (`/jax/core/compile/backend_compile_duration`), so that tests that
# count compilations see the same numbers with a warm cache.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"jaxrl_llm-tests-{getpass.getuser()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("MPLBACKEND", "agg")
# XLA's CPU client gives itself one thread per device, and each device holds one while it waits for the others
# of a collective. On JAX 0.10 with fewer cores than devices, programs dispatched one behind the other then
# starve, and the process aborts ("waiting for all reduce ... may be stuck"). Threads are cheap.
os.environ.setdefault("PJRT_NPROC", "32")

import jax
import pytest
from jax.sharding import AxisType, Mesh

# In this process alone: the scripts that tests start see one device, as a newcomer's machine does.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    """Eight devices as data 2 × fsdp 2 × tensor 2, with the axis names of every mesh of the package."""
    return jax.make_mesh(
        (2, 2, 1, 2, 1),
        ("data", "fsdp", "context", "tensor", "expert"),
        axis_types=(AxisType.Auto,) * 5,
    )
