"""The rows that the golden numbers of `algorithm_examples.json` are computed from, and ragged random ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture(scope="session")
def examples() -> dict:
    return json.loads((Path(__file__).parent / "algorithm_examples.json").read_text())


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
    )
