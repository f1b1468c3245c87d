"""The scripts of docs/, importable as they import each other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="session")
def _docs() -> Iterator[None]:
    """Puts docs/ on the path for its own scripts alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    for name in ("equations", "documented", "generate_objectives", "build_site", "mathml", "run_notebooks"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def equations(_docs: None) -> ModuleType:
    """The translation to LaTeX."""
    return importlib.import_module("equations")


@pytest.fixture(scope="session")
def documented(_docs: None) -> ModuleType:
    """What there is to describe."""
    return importlib.import_module("documented")


@pytest.fixture(scope="session")
def objectives(_docs: None) -> ModuleType:
    """The page."""
    return importlib.import_module("generate_objectives")


@pytest.fixture(scope="session")
def site(_docs: None) -> ModuleType:
    """The site."""
    return importlib.import_module("build_site")


@pytest.fixture(scope="session")
def notebooks(_docs: None) -> ModuleType:
    """What runs the notebooks."""
    return importlib.import_module("run_notebooks")
