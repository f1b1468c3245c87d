from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import monitoring

from jaxrl_llm.training.compilation import CompilationCounter, enable_persistent_cache


def listeners() -> int:
    return len(monitoring.get_event_listeners()) + len(monitoring.get_event_duration_listeners())


def ones(n: int) -> np.ndarray:
    return np.ones(n, np.float32)


def test_counts_by_name_and_a_second_shape_is_a_second_compilation() -> None:
    @jax.jit
    def sample(x: jax.Array) -> jax.Array:
        return jnp.sin(x) + 1

    @jax.jit
    def update(x: jax.Array) -> jax.Array:
        return sample(x) * 2

    with CompilationCounter() as counter:
        sample(ones(3))
        update(ones(3))
        assert counter.counts == {"sample": 1, "update": 1}
        mark = counter.mark()
        sample(ones(3))
        update(ones(3))
        assert counter.since(mark) == {}
        update(ones(5))
        assert counter.since(mark) == {"update": 1}
    assert counter.counts == {"sample": 1, "update": 2}
    assert counter.seconds > 0
    assert [record.program for record in counter.records] == ["sample", "update", "update"]


def test_records_only_between_start_and_stop_and_leaves_no_listener() -> None:
    before = listeners()
    counter = CompilationCounter()
    jax.jit(lambda x: x - 1)(ones(2))
    assert counter.counts == {}
    counter.start()
    counter.start()  # once is enough
    assert listeners() == before + 2
    counter.stop()
    counter.stop()
    assert listeners() == before
    jax.jit(lambda x: x - 2)(ones(2))
    assert counter.counts == {}


def test_two_counters_count_independently() -> None:
    with CompilationCounter() as outer:
        with CompilationCounter() as inner:
            jax.jit(lambda x: x * 3)(ones(2))
        jax.jit(lambda x: x * 4)(ones(2))
    assert inner.counts == {"<lambda>": 1}
    assert outer.counts == {"<lambda>": 2}


# In its own process, because JAX opens one cache a process.
CACHE_SCRIPT = """
import jax, numpy as np
from jaxrl_llm.training.compilation import CompilationCounter, enable_persistent_cache

def slow_to_compile(x):
    for i in range(60):
        x = jax.numpy.sort(x * i) @ x
    return x

print(enable_persistent_cache())
with CompilationCounter() as counter:
    for _ in range(2):
        jax.jit(slow_to_compile)(np.ones((8, 8), np.float32))
        jax.clear_caches()  # as a new process
print([(record.program, record.from_cache) for record in counter.records])
"""


def test_a_load_from_the_cache_counts_and_is_marked(tmp_path: Path) -> None:
    unset = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAXRL_LLM_CACHE")
    # Under the flags that make tests compile quickly, it takes about as long as what is too quick to be kept.
    unset += ("XLA_FLAGS",)
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    result = subprocess.run(
        [sys.executable, "-c", CACHE_SCRIPT],
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    folder, records = result.stdout.splitlines()
    assert Path(folder).is_relative_to(tmp_path / ".cache" / "jaxrl_llm" / "xla")
    assert records == "[('slow_to_compile', False), ('slow_to_compile', True)]"


@pytest.fixture
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX without the cache that conftest gives every test."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.delenv("JAXRL_LLM_CACHE", raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def configured() -> str | None:
    return jax.config.values["jax_compilation_cache_dir"]


@pytest.mark.usefixtures("unconfigured")
def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path / "mine"))
    used = enable_persistent_cache()
    assert used is not None and used == configured()
    assert Path(used).parent == tmp_path / "mine" / "xla"
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0.1

    jax.config.update("jax_compilation_cache_dir", None)
    assert enable_persistent_cache(tmp_path / "given") == configured() == str(tmp_path / "given")
    # What is configured stays.
    assert enable_persistent_cache(tmp_path / "other") == configured() == str(tmp_path / "given")
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("unconfigured")
def test_caching_turned_off_stays_off(tmp_path: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert enable_persistent_cache(tmp_path / "cache") is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert configured() is None and not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("unconfigured")
def test_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be created"):
        enable_persistent_cache(tmp_path / "file" / "cache")
    # No one asked for the home in particular: the run goes on without a cache.
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert enable_persistent_cache() is None
    assert configured() is None


def test_listeners_cleared_by_others_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    with CompilationCounter():
        monkeypatch.setattr(monitoring, "_event_listeners", [])
        monkeypatch.setattr(monitoring, "_event_duration_secs_listeners", [])
