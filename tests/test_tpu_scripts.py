"""The TPU scripts against a gcloud that plays a slice of two workers on this machine."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "tpu_scripts"
NAMES = ("create", "setup", "launch", "stop", "fetch", "delete")
WHERE = ("--name", "my-tpu", "--zone", "us-east5-a")
REQUIRED = {"create": ("--type", "v6e-8"), "launch": ("--", "experiments/x.py")}

FAKE_GCLOUD = """\
#!{python}
# Writes down its arguments; copies and runs commands in one home folder per worker, as ssh and scp would.
import json, os, pathlib, shutil, subprocess, sys

cloud = pathlib.Path({cloud!r})
arguments = sys.argv[1:]
with open(cloud / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
flags = dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))
words = [a for a in arguments if not a.startswith("--")][2:]  # after: compute tpus
workers = ["0", "1"] if flags.get("worker") == "all" else [flags.get("worker")]
if words[:2] == ["queued-resources", "describe"]:
    first, *rest = (cloud / "states").read_text().split()
    (cloud / "states").write_text(" ".join(rest or [first]))
    print(first)
elif words[:2] == ["tpu-vm", "ssh"]:
    for worker in workers:
        home = cloud / ("worker" + worker)
        path = str(cloud / "worker_bin") + ":" + os.environ["PATH"]
        environment = dict(os.environ, HOME=str(home), PATH=path)
        subprocess.run(["bash", "-c", flags["command"]], env=environment, cwd=home, check=True)
elif words[:2] == ["tpu-vm", "scp"]:
    source, destination = words[2:]
    for worker in workers:
        home = cloud / ("worker" + worker)
        if source.startswith("my-tpu:"):
            source = home / source.partition(":")[2]
            shutil.copytree(source, pathlib.Path(destination) / source.name, dirs_exist_ok=True)
        else:
            shutil.copy(source, home / destination.partition(":")[2])
"""

# The workers' own python3: it makes the environment, whose python is the next script.
WORKER_PYTHON3 = """\
#!/bin/bash
echo "$*" >> ~/python3_calls
if [[ "$*" == *"uv venv"* ]]; then
  environment=${@: -1}
  mkdir -p "$environment/bin" && cp "$(dirname "$0")/environment_python" "$environment/bin/python"
fi
"""

# Stands for a training run: writes down where it is and what it was given, and saves upon SIGTERM.
ENVIRONMENT_PYTHON = """\
#!{python}
import json, os, pathlib, signal, sys, time

if sys.argv[1] == "-c":
    sys.exit(0)
def save(*_):
    pathlib.Path("runs/saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("output of the run", flush=True)
pathlib.Path("runs/started.tmp").write_text(json.dumps([os.getcwd(), *sys.argv[1:]]))
os.rename("runs/started.tmp", "runs/started")
time.sleep(30)
"""


@dataclass
class Cloud:
    """A folder that holds the fake gcloud's records, its two workers, and a clone with the scripts."""

    folder: Path

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    def worker(self, index: int) -> Path:
        return self.folder / f"worker{index}"

    def calls(self) -> list[list[str]]:
        records = self.folder / "calls.jsonl"
        return [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []

    def script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.repository / "tpu_scripts" / f"{name}.sh", *arguments],
            cwd=self.folder,
            env=dict(os.environ, PATH=f"{self.folder / 'bin'}:{os.environ['PATH']}", POLL_SECONDS="0"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def git(self, *arguments: str) -> None:
        identity = ("-c", "user.name=tester", "-c", "user.email=tester@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=self.repository, check=True, capture_output=True)


def write_executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    cloud = Cloud(tmp_path)
    write_executable(tmp_path / "bin" / "gcloud", FAKE_GCLOUD.format(python=sys.executable, cloud=str(tmp_path)))
    write_executable(tmp_path / "worker_bin" / "python3", WORKER_PYTHON3)
    write_executable(tmp_path / "worker_bin" / "environment_python", ENVIRONMENT_PYTHON.format(python=sys.executable))
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    shutil.copytree(SCRIPTS, cloud.repository / "tpu_scripts")
    (cloud.repository / "kept.txt").write_text("first")
    cloud.git("init", "-q")
    cloud.git("add", ".")
    cloud.git("commit", "-qm", "first")
    for index in (0, 1):
        cloud.worker(index).mkdir()
    return cloud


def wait_for(path: Path) -> Path:
    for _ in range(200):
        if path.exists():
            return path
        time.sleep(0.05)
    raise AssertionError(f"{path} has not appeared in 10 s")


def test_whole_life_of_a_slice(cloud: Cloud):
    run = cloud.script

    created = run("create", *WHERE, "--type", "v6e-16", "--spot")
    assert created.returncode == 0, created.stderr
    assert [line.split()[-1] for line in created.stdout.splitlines()] == [
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
    ]

    set_up = run("setup", *WHERE)
    assert set_up.returncode == 0, set_up.stderr
    for index in (0, 1):
        assert (cloud.worker(index) / "jaxrl_llm/kept.txt").read_text() == "first"
        assert "-e .[train,tpu]" in (cloud.worker(index) / "python3_calls").read_text()

    line = ["experiments/x.py", "--a.b=c d", "it's", "$HOME", "*"]
    launched = run("launch", *WHERE, "--", *line)
    assert launched.returncode == 0, launched.stderr
    for index in (0, 1):
        folder, *arguments = json.loads(wait_for(cloud.worker(index) / "jaxrl_llm/runs/started").read_text())
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


def test_second_setup_replaces_the_files_and_keeps_the_runs(cloud: Cloud):
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
    assert sorted(path.name for path in remote.iterdir()) == ["moved.txt", "runs", "tpu_scripts"]
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
def test_create_asks_for_the_runtime_of_the_type(cloud: Cloud, accelerator: str, runtime: str):
    options = ("--project", "mine", "--reserved", "--valid-for", "6h")
    assert cloud.script("create", *WHERE, "--type", accelerator, *options).returncode == 0
    assert cloud.calls()[0] == [
        *("compute", "tpus", "queued-resources", "create", "my-tpu", "--node-id=my-tpu"),
        *(f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"),
        *("--reserved", "--valid-until-duration=6h", "--zone=us-east5-a", "--project=mine", "--quiet"),
    ]


def test_create_fails_when_the_request_fails(cloud: Cloud):
    (cloud.folder / "states").write_text("PROVISIONING FAILED")
    failed = cloud.script("create", *WHERE, "--type", "v6e-8")
    assert failed.returncode == 2
    assert "is FAILED" in failed.stderr


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_prints_commands_and_runs_none(cloud: Cloud, name: str):
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


@pytest.mark.parametrize("name", NAMES)
def test_help_needs_nothing_else(cloud: Cloud, name: str):
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
        ("launch --name my-tpu --zone us-east5-a -- --a.b=c", "'--a.b=c' is no Python script"),
        ("stop --name my-tpu --zone us-east5-a --wait long", "--wait 'long'"),
        ("fetch --name my-tpu --zone us-east5-a --to --from", "--to needs a value"),
        ("fetch --name my-tpu --zone us-east5-a -- more", "unknown argument 'more'"),
        ("delete --name my-tpu --zone us-east5-a", "say --yes"),
    ],
)
def test_wrong_arguments_are_refused(cloud: Cloud, line: str, message: str):
    result = cloud.script(*shlex.split(line))
    assert result.returncode == 2
    assert message in result.stderr
    assert cloud.calls() == []
