"""The rows that the golden numbers are computed from, ragged random ones, and what holds of every loss."""

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

from jaxrl_llm.losses.aggregate import AggregationMode, aggregation_normalizer


@pytest.fixture
def tok() -> SimpleNamespace:
    """Two sequences of four and two tokens; what is at the padding must not matter."""
    nan = np.nan
    return SimpleNamespace(
        mask=np.array([[True, True, True, True], [True, True, False, False]]),
        logprobs=np.array([[-1.0, -0.5, -2.0, -0.1], [-0.3, -1.2, nan, -9]]),
        old=np.array([[-1.2, -0.5, -1.5, -0.2], [-0.4, -0.9, 5, nan]]),
        ref=np.array([[-1.1, -0.7, -1.8, -0.3], [-0.5, -1.0, -3, np.inf]]),
        advantages=np.array([0.5, -1.0]),
    )


@pytest.fixture
def ragged() -> SimpleNamespace:
    """Random rows, [P, G, T] = [4, 3, 6]: one is empty, some have one token, and NaN is at the padding."""
    rng = np.random.default_rng(0)
    lengths = np.array([[6, 3, 1], [2, 0, 4], [5, 5, 6], [1, 2, 3]])
    mask = np.arange(6) < lengths[..., None]
    mask[2, 0, 2] = False  # an observation amid the completion

    def padded(x: np.ndarray) -> np.ndarray:
        return np.where(mask, x, np.nan)

    logprobs = -rng.exponential(size=mask.shape)
    return SimpleNamespace(
        mask=mask,
        logprobs=padded(logprobs),
        old=padded(logprobs + 0.3 * rng.normal(size=mask.shape)),
        ref=padded(logprobs + 0.5 * rng.normal(size=mask.shape)),
        advantages=rng.normal(size=mask.shape[:-1]),
        token_advantages=padded(rng.normal(size=mask.shape)),
        sampler=padded(logprobs + 0.4 * rng.normal(size=mask.shape)),
        entropy=padded(rng.exponential(size=mask.shape)),
        weights=padded(rng.exponential(size=mask.shape) * rng.integers(0, 2, size=mask.shape)),
    )


@pytest.fixture
def pref() -> SimpleNamespace:
    """Two preference pairs, as sequence log-probs and numbers of tokens."""
    return SimpleNamespace(
        chosen=np.array([-10.0, -12.0]),
        rejected=np.array([-11.0, -11.5]),
        ref_chosen=np.array([-10.5, -11.0]),
        ref_rejected=np.array([-10.8, -12.2]),
        chosen_lengths=np.array([4, 6]),
        rejected_lengths=np.array([5, 3]),
    )


@pytest.fixture
def ragged_pairs() -> dict[str, np.ndarray]:
    """Random preference pairs by argument name, `[8]`; three of them are padding, where numbers are NaN."""
    rng = np.random.default_rng(0)
    mask = np.array([True, True, False, True, False, True, True, False])
    arrays = {}
    for side in ("chosen", "rejected"):
        lengths = rng.integers(1, 9, size=8)
        logprobs = -lengths * rng.exponential(size=8)
        arrays |= {
            f"{side}_logprobs": np.where(mask, logprobs, np.nan),
            f"ref_{side}_logprobs": np.where(mask, logprobs + 2 * rng.normal(size=8), np.nan),
            f"{side}_lengths": np.where(mask, lengths, -1),
            f"{side}_win_probs": np.where(mask, rng.uniform(size=8), np.nan),
        }
    return arrays | {"weights": np.where(mask, rng.uniform(0.5, 2, size=8), np.nan), "mask": mask}


Loss = Callable[..., tuple[jax.Array, Any]]


@pytest.fixture(scope="session")
def check_token_loss() -> Callable[..., None]:
    """Checks what holds of every named loss of tokens; see `check` below for the arguments."""

    def check(
        loss: Loss,
        arrays: dict[str, np.ndarray],
        *,
        mode: AggregationMode | None,
        trained: str = "logprobs",
        packs: bool = True,
        detached: bool = False,
    ) -> None:
        """Checks a loss on ragged rows.

        Args:
            loss: called with `arrays` by name, and with `normalizer` and `segment_ids` where they are tested; returns
                `(loss, metrics)`.
            arrays: `[R, T]`, or `[R]` for one number a sequence; `mask` is one of them. R must be even.
            mode: aggregation whose normalizer makes micro-batches add up; `None` if the loss takes none.
            trained: the array that is differentiated.
            packs: whether the loss takes `segment_ids`.
            detached: whether parts of the loss are constants by design, so that its gradient, to be tested elsewhere,
                is not that of its value.
        """
        mask = arrays["mask"]
        clean = {name: _filled(x, mask, 0.0) for name, x in arrays.items()}

        def value(changes: dict[str, Any] | None = None, **options: Any) -> Any:
            return loss(**{**clean, **(changes or {})}, **options)

        def gradient(changes: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
            fixed = {**clean, **(changes or {})}
            x = jnp.asarray(fixed.pop(trained))
            return jax.value_and_grad(lambda x: loss(**{trained: x}, **fixed, **options)[0])(x)

        # What is at the padding does not matter, and gets no gradient.
        expected, expected_gradient = gradient()
        chex.assert_tree_all_finite((expected, expected_gradient))
        assert np.any(np.asarray(expected_gradient) != 0)
        for padding in (np.nan, np.inf, 7.0):
            dirty = {name: _filled(x, mask, padding) for name, x in arrays.items()}
            chex.assert_trees_all_equal((value(), gradient()), (value(dirty), gradient(dirty)))
        np.testing.assert_array_equal(np.asarray(expected_gradient)[~mask], 0)

        # The gradient is that of the value.
        with jax.enable_x64(True):
            rest = {name: jnp.asarray(x) for name, x in clean.items() if name != trained}
            point = (jnp.asarray(clean[trained]),)
            if not detached:
                check_grads(jax.jit(lambda x: loss(**{trained: x}, **rest)[0]), point, 1, ["rev"])

        # All else is constant.
        constants = {"old_logprobs", "ref_logprobs", "sampler_logprobs", "advantages", "weights"} - {trained}
        passive = {name: jnp.asarray(clean[name]) for name in sorted(constants & set(clean))}
        assert not any(np.any(g) for g in jax.grad(lambda changes: value(changes)[0])(passive).values())

        # Transformations and types.
        chex.assert_trees_all_close(value(), jax.jit(lambda changes: value(changes))(clean), rtol=1e-5, atol=1e-6)
        twice = {name: jnp.stack([x, x[::-1]]) for name, x in clean.items()}
        both = jax.vmap(lambda changes: value(changes)[0])(twice)
        np.testing.assert_allclose(both, [expected, expected], rtol=1e-5, atol=1e-6)
        narrow = {n: jnp.asarray(x, jnp.bfloat16) if x.dtype.kind == "f" else x for n, x in clean.items()}
        wide = {n: jnp.asarray(x, jnp.float32) if n != "mask" else x for n, x in narrow.items()}
        assert value(narrow)[0].dtype == jnp.float32
        chex.assert_trees_all_close(value(narrow), value(wide), rtol=1e-6, atol=1e-7)
        assert gradient(narrow)[1].dtype == jnp.bfloat16

        # Nothing to train on; one token.
        empty, empty_gradient = gradient({"mask": np.zeros_like(mask)})
        assert empty == 0 and not np.any(empty_gradient)
        one = np.zeros_like(mask)
        one.flat[np.flatnonzero(mask)[0]] = True
        chex.assert_tree_all_finite(gradient({"mask": one}))

        # A constant group, from which there is nothing to learn.
        if "advantages" in clean:
            chex.assert_tree_all_finite(gradient({"advantages": np.zeros_like(clean["advantages"])}))

        rows = len(mask) // 2
        if mode is not None:  # parts add up, value and gradient
            normalizer = aggregation_normalizer(mask, mode=mode)
            parts = [
                gradient({name: x[part] for name, x in clean.items()}, normalizer=normalizer)
                for part in (slice(rows), slice(rows, None))
            ]
            np.testing.assert_allclose(parts[0][0] + parts[1][0], expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                np.concatenate([parts[0][1], parts[1][1]]), expected_gradient, rtol=1e-5, atol=1e-6
            )
        if packs:  # two sequences in a row
            width = mask.shape[1]
            wide_rows = {n: x if x.ndim > 1 else np.repeat(x[:, None], width, 1) for n, x in clean.items()}
            packed = {n: np.concatenate([x[:rows], x[rows:]], axis=1) for n, x in wide_rows.items()}
            segment_ids = np.repeat([[0] * width + [1] * width], rows, axis=0)
            total, packed_gradient = gradient(packed, segment_ids=segment_ids)
            np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)
            unpacked = np.concatenate([packed_gradient[:, :width], packed_gradient[:, width:]])
            np.testing.assert_allclose(unpacked, expected_gradient, rtol=1e-5, atol=1e-6)

    return check


def _filled(x: np.ndarray, mask: np.ndarray, value: float) -> np.ndarray:
    """Writes `value` to the padding of a floating-point array of tokens."""
    return np.where(mask, x, value) if x.shape == mask.shape and x.dtype.kind == "f" else x


@pytest.fixture
def ragged_rows(ragged: SimpleNamespace) -> Callable[..., dict[str, np.ndarray]]:
    """The rows of `ragged` as `[R, T]` (and `[R]`), by name, the empty one left in."""

    def rows(*names: str) -> dict[str, np.ndarray]:
        every = {"logprobs": ragged.logprobs, "mask": ragged.mask, "old_logprobs": ragged.old}
        every |= {"ref_logprobs": ragged.ref, "advantages": ragged.advantages, "weights": ragged.weights}
        every |= {"sampler_logprobs": ragged.sampler, "entropy": ragged.entropy}
        every |= {"token_advantages": ragged.token_advantages}
        width = ragged.mask.shape[-1]
        return {n: every[n].reshape(-1, width) if every[n].ndim > 2 else every[n].reshape(-1) for n in names}

    return rows
