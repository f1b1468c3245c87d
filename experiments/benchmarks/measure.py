"""The work that is timed, and what any framework's process can say of itself.

Standard library only, so that the scripts of other frameworks import it in their own environments.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Work = Literal["W1", "W2", "W3"]
WORKS: dict[Work, str] = {
    "W1": "sampling",
    "W2": "one GRPO update",
    "W3": "one GRPO iteration: sampling, a Python reward, update",
}
RESULT = "RESULT "
"""Begins the line in which a script prints its record."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the batch."""

    prompts: int = 4
    """P."""
    prompt_tokens: int = 64
    """Tokens of every prompt."""
    samples: int = 8
    """G, completions of each prompt."""
    completion_tokens: int = 64
    """Tokens of every completion, or of the longest that there may be."""
    lengths: Literal["full", "lognormal"] = "full"
    """Of the completions: all of `completion_tokens`; or lognormal (σ = 1), with a mean of a quarter of that before
    they are cut there, the same in every run."""

    @property
    def completion_lengths(self) -> list[list[int]]:
        """Of each prompt's completions."""
        longest = self.completion_tokens
        if self.lengths == "full":
            return [[longest] * self.samples] * self.prompts
        draw = random.Random(0)
        drawn = [[draw.lognormvariate(0, 1) for _ in range(self.samples)] for _ in range(self.prompts)]
        mean = statistics.fmean(length for row in drawn for length in row)
        return [[min(longest, max(1, round(longest / 4 * length / mean))) for length in row] for row in drawn]

    @property
    def sampled_tokens(self) -> int:
        """Completion tokens of a batch."""
        return sum(map(sum, self.completion_lengths))

    @property
    def row_tokens(self) -> int:
        """Tokens of all rows, where each completion brings its own copy of its prompt."""
        return self.prompts * self.samples * self.prompt_tokens + self.sampled_tokens


def conventional_flops(work: Work, parameters: int, shape: Shape, *, reference: bool) -> int:
    """2N a token that is sampled, read as a prompt or scored by the reference; 6N a token that is trained.

    N counts a tied embedding once. Every completion brings its own prompt, as in systems that repeat it, so
    that the figure depends on the work alone.
    """
    forward = 2 * parameters * shape.row_tokens
    update = 3 * forward + (forward if reference else 0)
    return {"W1": forward, "W2": update, "W3": forward + update}[work]


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of repetitions."""
    rounded = [round(value, 5) for value in (statistics.median(seconds), min(seconds), max(seconds))]
    return {**dict(zip(("median", "min", "max"), rounded, strict=True)), "n": len(seconds)}


# ---- The process ---------------------------------------------------------------------------------

_IMPORTED = time.monotonic()


def process_age() -> float:
    """Seconds since this process started; without /proc, since this module was imported."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - started
    except OSError:
        return time.monotonic() - _IMPORTED


def peak_rss_gib() -> float:
    """The most main memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


class Bystanders:
    """How much of the machine's CPU time others have taken since this was made: figures need a quiet machine."""

    def __init__(self) -> None:
        self._began = self._read()

    def share(self) -> float | None:
        """Other processes' and the hypervisor's share of all CPU time, 0 to 1; `None` without /proc/stat."""
        now = self._read()
        if self._began is None or now is None or now[0] <= self._began[0]:
            return None
        everything, busy, own = (after - before for before, after in zip(self._began, now, strict=True))
        return round(max(0.0, busy - own) / everything, 3)

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds so far: of all cores, of these busy or stolen, of this process."""
        try:
            line = Path("/proc/stat").read_text().split("\n", 1)[0]
        except OSError:
            return None
        user, nice, system, idle, wait, interrupt, soft, stolen = (int(x) for x in line.split()[1:9])
        busy = user + nice + system + interrupt + soft + stolen
        hertz = os.sysconf("SC_CLK_TCK")
        return (busy + idle + wait) / hertz, busy / hertz, sum(os.times()[:2])


# ---- Records -------------------------------------------------------------------------------------


def publish(record: dict[str, Any], target: str | None) -> None:
    """Appends a record to the file `target` as a line of JSON; `-`: prints it as `run_and_read` reads it."""
    line = json.dumps(record, ensure_ascii=False)
    if target == "-":
        print(RESULT + line, flush=True)
    elif target is not None:
        with open(target, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def run_and_read(command: str) -> dict[str, Any]:
    """Runs a shell command and returns the record that it printed.

    Raises:
        ValueError: it failed or printed no record with `seconds`; the message ends with its last output.
    """
    ran = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [line.removeprefix(RESULT) for line in ran.stdout.splitlines() if line.startswith(RESULT)]
    if ran.returncode or len(lines) != 1:
        what = f"ended with status {ran.returncode}" if ran.returncode else f"printed {len(lines)} {RESULT}lines, not 1"
        raise ValueError(f"the peer {what}: {command}\n{ran.stdout[-2000:]}")
    record = json.loads(lines[0])
    if "median" not in record.get("seconds", {}):
        raise ValueError(f"the peer's record has no seconds.median: {lines[0][:500]}")
    return record
