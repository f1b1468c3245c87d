"""The benchmark of decoding runs, on a CPU, too, and counts what a token reads."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`decode_bandwidth.py`, whose folder is on the path for its own scripts alone."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("decode_bandwidth")


def test_bytes_and_seconds_make_a_share_of_the_bandwidth(script: ModuleType, capsys):
    sizes = ["--slots=4", "--samples=2", "--prompt-tokens=64", "--written", "32", "128", "--copy-gib=0.01"]
    script.main([*sizes, "--json=-"])
    told, *lines = capsys.readouterr().out.split("RESULT ")
    (record,) = map(json.loads, lines)
    # Two prompts of a page for two neighbours each and, at 80 tokens, two pages of each slot, in float32.
    config = script.SIZES["tiny"]
    token = 2 * config.num_kv_heads * config.head_dim * 4
    assert record["bytes"]["pages"] == config.num_layers * 64 * token * (2 + 4 * 2)
    rate = 1e-9 * sum(record["bytes"].values()) / record["seconds"]["median"]
    assert record["gb_per_second"] == pytest.approx(rate, abs=0.01)
    assert record["fraction_of_copy"] == pytest.approx(rate / record["copy_gb_per_second"], rel=0.01)
    assert "of a copy" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots=6", "--samples=4"], "must be a multiple"),
        (["--written", "9", "8"], "written=(9, 8)"),
        (["--model.path", "some"], "choose a --size"),
    ],
)
def test_texts_that_cannot_be(script: ModuleType, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert message in capsys.readouterr().err.replace("│\n│", "").replace("  ", " ")
