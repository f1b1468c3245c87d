"""Runs that are killed, and go on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from jaxrl_llm.training.run.metrics import comparable_metrics

SCRIPT = Path(__file__).with_name("tiny_experiment.py")
STEPS = 6


def run(folder: Path, *args: str, status: int = 0) -> str:
    """Runs the experiment in a process of its own; what it printed on standard output."""
    command = [sys.executable, str(SCRIPT), f"--run-dir={folder}", f"--training.steps={STEPS}", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def digest(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("digest "))


def saved(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_killed_runs_end_bit_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = run(whole)

    run(killed, "--signal=SIGKILL", "--signal-at=update:4", status=-signal.SIGKILL)
    assert comparable_metrics(killed / "metrics.jsonl")[-1]["step"] == 3  # one step more than was saved
    run(killed, "--resume", "--signal=SIGKILL", "--signal-at=checkpoint:4", status=-signal.SIGKILL)
    unfinished = saved(killed) - {"2"}
    assert len(unfinished) == 1 and unfinished.pop().startswith("4."), saved(killed)

    output = run(killed, "--resume")
    assert digest(output) == digest(expected)
    assert comparable_metrics(killed / "metrics.jsonl") == comparable_metrics(whole / "metrics.jsonl")
    assert (killed / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    # The summary compares with the very first evaluation, not with that of the last process.
    assert [line for line in output.splitlines() if "→" in line] == [
        line for line in expected.splitlines() if "→" in line
    ]
