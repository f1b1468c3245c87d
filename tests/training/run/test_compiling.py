"""What is said of compilations: names, times, and the times of the run before."""

import io
import math
import threading
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.ahead import Ahead
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.run.compiling import CompilationNews, LastTimes, shape_of
from jaxrl_llm.training.run.report import Report


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compiles a function of a name, slowly, and gives the lines that are printed of it."""
    monkeypatch.setattr(LastTimes, "beside_programs", lambda: LastTimes(tmp_path / "seconds.json"))
    least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)

    def lines(name: str, patience: float, settings=None) -> list[str]:
        def slow(x):
            x = x + time.time()  # no earlier run has kept it
            for _ in range(150):
                x = jax.numpy.sin(x) @ x
            return x

        slow.__name__ = name
        out = io.StringIO()
        report = Report(1, console=Console(file=out, width=200))
        with CompilationCounter() as counter, report:
            with CompilationNews(report, counter, settings or {}, patience=patience):
                jax.jit(slow).lower(jax.numpy.ones((3, 3))).compile()
            assert name in counter.counts
        return out.getvalue().splitlines()

    yield lines
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def test_what_takes_long_is_named_with_its_last_time(compiled):
    first = compiled("sample", 0.0)
    assert any(line == "compiling sample …" for line in first)
    assert any(line.startswith("compiled in ") and line.endswith(": sample") for line in first)
    assert any(line.startswith("compiling sample … (") and "last time" in line for line in compiled("sample", 0.0))
    of_others = compiled("sample", 0.0, {"model.path": "another"})
    assert "compiling sample …" in of_others


def test_what_takes_no_time_is_not_named(compiled):
    assert compiled("quick", 60.0) == []


def test_times_survive_a_damaged_file(tmp_path):
    file = tmp_path / "seconds.json"
    file.write_text("{")
    times = LastTimes(file)
    times.keep("a", 2.04)
    assert LastTimes(file).seconds("a") == 2.0
    assert LastTimes(None).seconds("a") is None


def test_only_what_decides_programs_is_in_their_names():
    assert shape_of({"optimizer.learning_rate": 1}) == shape_of({"optimizer.learning_rate": 2})
    assert shape_of({"training.prompts_per_step": 1}) != shape_of({"training.prompts_per_step": 2})


def test_what_is_compiled_ahead_is_not_compiled_again():
    mesh, threads = make_mesh(), []

    def twice(x):
        threads.append(threading.current_thread().name)
        return 2 * x

    program = jax.jit(twice)
    with CompilationCounter() as counter, jax.set_mesh(mesh):
        ahead = Ahead(mesh, {"twice": lambda: program.lower(jax.ShapeDtypeStruct((3,), np.float32))})
        ahead.wait("another")
        ahead.wait("twice")
        program(np.ones(3, np.float32))
        assert counter.counts == {"twice": 1}
    assert threads[0].startswith("compile")


def test_errors_of_compiling_ahead_are_raised_where_it_is_waited_for():
    def refused() -> jax.stages.Lowered:
        raise MemoryError("no room")

    ahead = Ahead(make_mesh(), {"update": refused})
    with pytest.raises(MemoryError, match="no room"):
        ahead.wait("update")
