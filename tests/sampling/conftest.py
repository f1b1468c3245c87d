"""A tiny sampler, and the ragged prompts it is given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.types import Rollout

STOP_TOKENS = (1, 5, 9, 17, 33, 40)


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    """The mesh of one device."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def make_sampler(one_device: Mesh) -> Callable[..., Sampler]:
    """A sampler of 3 completions of up to 8 tokens; many tokens end one, so that lengths are ragged.

    Tests that ask for the same one share it, and so its compiled programs.
    """

    @functools.cache
    def make(
        model: Transformer,
        *,
        group: int = 3,
        stop_tokens: tuple[int, ...] = STOP_TOKENS,
        mesh: Mesh | None = None,
        dtype: Any = None,
        **settings: Any,
    ) -> Sampler:
        config = SamplingConfig(**{"max_tokens": 8, **settings})
        return Sampler(model, config, group=group, stop_tokens=stop_tokens, mesh=mesh or one_device, dtype=dtype)

    return make


@pytest.fixture(scope="session")
def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Four prompts of 1 to 6 tokens, and their lengths."""
    tokens = np.random.default_rng(3).integers(0, 64, (4, 6)).astype(np.int32)
    return tokens, np.array([3, 6, 1, 4], np.int32)


@pytest.fixture(scope="session")
def key() -> np.ndarray:
    """Root of the noise, as the engine takes it."""
    return np.asarray(jax.random.key_data(jax.random.key(7)))


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Compares what was sampled: tokens exactly, log-probs within `atol`."""

    def compare(one: Rollout, other: Rollout, *, atol: float = 1e-5) -> None:
        for name in ("completion_lengths", "completion", "finished"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        for name in ("logprobs", "sampler_logprobs"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=atol, err_msg=name)

    return compare
