"""The benchmark of long rows runs, on a CPU, too; its memory is of programs that were not run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`long_row.py`, whose folder is on the path for its own scripts alone."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("long_row")


def records(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]


@pytest.mark.slow
def test_update_in_bfloat16_is_timed(script: ModuleType, capsys):
    script.main(
        ["--tokens", "24", "--prompt-tokens", "8", "--repeats", "2", "--model.dtype", "bfloat16", "--json", "-"]
    )
    (record,) = records(capsys)
    assert record["shape"] == {
        "prompts": 1,
        "prompt_tokens": 8,
        "samples": 4,
        "completion_tokens": 4,
        "lengths": "full",
    }
    assert (record["dtype"], record["remat"], record["attention"]) == ("bfloat16", "attention", "auto")
    assert record["seconds"]["n"] == 2
    assert record["tokens_per_second"] == pytest.approx(24 / record["seconds"]["median"], rel=1e-2)
    rate = record["fraction_of_peak"] * record["matmul_peak"]["gflops"]
    assert rate == pytest.approx(record["gflops_per_second"], abs=0.1 + 1e-4 * record["matmul_peak"]["gflops"])


@pytest.mark.slow
def test_memory_without_a_run(script: ModuleType, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(script, "random_params")
    script.main(
        ["--tokens", "512", "1024", "2048", "--prompt-tokens", "128", "--samples", "1", "--repeats", "0", "--json=-"]
    )
    found = records(capsys)
    assert [record["tokens"] for record in found] == [512, 1024, 2048]
    assert "seconds" not in found[0]
    sizes = [record["gib"]["temporaries"] for record in found]
    # Parameters and two moments in float32.
    assert found[0]["gib"]["arguments"] == pytest.approx(3 * 4 * 1_049_728 / 2**30, abs=1e-3)
    assert 0 < sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1023"], "change one of them"),
        (["--tokens", "256"], "change one of them"),
        (["--samples", "0"], "at least 1"),
        (["--model.path", "some"], "choose a --size"),
    ],
)
def test_rows_that_cannot_be(script: ModuleType, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert message in capsys.readouterr().err.replace("│\n│", "").replace("  ", " ")
