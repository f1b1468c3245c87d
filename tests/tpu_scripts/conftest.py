"""A gcloud that plays a slice of two workers on this machine, for the TPU scripts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "tpu_scripts"
WHERE = ("--name", "my-tpu", "--zone", "us-east5-a")

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
def renew():
    for worker in ("worker0", "worker1"):
        shutil.rmtree(cloud / worker, ignore_errors=True)
        (cloud / worker).mkdir()

def refuse(why):
    sys.exit("ERROR: (gcloud." + ".".join(arguments[:4]) + ") " + why)

resource = "Resource 'projects/mine/locations/us-east5-a/queuedResources/my-tpu'"
there = (cloud / "states").exists()

def become(states):  # at once, where Ctrl-C ends this process or another one reads
    new = cloud / f"states.{{os.getpid()}}"
    new.write_text(states)
    new.rename(cloud / "states")

if words[:2] == ["queued-resources", "create"]:
    if there:
        refuse("ALREADY_EXISTS: " + resource + " already exists")
    renew()
    become((cloud / "future").read_text())
    (cloud / "type").write_text(flags["accelerator-type"])
elif words[0] == "queued-resources" and not there:
    refuse("NOT_FOUND: " + resource + " was not found")
elif words[:2] == ["queued-resources", "delete"]:
    (cloud / "states").unlink()
elif "acceleratorType" in flags.get("format", ""):
    print((cloud / "type").read_text())
elif words[:2] == ["queued-resources", "describe"]:
    first, *rest = (cloud / "states").read_text().split()
    become(" ".join(rest or [first]))
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

# The machines' metadata: whether they are preempted, told when that changes.
WORKER_CURL = """\
#!/bin/bash
[[ "${{@: -1}}" == http://metadata.google.internal/*/instance/preempted?wait_for_change=true ]] || exit 6
until [ -e {cloud}/preempted ]; do sleep 0.1; done
echo TRUE
"""

# Stands for a training run: writes down where it is and what it was given, and does what the plan says for this launch:
# wait until SIGTERM and save, end, fail, refuse, or be taken away with the slice.
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
cloud, worker = pathlib.Path({cloud!r}), pathlib.Path.home().name
launches = cloud / ("launches_" + worker)
with open(launches, "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
for argument in sys.argv:
    if argument.startswith("--run-dir=/"):
        folder = pathlib.Path(argument[10:])
        folder.mkdir(exist_ok=True)
        (folder / "config.json").touch()
plan = (cloud / "plan").read_text().split() if (cloud / "plan").exists() else ["wait"]
doing = plan[min(len(launches.read_text().splitlines()), len(plan)) - 1]
if doing == "wait":
    time.sleep(120)
    sys.exit("nobody stopped it")
if doing == "taken":
    time.sleep(0.5)
    (cloud / "states").write_text("SUSPENDED")
    os.killpg(0, signal.SIGKILL)
sys.exit(dict(end=0, fail=1, refuse=2)[doing])
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
        process = self.begin(name, *arguments)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def begin(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            # What runs in the background ignores Ctrl-C, and so would all that it starts.
            ["env", "--default-signal=INT", self.repository / "tpu_scripts" / f"{name}.sh", *arguments],
            cwd=self.folder,
            env=dict(os.environ, PATH=f"{self.folder / 'bin'}:{os.environ['PATH']}", POLL_SECONDS="0.1"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @staticmethod
    def wait_for(path: Path) -> Path:
        for _ in range(200):
            if path.exists():
                return path
            time.sleep(0.05)
        raise AssertionError(f"{path} has not appeared in 10 s")

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
    write_executable(
        tmp_path / "worker_bin" / "environment_python",
        ENVIRONMENT_PYTHON.format(python=sys.executable, cloud=str(tmp_path)),
    )
    write_executable(tmp_path / "worker_bin" / "curl", WORKER_CURL.format(cloud=str(tmp_path)))
    (tmp_path / "future").write_text("PROVISIONING ACTIVE")
    shutil.copytree(SCRIPTS, cloud.repository / "tpu_scripts")
    (cloud.repository / "kept.txt").write_text("first")
    (cloud.repository / "experiments").mkdir()
    (cloud.repository / "experiments/x.py").touch()
    cloud.git("init", "-q")
    cloud.git("add", ".")
    cloud.git("commit", "-qm", "first")
    for index in (0, 1):
        cloud.worker(index).mkdir()
    return cloud
