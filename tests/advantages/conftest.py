"""The rows that the golden numbers are computed from, ragged random groups, and what holds of every estimator."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

Arrays = dict[str, np.ndarray]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def tok() -> SimpleNamespace:
    """Two sequences of four and two tokens; what is at the padding must not matter."""
    nan = np.nan
    return SimpleNamespace(
        mask=np.array([[True, True, True, True], [True, True, False, False]]),
        logprobs=np.array([[-1.0, -0.5, -2.0, -0.1], [-0.3, -1.2, -9, nan]]),
        old=np.array([[-1.2, -0.5, -1.5, -0.2], [-0.4, -0.9, 5, nan]]),
        ref=np.array([[-1.1, -0.7, -1.8, -0.3], [-0.5, -1.0, nan, -3]]),
        values=np.array([[0.2, 0.1, 0.3, 0.4], [-0.1, -0.2, 7, nan]]),
        scores=np.array([1.0, -0.5]),
    )


@pytest.fixture
def ragged() -> SimpleNamespace:
    """Random groups, [P, G, T] = [4, 3, 6]: one row is empty, one has a hole, some one token; NaN at the padding."""
    rng = np.random.default_rng(0)
    lengths = np.array([[6, 3, 1], [2, 0, 4], [5, 5, 6], [1, 2, 3]])
    mask = np.arange(6) < lengths[..., None]
    mask[2, 0, 2] = False  # an observation amid the completion

    def padded(x: np.ndarray) -> np.ndarray:
        return np.where(mask, x, np.nan)

    return SimpleNamespace(
        mask=mask,
        lengths=mask.sum(-1),
        old=padded(-rng.exponential(size=mask.shape)),
        ref=padded(-rng.exponential(size=mask.shape)),
        token_rewards=padded(rng.normal(size=mask.shape)),
        values=padded(rng.normal(size=mask.shape)),
        entropy=padded(rng.exponential(size=mask.shape)),
        probs=padded(rng.uniform(size=mask.shape)),
        scores=rng.normal(size=mask.shape[:2]),
        greedy=rng.normal(size=mask.shape[:2]),
        successes=np.array([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0]], bool),
        finished=np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]], bool),
    )


@pytest.fixture(scope="session")
def check_estimator() -> Callable[..., None]:
    """Checks what holds of every estimator; see `check` below for the arguments."""

    def check(
        function: Callable[..., Any],
        arrays: Arrays,
        *,
        mask: str = "mask",
        trained: str | None = None,
        packs: bool = False,
    ) -> None:
        """Checks a function of arrays whose first axis holds independent rows or groups.

        Args:
            function: called with `arrays` by name, and with `segment_ids` where that is tested.
            arrays: those that have the shape of the mask hold garbage where it is False.
            mask: which of them is the mask.
            trained: the array by which the result is differentiated; None: the result is not differentiable. Its
                groups must not be constant, where the derivative jumps.
            packs: whether the function takes `segment_ids`; then the arrays are `[R, T]` or `[R]`, R even.
        """
        held = arrays[mask]
        clean = {name: _filled(x, held, 0.0) for name, x in arrays.items()}
        expected = function(**clean)
        chex.assert_tree_all_finite(expected)
        assert any(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(expected))

        # What is masked does not matter.
        for padding in (np.nan, np.inf, 7.0):
            chex.assert_trees_all_equal(expected, function(**{n: _filled(x, held, padding) for n, x in arrays.items()}))

        # Transformations and types.
        chex.assert_trees_all_close(expected, jax.jit(function)(**clean), **TOLERANCE)
        reversed_rows = {name: x[::-1] for name, x in clean.items()}
        both = {name: np.stack([x, reversed_rows[name]]) for name, x in clean.items()}
        either = jax.tree.map(lambda *x: jnp.stack(x), expected, function(**reversed_rows))
        chex.assert_trees_all_close(either, jax.jit(jax.vmap(lambda kwargs: function(**kwargs)))(both), **TOLERANCE)
        narrow = {n: jnp.asarray(x, jnp.bfloat16) if x.dtype.kind == "f" else x for n, x in clean.items()}
        wide = {n: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for n, x in narrow.items()}
        chex.assert_trees_all_equal(function(**narrow), function(**wide))
        for leaf in jax.tree.leaves(function(**narrow)):
            assert leaf.dtype in (jnp.float32, jnp.bool_, jnp.int32)

        # Nothing valid; one valid element.
        one = np.zeros_like(held)
        one.flat[np.flatnonzero(held)[0]] = True
        for few in (np.zeros_like(held), one):
            chex.assert_tree_all_finite(function(**{**clean, mask: few}))

        if trained is not None:
            _check_gradient(function, arrays, mask, trained, [one, np.zeros_like(held)])
        if packs:  # two sequences in a row
            rows, width = len(held) // 2, held.shape[1]
            wide_rows = {n: x if x.ndim > 1 else np.repeat(x[:, None], width, 1) for n, x in clean.items()}
            packed = {n: np.concatenate([x[:rows], x[rows:]], axis=1) for n, x in wide_rows.items()}
            segment_ids = np.repeat([[3] * width + [1] * width], rows, axis=0)
            unpacked = jax.tree.map(
                lambda x: jnp.concatenate([x[:, :width], x[:, width:]]), function(**packed, segment_ids=segment_ids)
            )
            chex.assert_trees_all_close(expected, unpacked, **TOLERANCE)

    return check


def _check_gradient(function: Callable[..., Any], arrays: Arrays, mask: str, trained: str, few: list[Any]) -> None:
    def total(x: Any, **others: Any) -> jax.Array:
        leaves = [leaf for leaf in jax.tree.leaves(function(**{trained: x}, **others)) if leaf.dtype != jnp.bool_]
        return sum(
            (jnp.sum(jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape) * leaf) for leaf in leaves), jnp.zeros(())
        )

    others = {name: x for name, x in arrays.items() if name != trained}
    x = arrays[trained]
    gradient = np.asarray(jax.jit(jax.grad(total))(x, **others))
    assert np.isfinite(gradient).all() and np.any(gradient != 0)
    if x.shape == arrays[mask].shape:
        np.testing.assert_array_equal(gradient[~arrays[mask]], 0)
    # Finite where there is nothing to compare: constant groups, one element, none.
    constant = np.where(np.isnan(x), x, 0.1) if x.dtype.kind == "f" else x
    assert np.isfinite(jax.jit(jax.grad(total))(constant, **others)).all()
    for mask_of_few in few:
        assert np.isfinite(jax.jit(jax.grad(total))(x, **{**others, mask: mask_of_few})).all()
    with jax.enable_x64(True):
        clean = {name: jnp.asarray(_filled(x, arrays[mask], 0.0)) for name, x in arrays.items()}
        x = clean.pop(trained)
        check_grads(jax.jit(lambda x: total(x, **clean)), (x,), 1, ["rev"], eps=1e-6)


def _filled(x: np.ndarray, mask: np.ndarray, value: float) -> np.ndarray:
    return np.where(mask, x, value) if x.shape == mask.shape and x.dtype.kind == "f" else x
