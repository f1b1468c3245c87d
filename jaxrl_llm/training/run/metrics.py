"""Metrics of a run: `metrics.jsonl`, TensorBoard, and Weights & Biases when asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import operator
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxrl_llm.training.run.damaged_files import DamagedRunError
from jaxrl_llm.training.run.tensorboard import TensorBoardEvents, as_markdown

METRICS_FILE = "metrics.jsonl"

PERFORMANCE_PREFIX = "perf/"
"""Names of metrics that depend on the machine and the hour (seconds, tokens per second, bytes of memory)."""

_PERFORMANCE_NAMES = frozenset({"step_time"})

_SHOWN = 8
"""Completions of a step in TensorBoard."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Where a run appears in Weights & Biases."""

    project: str
    """Name of the project."""
    entity: str | None = None
    """User or team; by default the one that is logged in."""
    name: str | None = None
    """Name of the run; by default the name of its folder."""
    group: str | None = None
    """Runs of one group are shown together."""
    offline: bool = False
    """Write to the run's folder only; `wandb sync` uploads it later."""


class MetricsWriter:
    """Writes the metrics of a run, on process 0 alone.

    `metrics.jsonl` has one JSON object a line: `step` and the metrics, keys sorted. Numbers are written such
    that reading gives back the same bits. JSON has no word for numbers that are not finite: they are written
    as the strings "NaN", "Infinity" and "-Infinity", which `read_metrics` turns back. A line is with the
    operating system when `write` returns, so that a killed process loses none.

    A run that resumes after step k is given `resume_step=k`: lines of later steps are cut, because they will
    be written again. A killed and resumed run then leaves the file of an uninterrupted one, but for the
    metrics that measure time and memory (see `comparable_metrics`). To that end, write all lines of step k
    before the checkpoint of step k is saved.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb: WandbConfig | None = None,
        run_config: Mapping[str, Any] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Opens the files.

        Args:
            run_dir: Folder of the run, created if need be.
            resume_step: Lines up to this step are kept, later ones cut. None starts the file anew.
            tensorboard: Also write TensorBoard events, in `run_dir/tensorboard` (finite values only).
            wandb: Also report to Weights & Biases, as this.
            run_config: Configuration of the run, shown by Weights & Biases.
            is_main_process: False makes every method do nothing.

        Raises:
            DamagedRunError: If a line to be kept is not a JSON object with a step.
            ImportError: If Weights & Biases is asked for and not installed.
        """
        self.path = Path(run_dir) / METRICS_FILE
        self._events = self.path.parent / "tensorboard"
        self._file = self._tensorboard = self._wandb = None
        if not is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Before the file is opened: an extra that is not installed is to leave nothing behind.
        if wandb is not None:
            self._wandb = _start_wandb(wandb, self.path.parent, run_config)
        with _named(self.path):
            _keep_until(self.path, resume_step)
            self._file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            first = 0 if resume_step is None else resume_step + 1
            with _named(self._events):
                self._tensorboard = TensorBoardEvents(self._events, first_step=first)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line; several lines may have the same step.

        Args:
            step: The step that the metrics belong to.
            metrics: Numbers by name: Python's, or scalar arrays.

        Raises:
            ValueError: If a metric is named "step".
            TypeError: If a metric is not a number.
            OSError: If a file cannot be written, because the disk is full for instance; names it.
        """
        if self._file is None:
            return
        if "step" in metrics:
            raise ValueError('"step" cannot be the name of a metric: it is the key of the step itself')
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        line = {"step": step} | {name: _to_json(number) for name, number in numbers.items()}
        with _named(self.path):
            self._file.write(json.dumps(line, sort_keys=True, allow_nan=False) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            with _named(self._events):
                self._tensorboard.write(
                    step, {name: number for name, number in numbers.items() if math.isfinite(number)}
                )
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step})

    def show(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Shows completions: as a table in Weights & Biases, as text in TensorBoard, which shows the first few.

        Args:
            step: The step that they belong to.
            rows: As `read_completions` gives them, of one kind.

        Raises:
            OSError: If a file cannot be written; names it.
        """
        if not rows:
            return
        name = "completions" if rows[0]["kind"] == "train" else f"{rows[0]['kind']}/completions"
        if self._tensorboard is not None:
            with _named(self._events):
                self._tensorboard.write_text(step, name, as_markdown(rows[:_SHOWN]))
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            flat = [_flat(row) for row in rows]
            columns = list(dict.fromkeys(column for row in flat for column in row))
            table = wandb.Table(columns=columns, data=[[row.get(column) for column in columns] for row in flat])
            self._wandb.log({name: table, "step": step})

    def flush(self) -> None:
        """Hands over what TensorBoard still holds back."""
        if self._tensorboard is not None:
            with _named(self._events):
                self._tensorboard.flush()

    def close(self) -> None:
        """Closes all files; the object cannot be used any more.

        Raises:
            OSError: If what is left cannot be written; names the file.
        """
        file, events, run = self._file, self._tensorboard, self._wandb
        self._file = self._tensorboard = self._wandb = None
        with contextlib.ExitStack() as stack:  # the next one is closed whatever happens to the one before
            for sink, path in ((file, self.path), (events, self._events)):
                if sink is not None:
                    stack.callback(_named(path)(sink.close))
            if run is not None:
                stack.callback(run.finish)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What could not be written once cannot be written now: the first error says it.
        with contextlib.suppress(OSError) if isinstance(error, OSError) else contextlib.nullcontext():
            self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`: one dict a line, with `step` and the metrics.

    A last line without its line break is left out: the process was killed while it wrote.

    Raises:
        DamagedRunError: If a line is not a JSON object with a step.
    """
    return [line for _, line in _lines(Path(path))]


def comparable_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl` without what differs between equal runs: `step_time` and `perf/…`."""
    return [{name: value for name, value in line.items() if not is_performance(name)} for line in read_metrics(path)]


def is_performance(name: str) -> bool:
    """Whether a metric measures time or memory, and so differs between two equal runs."""
    return name in _PERFORMANCE_NAMES or name.startswith(PERFORMANCE_PREFIX)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the file system name the file, which those of a write do not by themselves."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each complete line, as it stands and decoded."""
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not text.endswith(b"\n"):
            return
        yield text, metrics_of(text, path, number)


def metrics_of(text: bytes, path: Path, number: int) -> dict[str, Any]:
    """The metrics that a whole line of `metrics.jsonl` holds, with their `step`.

    Raises:
        DamagedRunError: the line, of this number in `path`, is not a JSON object with a step.
    """
    try:
        line = json.loads(text)
    except ValueError:  # no JSON, or no text at all
        line = None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise DamagedRunError(
            f'{path}, line {number}: expected a JSON object with "step", got '
            f"{text.decode(errors='replace')[:80].rstrip()!r}; delete the line, or the file"
        )
    return {name: _NON_FINITE.get(v, v) if isinstance(v, str) else v for name, v in line.items()}


def _keep_until(path: Path, step: int | None) -> None:
    """Cuts the lines after `step` (all if None); the file is replaced whole, so a kill harms nothing."""
    if not path.exists():
        return
    kept = [] if step is None else [text for text, line in _lines(path) if line["step"] <= step]
    replacement = path.with_suffix(".jsonl.tmp")
    replacement.write_bytes(b"".join(kept))
    os.replace(replacement, path)


def _number(name: str, value: Any) -> int | float:
    try:
        return operator.index(value)
    except TypeError:
        pass
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"metric {name!r} is not a number: {value!r}") from None


def _to_json(number: int | float) -> int | float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A completion as a row of a table: rewards and extras under their own names, prompts as text, no tokens."""
    parts = {f"rewards/{name}": value for name, value in row["rewards"].items()} | row["extra"]
    plain = {name: value for name, value in row.items() if name not in ("kind", "rewards", "extra")}
    flat = {name: value for name, value in plain.items() if not name.startswith("token_")} | parts
    return {name: value if _is_cell(value) else json.dumps(value) for name, value in flat.items()}


def _is_cell(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _start_wandb(config: WandbConfig, run_dir: Path, run_config: Mapping[str, Any] | None) -> Any:
    """Starts the run, or continues it where the folder already has one."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "Weights & Biases is not installed: pip install 'jaxrl-llm[wandb]', or leave out its setting"
        ) from error
    id_file = run_dir / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    run = wandb.init(
        project=config.project,
        entity=config.entity,
        name=config.name or run_dir.name,
        group=config.group,
        mode="offline" if config.offline else "online",
        id=id_file.read_text().strip(),
        resume="allow",
        dir=str(run_dir),
        config=None if run_config is None else dict(run_config),
    )
    # Its own step counter only rises, which the steps of a resumed run do not.
    run.define_metric("*", step_metric="step")
    return run
