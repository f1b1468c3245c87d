"""Every golden number of the algorithms' specification is compared with somewhere in the tests."""

from __future__ import annotations

import ast
import json
from pathlib import Path

TESTS = Path(__file__).parent


def string_literals(folder: Path) -> set[str]:
    """All strings that the Python files of a folder and those below it contain as literals."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_string_literals(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "test_a.py").write_text('close(x, examples["a.b"])  # examples["comment"]\n')
    assert string_literals(tmp_path) == {"a.b"}


def test_every_golden_number_is_used():
    golden = json.loads((TESTS / "algorithm_examples.json").read_text())
    assert len(golden) == 272
    missing = sorted(set(golden) - string_literals(TESTS))
    assert not missing, f"{len(missing)} golden numbers that no test names: {' '.join(missing)}"
