"""What is handed to XPK and to SkyPilot: the command, and what it does on a host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPTS = Path(__file__).resolve().parents[2] / "tpu_scripts"
WHERE = ("--cluster", "pods", "--name", "first", "--zone", "us-east5-a")


FAKE_XPK = """\
#!/bin/bash
# Lists the workload as far as it has come, and as XPK does refuses to submit it twice.
set -e
cd "{folder}"
for state in EVERYTHING FINISHED; do
  if [[ "$*" == "workload list "*"--filter-by-job=first --filter-by-status=$state" ]]; then
    printf '[XPK] Starting workload list\\nJobset Name   Created Time   Status\\n'
    [ ! -e $state ] || printf 'first-one   2026   Admitted\\nfirst   2026   Admitted\\n'
    exit
  fi
done
[ ! -e EVERYTHING ] || exit 1
printf "%s\\0" "$@" > xpk
touch EVERYTHING
"""


def on_a_host(text: str, home: Path, **environment: str) -> list[str]:
    """The words that a shell text runs Python with, where that is a stand-in and nothing is installed."""
    tools = home / "jaxrl_llm_venv" / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    for name in ("python", "pip"):
        (tools / name).write_text('#!/bin/bash\n[ "$0" = "${0%pip}" ] && printf "%s\\n" "$@"; exit 0\n')
        (tools / name).chmod(0o755)
    environment |= {"HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", text], env=environment, cwd=SCRIPTS.parent, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.fixture
def xpk(cloud: Any) -> None:
    path = cloud.folder / "bin" / "xpk"
    path.write_text(FAKE_XPK.format(folder=cloud.folder))
    path.chmod(0o755)


def test_a_workload_is_submitted_once(cloud: Any, xpk: None) -> None:
    submit = ("xpk", *WHERE, "--type", "v6e-8", "--", "jaxrl-llm", "sft", "--run-dir=/a")
    assert cloud.script(*submit).returncode == 0
    (cloud.folder / "xpk").unlink()
    again = cloud.script(*submit)
    assert again.returncode == 0 and "was submitted before" in again.stdout, again.stderr
    (cloud.folder / "FINISHED").touch()
    ended = cloud.script(*submit)
    assert ended.returncode == 2 and "has ended" in ended.stderr
    assert "xpk workload delete --workload=first --cluster=pods --zone=us-east5-a" in ended.stderr
    assert not (cloud.folder / "xpk").exists()


def test_xpk_is_given_a_workload_that_goes_on_after_a_restart(cloud: Any, xpk: None) -> None:
    folder = cloud.folder / "shared"
    line = ("experiments/x.py", "--run-dir", str(folder), "--a.b=c d", "--mesh.data=2")
    done = cloud.script("xpk", *WHERE, "--project", "mine", "--type", "tpu7x-128", "--slices", "2", "--", *line)
    assert done.returncode == 0, done.stderr
    *words, command, _ = (cloud.folder / "xpk").read_text().split("\0")
    assert words == [
        *("workload", "create", "--cluster=pods", "--workload=first", "--zone=us-east5-a", "--project=mine"),
        *("--tpu-type=tpu7x-128", "--num-slices=2", "--max-restarts=50", "--restart-on-exit-codes=1"),
        *("--termination-grace-period-seconds=300", "--base-docker-image=python:3.12"),
        f"--script-dir={cloud.repository}",
    ]
    expected = [line[0], "--distributed", *line[1:]]
    assert on_a_host(command.removeprefix("--command="), cloud.folder) == expected
    folder.mkdir()
    (folder / "config.json").touch()
    assert on_a_host(command.removeprefix("--command="), cloud.folder) == [*expected, "--resume"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--type", "tpu7x", "--", "x.py", "--run-dir=/a"), "--type 'tpu7x' is no TPU type"),
        (("--type", "v6e-8", "--slices", "0", "--", "x.py", "--run-dir=/a"), "--slices '0'"),
        (("--type", "v6e-8", "--", "x.py"), "say --run-dir=/FOLDER"),
        (("--type", "v6e-8", "--", "jaxrl-llm", "gpro", "--run-dir=/a"), "'jaxrl-llm gpro' is nothing"),
        (("--type", "v6e-8", "--", "jaxrl-llm", "sft", "--run-dir=/a", "--config=run.yaml"), "'run.yaml' is not in"),
        (("--type", "v6e-8"), "nothing to run"),
    ],
)
def test_what_xpk_cannot_run_is_refused(cloud: Any, options: tuple[str, ...], message: str) -> None:
    refused = cloud.script("xpk", *WHERE, "--dry-run", *options)
    assert refused.returncode == 2 and message in refused.stderr


def test_skypilot_runs_the_line_on_every_host_and_goes_on(tmp_path: Path) -> None:
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    assert task["resources"]["accelerators"].startswith("tpu-") and task["resources"]["use_spot"]
    line = f"jaxrl-llm sft --run-dir={tmp_path / 'shared'} --a.b='c d'"
    expected = ["-m", "jaxrl_llm", "sft", "--distributed", f"--run-dir={tmp_path / 'shared'}", "--a.b=c d"]
    assert on_a_host(task["run"], tmp_path, LINE=line) == expected
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/config.json").touch()
    assert on_a_host(task["run"], tmp_path, LINE=line) == [*expected, "--resume"]
    (mount,) = task["file_mounts"]
    assert f"--run-dir={mount}/" in task["envs"]["LINE"]
