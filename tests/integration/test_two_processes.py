"""Two processes, as two hosts of a pod: the same run as one process, and the same end for both."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from types import ModuleType

import jax
import pytest

from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.run.completions import read_completions
from jaxrl_llm.training.run.metrics import comparable_metrics

SCRIPT = """
import dataclasses, json, os, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from jaxrl_llm.training.run import distributed

address, process, here, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
sys.path.insert(0, here)
import tiny_experiment as tiny

distributed.initialize(address, 2, process)

def run(name, *args):
    try:
        mesh = ["--mesh.data=2", "--mesh.fsdp=2"]
        tiny.main([f"--run-dir={folder}/{name}", *mesh, "--update.tokens-per-micro-batch=16", *args])
        return 0
    except SystemExit as ended:
        return ended.code

out = {"whole": run("whole")}
lean = "--evaluation.every=0"
calls = 0

def shared_characters(prompts, completions, answer, log_extra):
    global calls
    log_extra("read by", [f"{process}: {text}" for text in completions])
    calls += 1
    if process == 1 and calls == 3:
        raise KeyError("only here")
    return tiny.shared_characters(prompts, completions, answer)

tiny.CONFIG = dataclasses.replace(tiny.CONFIG, rewards=(shared_characters,))
out["failed"] = run("failed", lean)
signal = ["--signal=SIGTERM", "--signal-at=sample:4"] if process == 1 else []
out["resumed"] = run("failed", lean, "--resume", *signal)
print(json.dumps(out), flush=True)
# Stopped in a phase without end of one process, while the other one waits for it.
stuck = ["--signal=stuck", "--signal-at=reward:4"] if process == 1 else []
run("cut", lean, "--grace-period=0.003", *stuck)
"""


@pytest.fixture(scope="module")
def outcome(
    two_processes, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """The folder of the runs, and how the two processes ended."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, two_processes(SCRIPT, str(Path(__file__).parent), str(folder), timeout=240)


def test_both_end_alike(outcome) -> None:
    _, (first, second) = outcome
    for process in (first, second):
        assert process.returncode == 0, process.stderr
        assert json.loads(process.stdout[process.stdout.index('{"whole') :].splitlines()[0]) == {
            "whole": 0,
            "failed": 2,
            "resumed": 0,
        }
    assert "step 4/4" in first.stdout and "step 4/4" not in second.stdout


def test_metrics_are_those_of_one_process(outcome, tiny: ModuleType, tmp_path: Path) -> None:
    """And packed rows give those of prompts with their padding."""
    folder, _ = outcome
    config = dataclasses.replace(tiny.CONFIG, run_dir=str(tmp_path))
    tiny.make(config, make_mesh(MeshConfig(), jax.devices()[:1]))[1].run()
    expected = comparable_metrics(tmp_path / "metrics.jsonl")
    actual = comparable_metrics(folder / "whole" / "metrics.jsonl")
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for line, other in zip(expected, actual, strict=True):
        assert other == pytest.approx(line, rel=2e-3, abs=2e-5)
    told, same = (list(read_completions(place)) for place in (tmp_path, folder / "whole"))
    assert len(told) == 4 * 16 + 3 * 5
    for line, other in zip(told, same, strict=True):
        for name in ("step", "kind", "row", "sample", "completion", "rewards", "finished"):
            assert other[name] == line[name]
        if line["kind"] == "train":
            assert other["advantage"] == pytest.approx(line["advantage"], rel=2e-3, abs=2e-5)


def test_what_each_tells_of_its_samples_stands_beside_them(outcome) -> None:
    rows = list(read_completions(outcome[0] / "failed"))
    assert [row["step"] for row in rows] == [step for step in (1, 2, 3) for _ in range(16)]
    for number, row in enumerate(rows):
        assert row["extra"] == {"read by": f"{number % 2}: {row['completion']}"}


SPLIT_TIME = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from jaxrl_llm.training.run import distributed

address, process, here, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
sys.path.insert(0, here)
import tiny_experiment as tiny

distributed.initialize(address, 2, process)
packed = "--update.tokens-per-micro-batch=23"
tiny.main([f"--run-dir={folder}", "--mesh.fsdp=1", "--mesh.context=4", packed, *sys.argv[5:]])
"""


@pytest.mark.slow
def test_rows_whose_time_two_processes_split(two_processes, tiny: ModuleType, tmp_path: Path) -> None:
    lean = "--evaluation.every=0"
    for process in two_processes(SPLIT_TIME, str(Path(__file__).parent), str(tmp_path / "two"), lean, timeout=240):
        assert process.returncode == 0, process.stderr
    evaluation = dataclasses.replace(tiny.CONFIG.evaluation, every=0)
    config = dataclasses.replace(tiny.CONFIG, run_dir=str(tmp_path / "one"), evaluation=evaluation)
    tiny.make(config, make_mesh(MeshConfig(), jax.devices()[:1]))[1].run()
    pairs = zip(*(comparable_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")), strict=True)
    for line, other in pairs:
        assert other == pytest.approx(line, rel=2e-3, abs=2e-5)


MIXTURE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from jaxrl_llm.training.run import distributed

address, process, here, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
sys.path.insert(0, here)
import tiny_experiment as tiny

distributed.initialize(address, 2, process)
tiny.SIZES |= tiny.MIXTURE
tiny.main([f"--run-dir={folder}", *sys.argv[5:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [("--mesh.expert=4", "--mesh.fsdp=1"), ("--mesh.expert=2", "--mesh.context=2", "--mesh.fsdp=1")],
    ids=["expert", "expert and context"],
)
def test_experts_that_two_processes_hold(
    mesh: tuple[str, ...], two_processes, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are exchanged between the processes; the metrics are those of one device, and so are the experts."""
    args = *mesh, "--evaluation.every=0", "--algorithm.routing=replayed"
    for process in two_processes(MIXTURE, str(Path(__file__).parent), str(tmp_path / "two"), *args, timeout=240):
        assert process.returncode == 0, process.stderr
    monkeypatch.setattr(tiny, "SIZES", tiny.SIZES | tiny.MIXTURE)
    evaluation = dataclasses.replace(tiny.CONFIG.evaluation, every=0)
    algorithm = dataclasses.replace(tiny.CONFIG.algorithm, routing="replayed")
    config = dataclasses.replace(tiny.CONFIG, run_dir=str(tmp_path / "one"), evaluation=evaluation, algorithm=algorithm)
    policy, trainer = tiny.make(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert policy.model.config.experts == tiny.MIXTURE["experts"]
    trainer.run()
    pairs = zip(*(comparable_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")), strict=True)
    for line, other in pairs:
        assert "sampling/routing_mismatch" in line
        assert other == pytest.approx(line, rel=2e-3, abs=2e-5)


def test_a_reward_that_fails_in_one_ends_both_after_saving(outcome) -> None:
    _, (first, second) = outcome
    assert "error: a reward function failed in another process" in first.stderr
    assert "error: the reward function 'shared_characters' raised KeyError on 8 samples: 'only here'" in second.stderr
    assert "Failed after step 2 and saved." in first.stdout


def test_both_resume_and_a_signal_to_one_stops_both(outcome) -> None:
    folder, (first, second) = outcome
    assert "Stopped after step 3 (another process was stopped) and saved." in first.stdout
    assert "SIGTERM" in second.stderr and "SIGTERM" not in first.stderr
    whole, resumed = (comparable_metrics(folder / name / "metrics.jsonl") for name in ("whole", "failed"))
    assert resumed == [line for line in whole if "reward" in line][:3]
    assert {path.name for path in (folder / "failed" / "checkpoints").iterdir()} == {"3"}  # the one that is kept


def test_a_phase_that_does_not_end_in_one_is_cut_in_both(outcome, tiny: ModuleType) -> None:
    folder, (first, second) = outcome
    said = "Stopped after step 3 (another process was stopped, in the middle of the phase 'reward') and saved."
    assert said in first.stdout.splitlines()[-1]
    assert second.stderr.count("SIGTERM: Stopping") == 2
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    evaluation = dataclasses.replace(tiny.CONFIG.evaluation, every=0)
    config = dataclasses.replace(tiny.CONFIG, run_dir=str(folder / "cut"), resume=True, evaluation=evaluation)
    tiny.make(config, mesh)[1].run()
    expected = [line for line in comparable_metrics(folder / "whole" / "metrics.jsonl") if "reward" in line]
    actual = comparable_metrics(folder / "cut" / "metrics.jsonl")
    assert [line["step"] for line in actual] == [1, 2, 3, 4]
    assert actual[:3] == expected[:3]
    assert actual[3] == pytest.approx(expected[3], rel=2e-3, abs=2e-5)
