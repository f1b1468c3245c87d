"""The completions of a run: `completions.jsonl`, or a Parquet file a step, written while the device works."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from jaxrl_llm.checks import check_fields, count, one_of
from jaxrl_llm.extras import require
from jaxrl_llm.training.run.damaged_files import DamagedRunError

COMPLETIONS_FILE, COMPLETIONS_FOLDER = "completions.jsonl", "completions"
"""In a run's folder; the second holds a Parquet file a step."""

Rows = Callable[[], Iterable[dict[str, Any]]]
"""Makes the rows of a step, each with `step`, when they are written."""

FileFormat = Literal["jsonl", "parquet"]

_AHEAD = 2
"""Steps that may wait to be written."""
_STEP = re.compile(rb'\{"step": (\d+)[,}].*\}\n', re.DOTALL)
_AS_JSON = ("prompt", "extra")
"""Columns that Parquet holds as JSON: their values have no one type."""


@dataclasses.dataclass(frozen=True)
class CompletionsConfig:
    """What is kept of the completions of a run, for people and reports."""

    every: int = 1
    """Steps between those whose completions are written, beside the last step; 0: none are."""
    rows: int | None = 32
    """Completions of such a step that are written: whole groups, of its first prompts; `None`: all."""
    tokens: int = 2
    """Completions of such a step whose tokens are written one by one, too, with their log-probs; 0: none."""
    format: FileFormat = "jsonl"
    """jsonl: one file, a JSON object a line. parquet: the folder completions/, a file a step."""

    def __post_init__(self) -> None:
        """Rejects what cannot be meant."""
        check_fields(
            "completions",
            self,
            every=count(self.every, least=0),
            rows=(self.rows is None or count(self.rows)[0], "be None, or at least 1"),
            tokens=count(self.tokens, least=0),
            format=one_of(self.format, FileFormat),
        )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        if self.every:
            return {}
        return dict.fromkeys(("rows", "tokens", "format"), "completions.every=0 writes none")

    def is_due(self, step: int, last: int) -> bool:
        """Whether the completions of a step are written."""
        return bool(self.every) and (step % self.every == 0 or step == last)

    def groups(self, prompts: int, samples: int) -> int:
        """How many of a step's prompts are written."""
        return prompts if self.rows is None else min(prompts, max(1, self.rows // samples))


class CompletionsWriter:
    """Writes the completions of a run, on process 0 alone, in a thread of its own.

    `write` hands a step over; the thread makes its rows and writes them, while the device makes the next step. Where it
    cannot keep pace, `write` waits for it, so that not more than a few steps are in memory. What goes wrong in it is
    raised by the next call.

    A run that resumes after step k is given `resume_step=k`: rows of later steps are cut, because they will be written
    again. To that end, call `flush` before the checkpoint of step k is saved.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        config: CompletionsConfig,
        *,
        resume_step: int | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Opens the file.

        Args:
            run_dir: Folder of the run, created if need be.
            config: What is kept.
            resume_step: Rows up to this step are kept, later ones cut. None starts anew.
            is_main_process: False makes every method do nothing.

        Raises:
            DamagedRunError: If a line to be kept is not what was written.
        """
        self._thread, self._error = None, None
        if not (is_main_process and config.every):
            return
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _cut_lines(folder / COMPLETIONS_FILE, resume_step)
        _cut_files(folder / COMPLETIONS_FOLDER, resume_step)
        self._sink = (_Lines if config.format == "jsonl" else _ParquetFiles)(folder)
        self._queue: queue.Queue[tuple[int, Rows] | None] = queue.Queue(_AHEAD)
        self._thread = threading.Thread(target=self._serve, name="completions", daemon=True)
        self._thread.start()

    def write(self, step: int, rows: Rows) -> None:
        """Hands over the rows of a step.

        Raises:
            OSError: If those of an earlier step could not be written; names the file.
        """
        self._raise()
        if self._thread is not None:
            self._queue.put((step, rows))

    def flush(self) -> None:
        """Waits until all is with the operating system.

        Raises:
            OSError: If it could not be written; names the file.
        """
        if self._thread is not None:
            self._queue.join()
        self._raise()

    def close(self) -> None:
        """Writes what is left and closes the file; the object cannot be used any more."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _serve(self) -> None:
        failed = False
        while (given := self._queue.get()) is not None:
            try:
                if not failed:
                    self._sink.write(given[0], list(given[1]()))
            except OSError as error:
                self._error = OSError(error.errno, error.strerror or str(error), str(self._sink.path))
                failed = True
            except Exception as error:  # of any kind: it is raised where someone sees it
                self._error, failed = error, True
            finally:
                self._queue.task_done()
        self._sink.close()
        self._queue.task_done()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:  # of any kind, since none may hide the error that ended the run
            if error is None:
                raise
            error.add_note(f"Besides: {failure}")


class _Lines:
    """A JSON object a line; `step` comes first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / COMPLETIONS_FILE
        self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")  # as JSON writes them

    def write(self, step: int, rows: list[dict[str, Any]]) -> None:
        lines = ({"step": step} | _finite(row) for row in rows)
        self._file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _ParquetFiles:
    """A file a step, which appears whole."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / COMPLETIONS_FOLDER
        self.path.mkdir(exist_ok=True)

    def write(self, step: int, rows: list[dict[str, Any]]) -> None:
        require("pyarrow")
        import pyarrow
        import pyarrow.parquet

        flat = [{"step": step} | _finite(row) for row in rows]
        for row in flat:
            row |= {name: json.dumps(row[name]) for name in _AS_JSON if name in row}
            row |= {name: _encodable(value) for name, value in row.items()}
        columns = dict.fromkeys(name for row in flat for name in row)
        table = pyarrow.table({name: [row.get(name) for row in flat] for name in columns})
        # Steps with an evaluation have two kinds of rows.
        kind = flat[0].get("kind", "train") if flat else "train"
        target = self.path / f"{step:08d}-{kind}.parquet"
        unfinished = target.with_suffix(".tmp")
        pyarrow.parquet.write_table(table, unfinished)
        os.replace(unfinished, target)

    def close(self) -> None:
        """Nothing is open."""


def read_completions(run_dir: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The completions that a run has written so far, in whichever format; the run may go on meanwhile.

    Args:
        run_dir: folder of the run.

    Yields:
        One dict a completion, steps in order: `step`, `kind` ("train" or "eval"), `row` (of its prompt in the data),
        `sample` (its number in the group), `prompt` (text or messages), `completion` (text), `reward`, `rewards` (by
        function, `None` where one does not apply), `advantage` (`None` where there is none; the mean over the tokens
        where each has its own), `logprob` (Σ log π of its tokens in nats, of the policy that drew them at temperature
        1), `tokens`, `finished` (ended by a stop token or stop text; else it was cut), `extra` (what reward functions
        told by `log_extra`). Of some, lists of one entry a token: `token_ids`, `token_texts`, `token_logprobs`, and
        what the update made: `token_advantages`, `token_old_logprobs`, `token_ref_logprobs`, `token_entropy`,
        `token_values`.

    Raises:
        FileNotFoundError: it has written none.
        DamagedRunError: a line is not what was written.
    """
    folder = Path(run_dir)
    lines, files = folder / COMPLETIONS_FILE, sorted((folder / COMPLETIONS_FOLDER).glob("*.parquet"))
    if not lines.exists() and not files:
        raise FileNotFoundError(f"{folder} holds no {COMPLETIONS_FILE}: completions.every says when it is written")
    if lines.exists():
        with lines.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):  # else it is being written
                    yield completion_of(line, lines, number)
    for path in files:
        yield from completions_of_file(path)


def completion_of(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The completion that a whole line of `completions.jsonl` holds.

    Raises:
        DamagedRunError: the line, of this number in `path`, is not what was written.
    """
    _step_of(line, path, number)
    return json.loads(line)


def completions_of_file(path: Path) -> Iterator[dict[str, Any]]:
    """The completions that a Parquet file holds."""
    require("pyarrow")
    import pyarrow.parquet

    for row in pyarrow.parquet.read_table(path).to_pylist():
        row |= {name: json.loads(row[name]) for name in _AS_JSON if row.get(name) is not None}
        yield {name: value for name, value in row.items() if value is not None or not name.startswith("token_")}


def _encodable(value: Any) -> Any:
    """Text, or a list of texts, with halves of characters, which UTF-8 has not, as escapes; anything else as it is."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return [_encodable(inner) for inner in value] if isinstance(value, list) else value


def _finite(value: Any) -> Any:
    """A value as JSON has it: what is no finite number is `None`."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _step_of(line: bytes, path: Path, number: int) -> int:
    found = _STEP.fullmatch(line)
    if found is None:
        raise DamagedRunError(
            f"{path}, line {number}: expected a completion, got {line[:80].decode(errors='replace').rstrip()!r}; "
            "delete the line, or the file"
        )
    return int(found[1])


def _cut_lines(path: Path, step: int | None) -> None:
    """Cuts the lines after `step` (all if None), and one that was not finished."""
    if not path.exists():
        return
    end, last = 0, -1 if step is None else step
    with path.open("r+b") as file:
        for number, line in enumerate(file if last >= 0 else (), start=1):
            if not line.endswith(b"\n") or _step_of(line, path, number) > last:
                break
            end += len(line)
        file.truncate(end)


def _cut_files(folder: Path, step: int | None) -> None:
    """Removes the files after `step` (all if None)."""
    for path in folder.glob("*.parquet"):
        if step is None or int(path.name.partition("-")[0]) > step:
            path.unlink()
