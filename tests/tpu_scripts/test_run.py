"""The script that makes a whole run, on slices that are taken away, do not answer, cost too much."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "tpu_scripts"
WHERE = ("--name", "my-tpu", "--zone", "us-east5-a")


def line(cloud: Any, *options: str, hours: str = "1") -> tuple[str, ...]:
    """What is given to run.sh."""
    run = ("--", "jaxrl-llm", "grpo", f"--run-dir={cloud.folder / 'shared'}", "--a.b=c d")
    return (*WHERE, "--type", "v6e-16", "--spot", "--hours", hours, *options, *run)


def launches(cloud: Any, worker: int = 0) -> list[str]:
    file: Path = cloud.folder / f"launches_worker{worker}"
    return file.read_text().splitlines() if file.exists() else []


def requests(cloud: Any) -> list[str]:
    """The creations and deletions that were asked for."""
    return [call[3] for call in cloud.calls() if call[2] == "queued-resources" and call[3] != "describe"]


def test_a_slice_that_is_taken_away_is_asked_for_again_and_the_run_goes_on(cloud: Any) -> None:
    (cloud.folder / "plan").write_text("taken end")
    done = cloud.script("run", *line(cloud, "--prepare", "touch ~/mounted"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert requests(cloud) == ["create", "delete", "create", "delete"]
    for worker in (0, 1):
        first, second = launches(cloud, worker)
        assert first == f"-m jaxrl_llm grpo --distributed --run-dir={cloud.folder / 'shared'} --a.b=c d"
        assert second == f"{first} --resume"
        assert (cloud.worker(worker) / "mounted").exists()
    assert "is SUSPENDED: asks for it again" in done.stdout and "the run has ended" in done.stdout
    assert "output of the run" in done.stdout
    assert (cloud.folder / "fetched/my-tpu/runs/launch.status").read_text() == "0\n"


def test_ctrl_c_leaves_the_run_alone_and_the_same_command_attends_to_it_again(cloud: Any) -> None:
    begun = cloud.begin("run", *line(cloud))
    cloud.wait_for(cloud.worker(0) / "jaxrl_llm/runs/started")
    assert begun.poll() is None
    os.killpg(begun.pid, signal.SIGINT)
    out, err = begun.communicate(timeout=60)
    assert begun.returncode == 130 and "COSTS ON" in out, out + err
    assert requests(cloud) == ["create"]
    other = cloud.script("run", *line(cloud, "--type", "v6e-8"))  # of two the last one
    assert other.returncode == 2 and "'my-tpu' is there and is a v6e-16" in other.stderr

    again = cloud.begin("run", *line(cloud))
    assert cloud.script("stop", *WHERE).returncode == 0
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0 and "the run was stopped" in out, out + err
    assert requests(cloud) == ["create", "delete"] and len(launches(cloud)) == 1
    assert (cloud.folder / "fetched/my-tpu/runs/saved").exists()


def test_when_the_hours_are_spent_the_run_saves_and_the_slice_goes(cloud: Any) -> None:
    done = cloud.script("run", *line(cloud, hours="0.0003"))
    assert done.returncode == 3 and "the 0.0003 hours are spent" in done.stdout, done.stdout + done.stderr
    assert requests(cloud) == ["create", "delete"]
    if launches(cloud):
        assert (cloud.folder / "fetched/my-tpu/runs/saved").exists()


def test_the_hours_stand_still_while_there_is_no_slice() -> None:
    cut = f"""eval "$(sed -n '/^have_slice()/,/^}}/p' {SCRIPTS}/run.sh)" """
    stand_ins = "state() { echo $there; }; script() { there=ACTIVE; SECONDS=$((SECONDS + 5000)); }; CREATE=(--spot)"
    run = "there=ACTIVE BUDGET=100 DEADLINE=; have_slice; first=$DEADLINE; have_slice; echo $((DEADLINE - first))"
    away = "there=NONE; have_slice; echo $((DEADLINE - first))"
    told = subprocess.run(["bash", "-euc", "\n".join((cut, stand_ins, run, away))], capture_output=True, text=True)
    assert [int(words) // 10 for words in told.stdout.split()] == [0, 500], told.stderr


def test_a_slice_that_cannot_be_set_up_goes_and_costs_nothing_more(cloud: Any) -> None:
    (cloud.folder / "worker_bin/python3").write_text("#!/bin/bash\necho no network >&2; exit 1\n")
    done = cloud.script("run", *line(cloud))
    assert done.returncode == 1 and "attempt 3 of 3" in done.stdout, done.stdout + done.stderr
    assert requests(cloud) == ["create", "delete"] and not launches(cloud)


@pytest.mark.parametrize(
    ("plan", "status", "times", "told"),
    [
        ("fail end", 0, 2, "launched again (1 of 1)"),
        pytest.param("fail fail", 1, 2, "the run failed 2 times", marks=pytest.mark.slow),
        ("refuse", 2, 1, "refuses its settings"),
    ],
)
def test_a_run_that_fails_is_launched_again_a_few_times(
    cloud: Any, plan: str, status: int, times: int, told: str
) -> None:
    (cloud.folder / "plan").write_text(plan)
    done = cloud.script("run", *line(cloud, "--failures", "1"))
    assert (done.returncode, len(launches(cloud))) == (status, times), done.stdout + done.stderr
    assert told in done.stdout and requests(cloud) == ["create", "delete"]


def test_what_another_run_uses_is_left_to_it(cloud: Any) -> None:
    assert cloud.script("create", *WHERE, "--type", "v6e-16").returncode == 0
    assert cloud.script("setup", *WHERE).returncode == 0
    assert cloud.script("launch", *WHERE, "--", "experiments/y.py").returncode == 0
    refused = cloud.script("run", *line(cloud))
    assert refused.returncode == 2 and "another run is active" in refused.stderr
    assert requests(cloud) == ["create"]
    cloud.script("stop", *WHERE)


def test_dry_run_prints_every_command_and_runs_none(cloud: Any) -> None:
    told = cloud.script("run", *line(cloud, "--dry-run", "--prepare", "mount it"))
    assert told.returncode == 0, told.stderr
    assert not cloud.calls()
    echo = 'gcloud() { printf "%s %s\\n" "$3" "$4"; }; git() { :; }; mkdir() { :; };'
    commands = subprocess.run(["bash", "-c", echo + told.stdout], capture_output=True, text=True, check=True).stdout
    asked, there = ["queued-resources create", "queued-resources describe"], ["tpu-vm ssh", "tpu-vm scp"]
    set_up = [there[1], there[0]]
    assert commands.splitlines() == [*asked, *set_up, *there[:1] * 3, there[1], "queued-resources delete"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--type v6e-8 -- /x.py --run-dir=/a", "--hours ''"),
        ("--type v6e-8 --hours soon -- /x.py --run-dir=/a", "--hours 'soon'"),
        ("--hours 1 -- experiments/x.py --run-dir=/a", "--type is missing"),
        ("--type v6e-8 --hours 1 --python 3 -- experiments/x.py --run-dir=/a", "--python '3'"),
        ("--type v6e-8 --hours 1 -- jaxrl-llm grpo --run-dir runs/a", "say --run-dir=/FOLDER"),
        ("--type v6e-8 --hours 1 -- jaxrl-llm grpo --run-dir=gs://a/b", "mount the bucket"),
        ("--type v6e-8 --hours 1 -- jaxrl-llm evaluate --run-dir=/a", "evaluate has no run folder"),
        ("--type v6e-8 --hours 1 -- jaxrl-llm gpro --run-dir=/a", "'jaxrl-llm gpro' is nothing"),
        ("--type v6e-8 --hours 1 -- x --run-dir=/a", "'x' is neither jaxrl-llm nor a Python script"),
        ("--type v6e-8 --hours 1 -- y.py --run-dir=/a", "'y.py' is not in commit HEAD"),
        ("--type v6e-8 --hours 1 -- jaxrl-llm grpo --resume=/a --rewards math r.py:f", "'r.py' is not in commit HEAD"),
    ],
)
def test_what_cannot_work_is_refused_before_it_costs(cloud: Any, options: str, message: str) -> None:
    refused = cloud.script("run", *WHERE, *options.split())
    assert refused.returncode == 2 and message in refused.stderr
    assert not cloud.calls()
