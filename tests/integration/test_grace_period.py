"""SIGTERM in phases that do not end: the last whole step is saved all the same, and the run goes on from there."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import pytest

from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.run.checkpoint import Checkpointer
from jaxrl_llm.training.run.metrics import comparable_metrics

SCRIPT = Path(__file__).with_name("tiny_experiment.py")


def stuck(place: str) -> list[str]:
    """Arguments of a run that is stopped in a phase without end."""
    return ["--signal=stuck", f"--signal-at={place}", "--grace-period=0.6"]


WANDB = """
class Run:
    id = "of the test"

    def log(self, line):
        pass

    def define_metric(self, name, **settings):
        pass

    def finish(self):
        print("the run at Weights & Biases has ended")


def init(**settings):
    return Run()
"""


def cut(folder: Path, place: str, *args: str, timeout: float = 120) -> str:
    """What it printed last; it reports to a Weights & Biases that says when it is told of the end."""
    folder.parent.joinpath("wandb.py").write_text(WANDB)
    command = [sys.executable, str(SCRIPT), f"--run-dir={folder}", *stuck(place), *args, "--wandb.project=p"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("SIGTERM: Stopping as soon as this phase ends") == 1
    *said, last = done.stdout.splitlines()
    assert last == "the run at Weights & Biases has ended"
    return said[-1]


@pytest.mark.slow  # test_two_processes.py cuts a phase, too
@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("update:4", 3),  # not on disk, and given to the update
        ("sample:4", 3),
        ("reward:3", 2),  # on disk
        ("evaluate:4", 3),
    ],
)
def test_a_phase_is_cut_and_made_again(tmp_path: Path, tiny: ModuleType, place: str, kept: int) -> None:
    output = cut(tmp_path / "cut", place)
    phase = place.partition(":")[0]
    said = f"Stopped after step {kept} (SIGTERM, in the middle of the phase {phase!r}) and saved. Go on with the same"
    assert said in output
    assert (tmp_path / "cut" / "checkpoints" / str(kept)).is_dir()
    ends = []
    for name in ("cut", "whole"):
        config = dataclasses.replace(tiny.CONFIG, run_dir=str(tmp_path / name), resume=name == "cut")
        trainer = tiny.make(config, make_mesh(MeshConfig(), jax.devices()[:1]))[1]
        trainer.run()
        ends.append((tiny.digest(trainer.state), comparable_metrics(tmp_path / name / "metrics.jsonl")))
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_what_is_saved_of_a_cut_run_has_its_evaluation(tmp_path: Path) -> None:
    flags = ["--training.checkpoint-every=4", "--evaluation.every=1"]
    cut(tmp_path / "cut", "update:3", *flags)
    with Checkpointer(tmp_path / "cut" / "checkpoints", best_metric="eval/accuracy") as saved:
        assert saved.best_step() == saved.latest_step() == 2


@pytest.mark.slow
@pytest.mark.parametrize("gone", [["stdout"], ["stdout", "stderr"]])
def test_a_cut_run_is_saved_where_nobody_reads_its_output(tmp_path: Path, gone: list[str]) -> None:
    """SIGTERM to the whole group ends `tee` before the run."""
    command = [sys.executable, str(SCRIPT), f"--run-dir={tmp_path}", *stuck("update:4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        for name in gone:
            getattr(run, name).close()
        assert run.wait(120) == 0
    assert (tmp_path / "checkpoints" / "3").is_dir()


@pytest.mark.slow
def test_the_first_step_is_cut_with_nothing_to_save(tmp_path: Path) -> None:
    said = cut(tmp_path / "cut", "update:1", "--evaluation.every=0")
    assert "Stopped before the first step, with nothing to save." in said


@pytest.mark.slow
def test_a_phase_is_waited_for_where_there_is_no_grace_period(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        cut(tmp_path / "cut", "update:2", "--grace-period=0", timeout=40)


@pytest.mark.slow
def test_where_nothing_is_ever_saved_a_phase_is_waited_for(tmp_path: Path) -> None:
    """What an ordinary SIGTERM leaves, the model, comes after it."""
    with pytest.raises(subprocess.TimeoutExpired):
        cut(tmp_path / "cut", "update:2", "--training.checkpoint_every=0", timeout=40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "flags", "said"),
    [
        ("aborted", [], "SIGINT"),
        ("aborted", ["--grace-period=0"], "SIGINT"),
        ("both", ["--grace-period=0"], "SIGTERM"),
        ("both", ["--training.checkpoint_every=0", "--grace-period=0.3"], "SIGTERM"),  # nothing is ready to be saved
    ],
)
def test_ctrl_c_is_answered_and_obeyed_in_a_phase_without_end(
    tmp_path: Path, signals: str, flags: list[str], said: str
) -> None:
    command = [sys.executable, str(SCRIPT), f"--run-dir={tmp_path}", f"--signal={signals}", "--signal-at=update:3"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-2:] == [
        f"{said}: Stopping as soon as this phase ends; Ctrl-C again aborts.",
        "interrupted",
    ]
