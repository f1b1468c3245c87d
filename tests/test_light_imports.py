"""The pure functions are for other code bases, too: importing them must not load the rest of the stack."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("jaxrl_llm.losses", "jaxrl_llm.advantages")


def in_new_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def loaded_by(module: str) -> set[str]:
    """Top-level names of the modules that importing `module` loads, without the standard library's."""
    names = in_new_process(f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})")
    return set(names.split()) - sys.stdlib_module_names


@pytest.mark.parametrize("module", ["jaxrl_llm", *PACKAGES, "jaxrl_llm.masking", "jaxrl_llm.logprobs"])
def test_import_loads_only_jax_and_numpy(module):
    loaded = loaded_by(module)
    assert "jaxrl_llm" in loaded
    assert not loaded - loaded_by("jax.numpy") - {"jaxrl_llm"}


def cpu_seconds(modules: str) -> float:
    """Processor time, of which a busy machine takes no more than a quiet one, to import `modules`."""
    code = f"import time; began = time.process_time(); import {modules}; print(time.process_time() - began)"
    return float(in_new_process(code))


def test_import_takes_little_more_time_than_that_of_jax():
    modules = ", ".join(PACKAGES)
    cpu_seconds(f"jax, {modules}")  # writes byte code, fills the file cache
    pairs = [(cpu_seconds("jax"), cpu_seconds(modules)) for _ in range(3)]
    alone, with_ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert with_ours < 1.5 * alone, f"import {modules}: {with_ours:.2f} s, import jax: {alone:.2f} s"
