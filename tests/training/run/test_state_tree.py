from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.training.run.state_tree import check_savable, differences, leaves_by_path


class Moments(NamedTuple):
    count: jax.Array
    mu: dict[str, jax.Array | None]


def test_paths_of_dicts_tuples_and_fields_without_none() -> None:
    tree = {
        "params": {"w": jnp.ones(2)},
        "opt": (Moments(jnp.zeros(()), {"w": jnp.ones(2), "frozen": None}), ()),
    }
    assert list(leaves_by_path(tree)) == ["opt/0/count", "opt/0/mu/w", "params/w"]


def test_equal_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="'a/b'"):
        leaves_by_path({"a": {"b": 1}, "a/b": 2})


def test_what_cannot_be_saved_is_named() -> None:
    check_savable({"x": jnp.ones(2), "y": np.ones(2), "key": jax.random.key_data(jax.random.key(0))})
    with pytest.raises(ValueError, match="opt/count is int: 3"):
        check_savable({"opt/count": 3})
    with pytest.raises(ValueError, match=r"rng is a PRNG key.*key_data"):
        check_savable({"rng": jax.random.key(0)})


def test_differences_name_paths_shapes_and_types() -> None:
    saved = {"a": jnp.ones((2, 3)), "b": jnp.ones(2, jnp.bfloat16), "old": jnp.ones(1), "same": jnp.ones(())}
    expected = {"a": jnp.ones((3, 2)), "b": jnp.ones(2), "new": jnp.ones(1), "same": np.ones((), np.float32)}
    assert differences(saved, saved) == []
    assert differences(saved, expected) == [
        "new: not in the checkpoint",
        "old: only in the checkpoint",
        "a: saved float32[2,3], expected float32[3,2]",
        "b: saved bfloat16[2], expected float32[2]",
    ]
    many = differences({}, {str(i): jnp.ones(1) for i in range(20)})
    assert len(many) == 13 and many[-1] == "and 8 more"
