"""TPU slices that are not there: their devices, to compile for, and what a chip can do."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

LOCAL = "local"
"""The devices of this machine in place of a slice."""


class Chip(NamedTuple):
    """What one JAX device of a slice has and can do, at most."""

    hbm_gib: float
    """What the compiler lets a program use: the memory less what the system keeps (its versions differ by 0.01)."""
    tflops: float
    """10¹² bfloat16 operations a second."""
    hbm_gbps: float
    """10⁹ bytes a second that memory reads or writes."""
    ici_gbps: float
    """10⁹ bytes a second over all its links to other chips."""
    dcn_gbps: float | None = None
    """10⁹ bytes a second over the network between slices, when all devices of a host use it; `None`: not published."""


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "TPU v4": Chip(30.75, 275, 1228, 300),
        "TPU v5 lite": Chip(15.75, 197, 819, 200, 3.125),
        "TPU v5": Chip(95.7, 459, 2765, 600, 6.25),
        "TPU v6 lite": Chip(31.2, 918, 1640, 400, 12.5),
        "TPU7x": Chip(94.7, 1153, 3690, 600, 6.25),
    }
)
"""By `device_kind`, from the published specifications of Cloud TPUs; of a TPU7x, half a chip is a device.

The network between slices is that of docs.cloud.google.com/tpu/docs: of v5e 2 × 100 Gbit/s for the eight chips of a
host, of v5p, v6e and TPU7x 50, 100 and 100 Gbit/s a chip.
"""


def slice_devices(name: str) -> list[Any]:
    """The devices of a TPU slice, to compile for, of which none is looked for; or this machine's, of `local`.

    Several slices are written `2xv5e:4x4`.

    Raises:
        ValueError: there is no such slice.
        ImportError: libtpu is not installed.
    """
    if name == LOCAL:
        return jax.devices()
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("libtpu is not installed, which compiles for TPUs: pip install 'jaxrl-llm[tpu]'")
    # The compiler only: no metadata server is asked, no chip is opened, and other processes may do the same.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # silences a warning; the slice's name decides
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    # It could be written and not be read: a program cannot be loaded without its device.
    jax.config.update("jax_enable_compilation_cache", False)
    several = re.fullmatch(r"(\d+)x([a-z].*)", name)
    count, one = (int(several[1]), several[2]) if several else (1, name)
    generation, _, chips = one.partition(":")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if count > 1:
        options["num_slices"] = count
    if chips == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(one, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"slice={name!r} cannot be compiled for; name one such as v5e:2x4, or {LOCAL} ({error})"
        ) from error
