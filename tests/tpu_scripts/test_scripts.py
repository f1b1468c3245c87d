"""The TPU scripts, each by itself, against a gcloud that plays a slice of two workers on this machine."""

from __future__ import annotations

import json
import shlex
import subprocess
from typing import Any

import pytest

NAMES = ("create", "setup", "launch", "stop", "fetch", "delete")
WHERE = ("--name", "my-tpu", "--zone", "us-east5-a")
REQUIRED = {"create": ("--type", "v6e-8"), "launch": ("--", "experiments/x.py")}


def test_whole_life_of_a_slice(cloud: Any):
    run = cloud.script

    created = run("create", *WHERE, "--type", "v6e-16", "--spot")
    assert created.returncode == 0, created.stderr
    assert [line.split()[-1] for line in created.stdout.splitlines()] == ["PROVISIONING", "ACTIVE"]
    again = run("create", *WHERE, "--type", "v6e-16", "--spot")
    assert again.returncode == 0 and "was asked for before" in again.stdout, again.stderr
    other = run("create", *WHERE, "--type", "v6e-8")
    assert other.returncode == 2 and "'my-tpu' is there and is a v6e-16" in other.stderr

    set_up = run("setup", *WHERE)
    assert set_up.returncode == 0, set_up.stderr
    for index in (0, 1):
        assert (cloud.worker(index) / "jaxrl_llm/kept.txt").read_text() == "first"
        assert "-e .[train,tpu]" in (cloud.worker(index) / "python3_calls").read_text()

    line = ["experiments/x.py", "--a.b=c d", "it's", "$HOME", "*"]
    launched = run("launch", *WHERE, "--", *line)
    assert launched.returncode == 0, launched.stderr
    for index in (0, 1):
        folder, *arguments = json.loads(cloud.wait_for(cloud.worker(index) / "jaxrl_llm/runs/started").read_text())
        assert folder == str(cloud.worker(index) / "jaxrl_llm")
        assert arguments == [line[0], "--distributed", *line[1:]]

    second = run("launch", *WHERE, "--", "experiments/y.py")
    assert second.returncode != 0
    assert "a run is active" in second.stderr

    stopped = run("stop", *WHERE)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("stopped") == 2
    assert (cloud.worker(1) / "jaxrl_llm/runs/saved").exists()
    assert run("stop", *WHERE).stdout.count("the run had ended") == 2

    fetched = run("fetch", *WHERE)
    assert fetched.returncode == 0, fetched.stderr
    assert (cloud.folder / "fetched/my-tpu/runs/launch.log").read_text() == "output of the run\n"

    assert run("delete", *WHERE, "--yes").returncode == 0
    assert cloud.calls()[-1] == [
        *("compute", "tpus", "queued-resources", "delete", "my-tpu"),
        *("--force", "--zone=us-east5-a", "--quiet"),
    ]
    again = run("delete", *WHERE, "--yes")
    assert again.returncode == 0 and "nothing to delete" in again.stdout, again.stderr


def test_a_run_hears_that_its_machine_is_preempted(cloud: Any):
    assert cloud.script("setup", *WHERE).returncode == 0
    assert cloud.script("launch", *WHERE, "--", "experiments/x.py").returncode == 0
    folder = cloud.worker(1) / "jaxrl_llm/runs"
    cloud.wait_for(folder / "started")
    (cloud.folder / "preempted").touch()
    cloud.wait_for(folder / "saved")
    assert cloud.wait_for(folder / "launch.status").read_text() in ("", "stopped\n")  # there before it is written
    assert "this machine is being preempted" in (folder / "launch.log").read_text()


def test_second_setup_replaces_the_files_and_keeps_the_runs(cloud: Any):
    assert cloud.script("setup", *WHERE).returncode == 0
    remote = cloud.worker(0) / "jaxrl_llm"
    (remote / "runs").mkdir()
    (remote / "runs/metrics.jsonl").touch()
    (remote / "runs-like").touch()
    cloud.git("mv", "kept.txt", "moved.txt")

    refused = cloud.script("setup", *WHERE)
    assert refused.returncode == 2
    assert "uncommitted changes" in refused.stderr

    cloud.git("commit", "-qm", "second")
    assert cloud.script("setup", *WHERE).returncode == 0
    assert sorted(path.name for path in remote.iterdir()) == ["experiments", "moved.txt", "runs", "tpu_scripts"]
    assert (remote / "runs/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_create_asks_for_the_runtime_of_the_type(cloud: Any, accelerator: str, runtime: str):
    options = ("--project", "mine", "--reserved", "--valid-for", "6h")
    assert cloud.script("create", *WHERE, "--type", accelerator, *options).returncode == 0
    assert cloud.calls()[1] == [
        *("compute", "tpus", "queued-resources", "create", "my-tpu", "--node-id=my-tpu"),
        *(f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"),
        *("--reserved", "--valid-until-duration=6h", "--zone=us-east5-a", "--project=mine", "--quiet"),
    ]


def test_create_fails_when_the_request_fails(cloud: Any):
    (cloud.folder / "future").write_text("PROVISIONING FAILED")
    for _ in range(2):  # and what has failed before is told, not asked for again
        failed = cloud.script("create", *WHERE, "--type", "v6e-8")
        assert failed.returncode == 2
        assert "is FAILED" in failed.stderr and "run delete.sh and ask again" in failed.stderr
    assert [call[3] for call in cloud.calls()].count("create") == 1


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_prints_commands_and_runs_none(cloud: Any, name: str):
    result = cloud.script(name, *WHERE, "--dry-run", *REQUIRED.get(name, ()))
    assert result.returncode == 0, result.stderr
    assert cloud.calls() == []
    assert not (cloud.folder / "fetched").exists()
    # bash reads the printed line back into the very arguments.
    echo = 'gcloud() { printf "%s\\0" "$@"; }; git() { :; }; mkdir() { :; };'
    told = subprocess.run(["bash", "-c", echo + result.stdout], capture_output=True, text=True, check=True)
    words = told.stdout.split("\0")
    assert words[:2] == ["compute", "tpus"]
    assert "--zone=us-east5-a" in words


@pytest.mark.parametrize("name", [*NAMES, "run", "xpk"])
def test_help_needs_nothing_else(cloud: Any, name: str):
    result = cloud.script(name, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Usage: {name}.sh")
    assert "--dry-run" in result.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("create --zone us-east5-a --type v6e-8", "--name is missing"),
        ("create --name my-tpu --type v6e-8", "--zone is missing"),
        ("create --name My_TPU --zone us-east5-a", "--name 'My_TPU'"),
        ("create --name my-tpu --zone nowhere", "--zone 'nowhere' is no zone"),
        ("create --name my-tpu --zone us-east5-a", "--type is missing"),
        ("create --name my-tpu --zone us-east5-a --type v6e", "--type 'v6e' is no accelerator type"),
        ("create --name my-tpu --zone us-east5-a --type v99-8", "name one with --runtime"),
        ("create --name my-tpu --zone us-east5-a --type v6e-8 --spot --reserved", "exclude each other"),
        ("create --name my-tpu --zone us-east5-a --type v6e-8 --valid-for soon", "--valid-for 'soon'"),
        ("create --name my-tpu --zone us-east5-a --typ v6e-8", "unknown argument '--typ'"),
        ("setup --name my-tpu --zone us-east5-a --commit nonsense", "--commit 'nonsense' is no commit"),
        ("setup --name my-tpu --zone us-east5-a --python three", "--python 'three'"),
        ("launch --name my-tpu --zone us-east5-a", "nothing to run"),
        ("launch --name my-tpu --zone us-east5-a -- --a.b=c", "'--a.b=c' is neither jaxrl-llm nor a Python script"),
        ("launch --name my-tpu --zone us-east5-a -- python -m jaxrl_llm plan", "'jaxrl-llm plan' is nothing"),
        ("stop --name my-tpu --zone us-east5-a --wait long", "--wait 'long'"),
        ("fetch --name my-tpu --zone us-east5-a --to --from", "--to needs a value"),
        ("fetch --name my-tpu --zone us-east5-a -- more", "unknown argument 'more'"),
        ("delete --name my-tpu --zone us-east5-a", "say --yes"),
    ],
)
def test_wrong_arguments_are_refused(cloud: Any, line: str, message: str):
    result = cloud.script(*shlex.split(line))
    assert result.returncode == 2
    assert message in result.stderr
    assert cloud.calls() == []
