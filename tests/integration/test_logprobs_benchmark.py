"""The benchmark of log-probs runs, and what it says of memory and difference is true of what it ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks" / "logprobs.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_small_sizes(tmp_path):
    sizes = {"tokens": 32, "vocabulary": 1000, "width": 16, "memory-tokens": 8192, "memory-vocabulary": 20_000}
    flags = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    ran = run(*flags, "--repeats", "2", "--json", str(tmp_path / "out.jsonl"))
    assert ran.returncode == 0, ran.stderr
    record = json.loads((tmp_path / "out.jsonl").read_text())
    memory, timed = record["memory"], record["time"]
    assert memory["floor_mib"]["head"] == pytest.approx(4 * 20_000 * 16 / 2**20, abs=0.1)
    assert memory["floor_mib"]["one chunk"] == pytest.approx(4 * 8192 * 512 / 2**20, abs=0.1)
    assert memory["mib"]["plain"]["temporaries"] >= 4 * 8192 * 20_000 / 2**20
    assert memory["mib"]["chunked"]["all"] < memory["mib"]["plain"]["all"]
    for name in ("plain", "chunked"):
        assert timed[name]["seconds"]["n"] == 2
        assert 0 < timed[name]["seconds"]["min"] <= timed[name]["seconds"]["median"]
    assert timed["chunked_of_plain"]["seconds"]["median"] > 0
    assert all(difference < 1e-5 for difference in timed["differences"].values())
    assert "chunked / plain: " in ran.stdout


def test_memory_alone_and_sizes_that_cannot_be():
    ran = run("--timed", "none", "--memory-tokens", "64", "--memory-vocabulary", "1000", "--width", "8", "--json", "-")
    assert "time" not in json.loads(ran.stdout.partition("RESULT ")[2])
    assert "tokens=0 must be at least 1" in run("--tokens", "0").stderr
