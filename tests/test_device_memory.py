from __future__ import annotations

import resource
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_llm import device_memory
from jaxrl_llm.device_memory import bytes_per_device, readable, smallest_device_memory
from jaxrl_llm.sharding import MeshConfig, make_mesh


def test_the_host_has_memory_and_its_limit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = device_memory.host_memory()
    assert whole is not None and 2**28 < whole < 2**50
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10**8, 10**8))
    assert device_memory.host_memory() == 10**8


def test_the_smallest_device_counts() -> None:
    """Of those that say what they have."""

    def mesh(*stats: dict[str, int] | None) -> Any:
        devices = [SimpleNamespace(platform="gpu", memory_stats=lambda one=one: one) for one in stats]
        return cast(Any, SimpleNamespace(local_devices=devices))

    assert device_memory.device_memory(mesh({"bytes_limit": 7}, {"bytes_limit": 5}, {})) == 5
    assert device_memory.device_memory(mesh(None, {})) is None


@pytest.mark.parametrize(("others", "least"), [((3.0, np.inf), 3.0), ((9.0, 8.0), 5.0)])
def test_processes_agree_on_the_least(monkeypatch: pytest.MonkeyPatch, others: tuple[float, ...], least: float) -> None:
    monkeypatch.setattr(device_memory, "device_memory", lambda mesh: 5.0)
    assert smallest_device_memory(make_mesh()) == 5.0
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(device_memory.multihost_utils, "process_allgather", lambda own: np.array([own, *others]))
    assert smallest_device_memory(make_mesh()) == least


def test_processes_that_know_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "device_memory", lambda mesh: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(device_memory.multihost_utils, "process_allgather", lambda own: np.array([own, np.inf]))
    assert smallest_device_memory(make_mesh()) is None


def test_bytes_on_one_device() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    arrays = [
        jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=split),
        jax.ShapeDtypeStruct((5,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())),
        jax.ShapeDtypeStruct((6,), jnp.int8),
        jax.ShapeDtypeStruct((64,), jnp.float32, sharding=split.with_memory_kind("pinned_host")),
    ]
    assert bytes_per_device(arrays) == 2 * 3 * 2 + 5 * 4 + 6


def test_readable() -> None:
    assert [readable(size) for size in (0, 999, 12_345, 15.75 * 2**30)] == ["0 B", "999 B", "12.3 kB", "16.9 GB"]
