"""The lines that the pages give for slices, as the scripts hand them to the hosts, are read by the parser."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jaxrl_llm.__main__ import COMMANDS, main
from jaxrl_llm.config import Experiment
from jaxrl_llm.launch.on_policy import parse
from jaxrl_llm.launch.stages import GRPO

ROOT = Path(__file__).resolve().parents[2]
SLICE = "tpu_scripts/run.sh --name my-tpu --zone us-east5-a --type v6e-16 --hours 1 -- "


def lines(page: str, beginning: str) -> list[list[str]]:
    """The commands of a page's blocks of shell that begin so, word by word."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ").replace("$WHERE", "--name my-tpu --zone us-east5-a")
    return [shlex.split(line, comments=True) for line in text.splitlines() if re.match(beginning, line)]


KNOWN_GOOD = [[*shlex.split(SLICE), *line] for line in lines("docs/sizing.md", "jaxrl-llm grpo ")]
OF_THE_README = lines("tpu_scripts/README.md", r"tpu_scripts/(run|launch|xpk)\.sh ")


def on_a_host(cloud: Any, line: list[str]) -> list[str]:
    """What Python is given there, by the commands that a dry run tells."""
    told = cloud.script(Path(line[0]).stem, "--dry-run", *line[1:])
    assert told.returncode == 0, told.stderr
    stand_ins = 'gcloud() { printf "%s\\n" "$@"; }; xpk() { gcloud "$@"; }; git() { :; }; mkdir() { :; }; '
    commands = subprocess.run(
        ["bash", "-c", stand_ins + told.stdout], capture_output=True, text=True, check=True
    ).stdout
    (start,) = re.findall(r"^set -- (.*)$", commands, re.MULTILINE)
    return shlex.split(start)


def test_known_good_lines_are_there() -> None:
    assert len(KNOWN_GOOD) == 3 and len(OF_THE_README) == 3


@pytest.mark.parametrize("line", KNOWN_GOOD + OF_THE_README, ids=lambda line: line[-1])
def test_a_line_arrives_and_is_read(cloud: Any, line: list[str]) -> None:
    words = on_a_host(cloud, line)
    words = words[words.index("-m") :]
    assert words[:4] == ["-m", "jaxrl_llm", "grpo", "--distributed"]
    config: Experiment = parse(GRPO, words[3:])
    assert config.distributed and config.model.path and config.data.train and config.rewards == ("math",)
    assert config.run_dir is None or config.run_dir.startswith(("/mnt/shared/runs/", "/shared/runs/"))


def test_the_stages_of_slices_are_those_that_can_be_distributed(capsys: pytest.CaptureFixture[str]) -> None:
    def distributed(command: str) -> bool:
        with pytest.raises(SystemExit):
            main([command, "--help-all"])
        return "--distributed" in capsys.readouterr().out

    (told,) = re.findall(r'^STAGES="(.*)"$', (ROOT / "tpu_scripts/common.sh").read_text(), re.MULTILINE)
    assert told.split() == [command for command in COMMANDS if distributed(command)]
