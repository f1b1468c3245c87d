"""A state's arrays by their paths, and what two such trees differ in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MOST_SHOWN = 12


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves by their paths ("params/embed/weight"), in the tree's order.

    Raises:
        ValueError: If two leaves have the same path, because a key has a "/" in it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named: dict[str, Any] = {}
    for key_path, leaf in leaves:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if path in named:
            raise ValueError(f"two arrays of the state have the path {path!r}: a key has a '/' in it")
        named[path] = leaf
    return named


def check_savable(leaves: Mapping[str, Any]) -> None:
    """Raises ValueError, with the path, for a leaf that is not a plain array."""
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(f"the state must hold arrays; {path} is {type(leaf).__name__}: {leaf!r}")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{path} is a PRNG key: save jax.random.key_data of it, and wrap it again")


def differences(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Says in which paths, shapes and types two sets of leaves differ; empty if in none.

    Args:
        saved: What a checkpoint has: anything with `shape` and `dtype`, by path.
        expected: What is wanted, likewise.

    Returns:
        One line a difference; of many, the first and the number of the others.
    """
    found = [f"{path}: not in the checkpoint" for path in expected if path not in saved]
    found += [f"{path}: only in the checkpoint" for path in saved if path not in expected]
    for path in expected:
        if path in saved and _describe(saved[path]) != _describe(expected[path]):
            found.append(f"{path}: saved {_describe(saved[path])}, expected {_describe(expected[path])}")
    if len(found) > _MOST_SHOWN:
        found = [*found[:_MOST_SHOWN], f"and {len(found) - _MOST_SHOWN} more"]
    return found


def _describe(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
