"""The pure functions are for other code bases, too: importing them must not load the rest of the stack."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxrl_llm.extras import EXTRA_OF

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


def without(packages: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code as if these packages were not installed."""
    hidden = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {packages.split()} else found(name, package)
{code}
"""
    return subprocess.run([sys.executable, "-c", hidden], cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("packages", "code", "message"),
    [
        ("flax", "import jaxrl_llm.models", "flax is not installed: pip install 'jaxrl-llm[checkpoints]'"),
        ("grain", "import jaxrl_llm.data.formats", "grain is not installed: pip install 'jaxrl-llm[data]'"),
        ("pyarrow", "import jaxrl_llm.data.arrow as data; data.read_parquet('rows.parquet')", "jaxrl-llm[data]"),
        ("flax optax", "from jaxrl_llm import load", "flax, optax are not installed: pip install 'jaxrl-llm[train]'"),
    ],
)
def test_what_is_missing_is_told_with_the_extra_that_brings_it(packages, code, message):
    error = without(packages, code).stderr.splitlines()[-1]
    assert error.startswith("jaxrl_llm.extras.MissingExtraError: ") and message in error


def test_the_command_without_its_packages_ends_in_a_line():
    run = without("optax yaml", "from jaxrl_llm.__main__ import main; main(['sft', '--help'])")
    assert (run.returncode, run.stderr.splitlines()) == (
        2,
        ["error: optax, yaml are not installed: pip install 'jaxrl-llm[train]'"],
    )


def test_extras_install_what_they_are_said_to():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    other_name = {"yaml": "pyyaml", "orbax": "orbax-checkpoint"}
    for package, extra in EXTRA_OF.items():
        name = other_name.get(package, package.replace("_", "-"))
        assert any(re.match(rf"{name}\b", wanted) for wanted in extras[extra]), f"{extra} does not install {name}"
        assert extra == "train" or re.search(rf"\b{extra}\b", extras["train"][0])
