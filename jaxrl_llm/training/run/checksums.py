"""Checksums of arrays, computed where the arrays are, and what a checkpoint records to be known again by."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import ItemsView, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.sharding import in_host_memory, to_device_memory

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
    """A checksum of 32 bits of each array, the same on whatever mesh.

    The devices compute them, each of its own part; nothing but the sums is moved. A single entry that changes always
    changes its array's; other damage goes unseen once in 2³².

    Args:
        leaves: arrays by name.
    """
    # One program for all that lies on the same devices; what lies in the host's memory may not fit there at once.
    together: dict[Any, dict[str, Any]] = collections.defaultdict(dict)
    for name, leaf in leaves.items():
        devices = frozenset(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else None
        together[name if devices and in_host_memory(leaf) else devices][name] = leaf
    sums: dict[str, Any] = {}
    for group in together.values():
        sums |= jax.device_get(_checksums(group))
    return {name: int(sums[name]) for name in leaves}


class BrokenSealError(ValueError):
    """What was read is not what was saved; the message says in what."""


def make_seal(step: int, leaves: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved beside a state to know it again: its step, the checksums of its arrays, and a digest of all.

    Args:
        step: of the state.
        leaves: arrays by path.
        extra: as JSON gives it back.
    """
    sums = checksums(leaves)
    arrays = {path: [np.dtype(x.dtype).name, list(x.shape), f"{sums[path]:08x}"] for path, x in leaves.items()}
    return {"step": step, "arrays": arrays, "digest": _digest(step, arrays, extra)}


def check_seal(seal: Any, step: int, extra: Any) -> None:
    """Checks that a seal is whole, of this step and of this `extra`.

    Raises:
        BrokenSealError: it is not.
    """
    if not isinstance(seal, dict) or seal.keys() != {"step", "arrays", "digest"}:
        raise BrokenSealError("its checksums cannot be read")
    if seal["digest"] != _digest(seal["step"], seal["arrays"], extra):
        raise BrokenSealError("its settings, its place in the data or its checksums are not those that were saved")
    if seal["step"] != step:
        raise BrokenSealError(f"it is checkpoint {seal['step']} under another name")


def sealed_arrays(seal: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the arrays that were saved, by path."""
    return {path: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(name)) for path, (name, shape, _) in _arrays(seal)}


def check_arrays(seal: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Checks that arrays are those that were saved; their paths, shapes and types are known to be.

    Raises:
        BrokenSealError: some are not; names one.
    """
    saved = {path: total for path, (_, _, total) in _arrays(seal)}
    wrong = [path for path, total in checksums(leaves).items() if saved[path] != f"{total:08x}"]
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise BrokenSealError(f"not the values that were saved: {wrong[0]}{others}")


def _arrays(seal: Mapping[str, Any]) -> ItemsView[str, tuple[str, list[int], str]]:
    return seal["arrays"].items()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def _checksums(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(leaf) for name, leaf in leaves.items()}


def _checksum(x: jax.Array) -> jax.Array:
    """Σ mixed(bits, index) mod 2³²: exact in any order, and another one for entries that change or change places."""
    x = to_device_memory(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    for axis in range(bits.ndim):
        bits = _mixed(bits + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis))
    return jnp.sum(bits, dtype=jnp.uint32)


def _mixed(bits: jax.Array) -> jax.Array:
    """A bijection of 32 bits of which each depends on all, so that no two changes cancel each other in a sum."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)
