"""What a run shows in the terminal: a live view, or plain lines where there is no terminal.

Everything sampled from a model is untrusted text: it is never read as markup, and characters that would
steer the terminal are shown as escapes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fnmatch
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from jaxrl_llm.training.run.formatting import clip, duration, printable, short_number, sparkline

# Which metrics are shown, in this order (patterns), and their names in plain lines.
_SHOWN = {
    "reward": "reward",
    "rewards/*/mean": "",
    "rewards/accuracies": "reward accuracy",
    "accuracy": "accuracy",
    "loss": "loss",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "clipped",
    "grad_norm": "grad_norm",
    "sampling/tokens_per_pass": "tok/pass",
    "perf/frac_tokens_useful": "useful",
    "perf/tokens_per_second": "tok/s",
}
_PHASES = "perf/*_seconds"
_HISTORY = 4096
_TREND_WIDTH = 32
_SECONDS_BETWEEN_LINES = 1.0


@dataclasses.dataclass(frozen=True)
class SampledCompletion:
    """One sampled completion, to be looked at."""

    prompt: str
    """The prompt's text."""
    completion: str
    """The completion's text."""
    reward: float
    """Its reward."""


class _Output(Console):
    """Standard output. Whoever reads it (`tee`, a pager) may end before the run, which goes on and saves."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what others print, and Python's last flush
        with contextlib.suppress(OSError):
            os.write(2, b"Nobody reads the run's output any more; it goes on. Ctrl-C or SIGTERM stops it.\n")


class Report:
    """Shows the progress of a run; a context manager.

    On a terminal it is a live view: progress with the time left, metrics with their trend, seconds of each
    phase, and sampled completions. Elsewhere (a file, a pipe, a log of a job) it prints lines without escape
    codes: a step's metrics, at most one line a second, every evaluation, and completions every `samples_every`
    steps. In a notebook the line of a step takes the place of the one before it; evaluations stay.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        title: str = "",
        samples_every: int = 10,
        console: Console | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares the view; nothing is shown before the `with` block.

        Args:
            total_steps: The last step of the run.
            start_step: Steps done before (a resumed run).
            title: Name of the run.
            samples_every: Steps between printed completions where there is no terminal; 0 for never.
            console: Where to show; standard output by default.
            enabled: False shows nothing at all: for processes other than 0.
            clock: Seconds, for the time left.
        """
        self._console = console or _Output()
        self._enabled = enabled
        unicode_output = "utf" in self._console.encoding.lower()
        self._newline = "⏎" if unicode_output else "\\n"
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal and unicode_output
        self._live: Live | None = None
        self._use_live = enabled and terminal
        self._overwritten = 0 if self._console.is_jupyter else None  # characters of a line that the next one replaces
        self._title, self._samples_every = title, samples_every
        self._start, self._step, self._total = start_step, start_step, total_steps
        self._clock = clock
        self._first: tuple[float, int] | None = None  # time and step of the first report
        self._printed: float | None = None  # when the last step had its line
        self._latest: dict[str, tuple[int, float]] = {}
        self._history: dict[str, collections.deque[float]] = collections.defaultdict(
            lambda: collections.deque(maxlen=_HISTORY)
        )
        self._samples: tuple[int, Sequence[SampledCompletion]] | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            expand=True,
        )
        self._phase = "starting"
        self._programs: Sequence[str] = ()
        self._task = self._progress.add_task(self._phase, total=total_steps, completed=start_step, left="")

    def __enter__(self) -> Self:
        if self._use_live:
            self._live = Live(self._render(), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the live view as it is, with the terminal as it was."""
        if self._live is not None:
            self._progress.stop_task(self._task)
            self._live.update(self._render())
            self._live.stop()
            self._live = None

    def phase(self, name: str) -> None:
        """Says what the run is doing now (the live view only)."""
        self._phase = name
        self._describe()

    def compiling(self, programs: Sequence[str], *, said: str) -> None:
        """Says what is compiled; may be called on any thread.

        Args:
            programs: all that are being compiled, for the live view.
            said: what is new, for a line where there is none.
        """
        self._programs = programs
        if self._live is not None:
            self._describe()
        elif self._enabled:
            self._step_line(said, stays=False)

    def _describe(self) -> None:
        if self._live is not None:
            compiling = f"compiling {', '.join(self._programs)}"
            self._progress.update(self._task, description=compiling if self._programs else self._phase)

    def message(self, text: str) -> None:
        """Prints a line that stays: a warning, where a checkpoint is."""
        if self._enabled:
            self._line(printable(text, "\n"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of a step; those of an evaluation are the ones named `eval/…`."""
        if not self._enabled:
            return
        now = self._clock()
        if self._first is None and step > self._start:
            # The time left is judged from the steps after the first report: the first step compiles.
            self._first = (now, step)
        self._step = max(self._step, step)
        for name in self._shown(metrics):
            self._latest[name] = (step, float(metrics[name]))
            self._history[name].append(float(metrics[name]))
        left = self._time_left(now)
        if self._live is not None:
            self._progress.update(self._task, completed=self._step, left=f"{left} left" if left else "")
            self._live.update(self._render())
        elif self._is_printed(step, metrics, now):
            stays = step >= self._total or any(name.startswith("eval/") for name in metrics)
            self._step_line(self._plain(step, metrics, left), stays=stays)

    def _is_printed(self, step: int, metrics: Mapping[str, float], now: float) -> bool:
        """Whether a step has its line; where steps take milliseconds, not all have."""
        if any(name.startswith("eval/") for name in metrics):
            return True
        due = self._printed is None or now - self._printed >= _SECONDS_BETWEEN_LINES
        if due or step >= self._total or self.wants_samples(step):
            self._printed = now
            return True
        return False

    def wants_samples(self, step: int) -> bool:
        """Whether completions of this step would be shown; if not, they need not be decoded."""
        if not self._enabled:
            return False
        return self._use_live or (self._samples_every > 0 and step % self._samples_every == 0)

    def samples(self, step: int, samples: Sequence[SampledCompletion]) -> None:
        """Shows sampled completions with their rewards."""
        if not self.wants_samples(step):
            return
        self._samples = (step, samples)
        if self._live is not None:
            self._live.update(self._render())
            return
        for sample in samples:
            self._line(f"  reward {short_number(sample.reward)}")
            self._line(f"    prompt:     {clip(printable(sample.prompt, self._newline), 240)}")
            self._line(f"    completion: {clip(printable(sample.completion, self._newline), 480)}")

    def summary(self, title: str, rows: Sequence[tuple[str, str]], *, next_steps: Sequence[str] = ()) -> None:
        """Prints the end of a run, after the `with` block.

        Args:
            title: Heading.
            rows: Names and values, in order.
            next_steps: What to try next, one line each.
        """
        if not self._enabled:
            return
        if self._use_live:
            table = Table.grid(padding=(0, 2))
            for name, value in rows:
                table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
            self._console.print(Panel(table, title=Text(title), title_align="left", expand=False))
        else:
            width = max((len(name) for name, _ in rows), default=0)
            for text in ("", title, *(f"  {name:<{width}}  {value}" for name, value in rows)):
                self._line(text)
        if next_steps:
            for text in ("", "Next:", *(f"  {text}" for text in next_steps)):
                self._line(text)

    def _step_line(self, text: str, *, stays: bool) -> None:
        """The line of a step; in a notebook over the one before, unless that was to stay."""
        if self._overwritten is None:
            self._line(text)
            return
        print("\r" + text.ljust(self._overwritten), end="\n" if stays else "", flush=True)
        self._overwritten = 0 if stays else len(text)

    def _line(self, text: str) -> None:
        """One line as it is: no markup, no wrapping, nothing that the output's encoding cannot say."""
        if self._overwritten is not None:  # rich would make HTML of it
            print("\n" * bool(self._overwritten) + text, flush=True)
            self._overwritten = 0
            return
        encoding = self._console.encoding
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._console.print(Text(text), soft_wrap=True, highlight=False)

    @staticmethod
    def _shown(metrics: Mapping[str, float]) -> Iterator[str]:
        redundant = {"loss"} if "reward" in metrics else set()  # on-policy it is about 0, whatever is learnt
        for pattern in ("rewards/*/mean", "eval/rewards/*"):
            if len(names := fnmatch.filter(metrics, pattern)) == 1:  # the sum says the same
                redundant.update(names)
        for pattern in (*_SHOWN, "eval/*", _PHASES):
            yield from (name for name in metrics if fnmatch.fnmatchcase(name, pattern) and name not in redundant)

    def _time_left(self, now: float) -> str:
        if self._first is None or self._step <= self._first[1] or self._step >= self._total:
            return ""
        seconds_per_step = (now - self._first[0]) / (self._step - self._first[1])
        return duration(seconds_per_step * (self._total - self._step))

    def _plain(self, step: int, metrics: Mapping[str, float], left: str) -> str:
        parts = [f"step {step}/{self._total}"]
        phases = []
        for name in self._shown(metrics):
            value = short_number(metrics[name])
            if fnmatch.fnmatchcase(name, _PHASES):
                phases.append(f"{_phase_name(name)} {value}")
            elif name == "reward" and "reward_std" in metrics:
                parts.append(f"reward {value} (std {short_number(metrics['reward_std'])})")
            else:
                parts.append(f"{_SHOWN.get(name) or name.removesuffix('/mean')} {value}")
        if phases:
            parts.append(f"seconds: {', '.join(phases)}")
        if left:
            parts.append(f"{left} left")
        return " | ".join(parts)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress]
        table = Table.grid(padding=(0, 2))
        phases = []
        for name in self._shown({name: value for name, (_, value) in self._latest.items()}):
            step, value = self._latest[name]
            if fnmatch.fnmatchcase(name, _PHASES):
                phases.append(f"{_phase_name(name)} {short_number(value)}")
                continue
            note = f"step {step}" if name.startswith("eval/") else ""
            trend = Text(sparkline(self._history[name], _TREND_WIDTH), style="cyan")
            table.add_row(Text(name, style="bold"), Text(short_number(value), justify="right"), trend, Text(note))
        if phases:
            table.add_row(Text("seconds", style="bold"), Text(""), Text(" · ".join(phases)))
        if table.row_count:
            parts.append(table)
        if self._samples is not None:
            parts.append(self._samples_table(*self._samples))
        return Panel(Group(*parts), title=Text(self._title), title_align="left")

    def _samples_table(self, step: int, samples: Sequence[SampledCompletion]) -> Table:
        table = Table(title=f"completions of step {step}", title_justify="left", expand=True)
        table.add_column("reward", justify="right", no_wrap=True)
        table.add_column("prompt", ratio=2, overflow="fold")
        table.add_column("completion", ratio=3, overflow="fold")
        for sample in samples:
            table.add_row(
                Text(short_number(sample.reward)),
                Text(clip(printable(sample.prompt, self._newline), 160)),
                Text(clip(printable(sample.completion, self._newline), 240)),
            )
        return table


def _phase_name(name: str) -> str:
    return name.removeprefix("perf/").removesuffix("_seconds")
