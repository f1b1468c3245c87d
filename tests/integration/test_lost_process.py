"""One of two processes is killed, at any moment: the other one ends by itself and says who is gone, and both go on."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxrl_llm.training.run.metrics import comparable_metrics

SCRIPT = """
import sys
from jaxrl_llm.training.run.lookout import Lookout

def begin(lookout, real=Lookout.begin):
    real(lookout)
    print("joined", flush=True)

Lookout.begin = begin
here, address, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path.insert(0, here)
import tiny_experiment as tiny

joins = [f"--cluster.coordinator-address={address}", "--cluster.num-processes=2", f"--cluster.process-id={process}"]
tiny.main(["--distributed", *joins, "--mesh.data=2", *sys.argv[4:]])
"""
STEPS = 60
LOST_AFTER = 10


class Pair:
    """Two processes of one run."""

    def __init__(self, folder: Path, *args: str, steps: int = STEPS) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        saved = ["--training.checkpoint-every=2", "--training.keep-checkpoints=3", f"--training.steps={steps}"]
        lean = ["--evaluation.every=0", f"--cluster.lost-after={LOST_AFTER}", f"--run-dir={folder / 'run'}"]
        self.files = [(folder / f"out{number}", folder / f"err{number}") for number in range(2)]
        self.processes = []
        for number, (out, err) in enumerate(self.files):
            command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), address, str(number)]
            with out.open("w") as stdout, err.open("w") as stderr:
                process = subprocess.Popen([*command, *saved, *lean, *args], stdout=stdout, stderr=stderr)
            self.processes.append(process)

    def wait(self, number: int, seconds: float) -> tuple[int, str, str]:
        """Status and output of one."""
        try:
            self.processes[number].wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill(0, 1)
        out, err = self.files[number]
        return self.processes[number].wait(), out.read_text(), err.read_text()

    def until_joined(self) -> None:
        """Returns when both have found each other."""
        self._until(lambda: all("joined" in out.read_text() for out, _ in self.files))

    def until_saved(self) -> None:
        """Returns when there is a checkpoint."""
        folder = self.files[0][0].parent / "run" / "checkpoints"
        self._until(lambda: any(path.name.isdigit() for path in folder.glob("*")))

    def _until(self, there: Callable[[], bool]) -> None:
        while not there():
            ended = [number for number, process in enumerate(self.processes) if process.poll() is not None]
            assert not ended, [self.wait(number, 1) for number in ended]
            time.sleep(0.05)

    def kill(self, *numbers: int) -> None:
        for number in numbers:
            self.processes[number].kill()
            self.processes[number].wait()

    def both(self, seconds: float) -> list[str]:
        """What both printed, once they have ended well."""
        ended = [self.wait(number, seconds) for number in range(2)]
        assert [status for status, _, _ in ended] == [0, 0], ended
        return [out for _, out, _ in ended]


def digests(outputs: list[str]) -> list[str]:
    return [re.findall("^digest .*", output, re.MULTILINE)[-1] for output in outputs]


def last_line(text: str) -> str:
    return [line for line in text.splitlines() if line.startswith("error: ")][-1]


def test_the_survivor_says_who_was_lost_and_how_to_go_on(tmp_path: Path) -> None:
    pair = Pair(tmp_path, steps=4_000)
    pair.until_saved()
    pair.kill(1)
    began = time.monotonic()
    status, _, err = pair.wait(0, 60)
    assert status == 1 and time.monotonic() - began < 30, err
    line = last_line(err)
    place = r"'(the decision after )?\w+ of step \d+(: [\w ]+)?'"
    assert re.match(rf"error: process 0 of 2 lost process 1, which has been (in|past) {place} for \d+ s", line)
    assert f"--resume --run-dir={tmp_path / 'run'} in all of them" in line


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    """The survivor ends within a minute, and what goes on ends bit-equal to what was not killed."""
    rng = random.Random(15)
    (tmp_path / "whole").mkdir()
    pair = Pair(tmp_path / "whole")
    pair.until_saved()
    began = time.monotonic()
    expected = digests(pair.both(120))
    seconds, slowest = time.monotonic() - began, 0.0
    whole = comparable_metrics(tmp_path / "whole/run/metrics.jsonl")
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        victim, moment = rng.randrange(2), rng.uniform(0, seconds)
        pair = Pair(folder)
        pair.until_saved() if number % 4 else pair.until_joined()
        time.sleep(moment)
        alive = pair.processes[victim].poll() is None
        pair.kill(victim)
        killed = time.monotonic()
        status, _, err = pair.wait(1 - victim, 120)
        took = time.monotonic() - killed
        slowest = max(slowest, took)
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        print(
            f"kill {number}: process {victim} after {moment:.1f} of {seconds:.1f} s; {took:.1f} s; {status}; {said}",
            flush=True,
        )
        assert took < 60, err
        # Once all have come to their ends there is nothing to lose, and JAX alone complains.
        if alive and status and "Shutdown barrier" not in err:
            assert status == 1 and f"lost process {victim}" in said[-1], err
        begun = (folder / "run/config.json").exists()
        assert digests(Pair(folder, *["--resume"] * begun).both(120)) == expected
        assert comparable_metrics(folder / "run/metrics.jsonl") == whole
    print(f"slowest survivor {slowest:.1f} s")
