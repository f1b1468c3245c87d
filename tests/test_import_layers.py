"""Imports point downward only, and importing costs no more than it must.

The order of the rooms is the architecture: a room is a top-level module or folder of the package, and may
import itself and the rooms above it in `ROOMS`, never one of its own line or below.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "jaxrl_llm"

ROOMS = (
    ("checks", "collector", "extras", "masking", "sharding"),
    ("device_memory", "logprobs", "records"),
    ("losses",),
    ("advantages", "types"),
    ("models",),
    ("sampling",),
    ("algorithms",),
    ("rewards",),
    ("data",),
    ("training",),
    ("config",),
    ("launch",),
    ("cli",),
    ("api",),
    ("__main__",),
)
"""From the lowest room to the highest; `losses` and `advantages` may not import `types`, which loads flax.

`advantages` is above `losses` for the estimators of the KL: a penalty in the reward is one of them.
"""

ALONE = "rewards"
"""Plain Python on strings, which anyone may take out of here: imports no other room."""

LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
OUTSIDE = ("experiments", "tests")
FOREIGN_FRAMEWORKS = ("torch", "tensorflow")


def source_files() -> list[Path]:
    return sorted((REPOSITORY / PACKAGE).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that `source` imports, at its top or inside a function.

    `from a import b` yields `a.b`, since `b` may be a module. `package` is what relative imports start from.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            if function == "__import__" or function.endswith("import_module"):
                yield node.lineno, str(node.args[0].value)


def objection(importer: str, imported: str) -> str | None:
    """Why the module `importer` may not import `imported`; None if it may."""
    top, _, rest = imported.partition(".")
    if top in FOREIGN_FRAMEWORKS:
        return f"{top} is never loaded by the package"
    if top in OUTSIDE:
        return f"the package knows nothing of {top}/"
    if top != PACKAGE:
        return None
    here, there = importer.partition(".")[2].partition(".")[0], rest.partition(".")[0]
    if not here:
        return None if there == "api" else f"{PACKAGE}/__init__.py imports nothing but what is asked of it"
    if there == here or there not in LEVEL:  # a name of the package itself, such as __version__
        return None
    if here == ALONE:
        return f"{ALONE} imports no other room"
    if LEVEL[there] >= LEVEL[here]:
        return f"{there} is not below {here}"
    return None


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports the others, directly or by way of others."""
    reached = {name: set(imports[name]) for name in imports}
    for middle in imports:  # Warshall: through one more module at a time
        for start in imports:
            if middle in reached[start]:
                reached[start] |= reached[middle]
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in imports}
    return sorted(sorted(group) for group in groups if group)


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_module_has_a_room():
    names = [module_name(path) for path in source_files()]
    rooms = {name.split(".")[1] for name in names if name != PACKAGE}
    assert rooms, f"no modules found under {REPOSITORY / PACKAGE}"
    assert rooms <= set(LEVEL), f"give these their place in ROOMS: {sorted(rooms - set(LEVEL))}"


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_module_imports_only_lower_rooms(path: Path):
    importer = module_name(path)
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    problems = [
        f"{path.relative_to(REPOSITORY)}:{line}: imports {imported}: {why}"
        for line, imported in imported_modules(path.read_text(encoding="utf-8"), package)
        if (why := objection(importer, imported))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("jaxrl_llm.losses.policy", "from jaxrl_llm.types import Rollout"),
        ("jaxrl_llm.losses.policy", "from jaxrl_llm import advantages"),
        ("jaxrl_llm.masking", "def f():\n    import jaxrl_llm.logprobs"),
        ("jaxrl_llm.models.attention", "from ..sampling import decode"),
        ("jaxrl_llm.models.attention", "from .. import sampling"),
        ("jaxrl_llm.rewards.math", "from jaxrl_llm.masking import length_mask"),
        ("jaxrl_llm.training.on_policy", "import importlib\nimportlib.import_module('jaxrl_llm.launch.on_policy')"),
        ("jaxrl_llm.training.on_policy", "from experiments import grpo_arithmetic"),
        ("jaxrl_llm.data.sources", "import tensorflow as tf"),
        ("jaxrl_llm.models.checkpoints.hf", "def f():\n    from torch import nn"),
    ],
)
def test_upward_import_is_found(importer: str, source: str):
    found = [objection(importer, name) for _, name in imported_modules(source, importer.rpartition(".")[0])]
    assert any(found), found


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("jaxrl_llm.losses.policy", "from jaxrl_llm.losses.ratio import importance_ratio"),
        ("jaxrl_llm.models.families.llama", "from ..config import ModelConfig\nfrom .base import Family"),
        ("jaxrl_llm.training.on_policy", "from jaxrl_llm import __version__, data, rewards"),
        ("jaxrl_llm.data.sources", "import tensorflow_datasets as tfds"),
    ],
)
def test_allowed_import_is_let_through(importer: str, source: str):
    found = [objection(importer, name) for _, name in imported_modules(source, importer.rpartition(".")[0])]
    assert found
    assert not any(found), found


def test_no_two_modules_import_each_other():
    paths = {module_name(path): path for path in source_files()}
    del paths[PACKAGE]  # it imports nothing before it is asked
    imports: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for _, imported in imported_modules(path.read_text(encoding="utf-8"), package):
            imports[name] |= {target for target in (imported, imported.rpartition(".")[0]) if target in paths} - {name}
    assert sum(map(len, imports.values())) > len(imports)
    assert not circles(imports), circles(imports)


@pytest.mark.parametrize(
    ("imports", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, [["a", "b"]]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [["a", "b", "c"]]),
    ],
)
def test_circle_is_found(imports: dict[str, set[str]], found: list[list[str]]):
    assert circles(imports) == found


def test_package_itself_loads_nothing():
    assert run_python(f"import sys, {PACKAGE}; print([m for m in ('jax', 'numpy') if m in sys.modules])") == "[]"


def test_pure_functions_load_only_jax_numpy_and_chex():
    heavy = (
        "flax",
        "optax",
        "orbax",
        "transformers",
        "tensorflow",
        "tensorflow_datasets",
        "torch",
        "grain",
        "yaml",
        "rich",
    )
    code = (
        f"import sys, {PACKAGE}.losses, {PACKAGE}.advantages\n"
        f"print(sorted(m for m in sys.modules if m.partition('.')[0] in {heavy!r} + ('{PACKAGE}',)))"
    )
    loaded = ast.literal_eval(run_python(code))
    assert f"{PACKAGE}.losses" in loaded
    rooms = {name.split(".")[1] for name in loaded if name.startswith(f"{PACKAGE}.")}
    assert rooms <= {"masking", "logprobs", "records", "losses", "advantages"}
    assert [name for name in loaded if name.partition(".")[0] in heavy] == []


def test_importing_every_module_starts_no_backend():
    """`jax.distributed.initialize` and `jax_num_cpu_devices` are refused once a backend has started."""
    names = [module_name(path) for path in source_files()]
    code = (
        "import importlib, jax\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(jax.device_count())"
    )
    assert run_python(code) == "3"
