"""Which layers are scanned together."""

from __future__ import annotations

import pytest

from jaxrl_llm.models.config import LayerKind
from jaxrl_llm.models.stack import Run, runs

KINDS = {letter: LayerKind(window=number) for number, letter in enumerate("abcdef", start=1)}


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("a", [(0, 1, 1)]),
        ("aaaa", [(0, 1, 4)]),
        ("abab", [(0, 2, 2)]),
        ("abc", [(0, 3, 1)]),
        ("aaaaab" * 4 + "aa", [(0, 6, 4), (24, 1, 2)]),  # Gemma 3 of 1B
        ("a" * 21 + "b" * 7, [(0, 1, 21), (21, 1, 7)]),  # Qwen2 with windows in its upper layers
        ("a" + "bcbcbc", [(0, 1, 1), (1, 2, 3)]),
        ("ababa", [(0, 1, 1), (1, 2, 2)]),
    ],
)
def test_runs(letters, expected):
    kinds = tuple(KINDS[letter] for letter in letters)
    found = runs(kinds)
    assert found == tuple(Run(*run) for run in expected)
    assert sum((kinds[run.first : run.first + run.period] * run.repeats for run in found), ()) == kinds
