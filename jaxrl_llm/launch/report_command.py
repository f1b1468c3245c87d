"""The command that makes a page of a run, or of several beside each other."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.checks import expand_home
from jaxrl_llm.launch.defaults import default_settings
from jaxrl_llm.launch.errors import plain_errors
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.training.run.metrics import METRICS_FILE
from jaxrl_llm.training.run.page.digest import Digest
from jaxrl_llm.training.run.page.document import PAGE_FILE, write_page

COMPARISON_FILE = "comparison.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportRun:
    """All settings of the command."""

    runs: tuple[str, ...] = ()
    """Folders of runs; the words before any flag are meant, too."""
    output: str | None = None
    """Page to write; by default report.html in the run's folder, and of several runs comparison.html here."""


def run_report(args: Sequence[str] | None = None, *, description: str = "") -> Path:
    """Writes the page that a command line asks for; errors end the program with one line.

    Args:
        args: the command line; `None`: the process's.
        description: for `--help`.

    Returns:
        The page.
    """
    config = read_flags(ReportRun(), _named(sys.argv[1:] if args is None else list(args)), description)
    with plain_errors():
        if not config.runs:
            raise ValueError("no run given: jaxrl-llm report RUN [RUN …], each the folder that a run left")
        folders = [Path(expand_home(run)) for run in config.runs]
        for folder in folders:
            check_run(folder)
        output = folders[0] / PAGE_FILE if len(folders) == 1 else Path(COMPARISON_FILE)
        if config.output is not None:
            output = Path(expand_home(config.output))
        if output.is_dir():
            raise ValueError(f"output={output} is a folder: give a file, as --output={output / PAGE_FILE}")
        write_page(output, [_digest(folder).data() for folder in folders])
        print(f"{output} shows {'the run' if len(folders) == 1 else f'{len(folders)} runs'}: open it in a browser")
    return output


def _named(args: list[str]) -> list[str]:
    """The command line with its words before any flag as those of `--runs`."""
    flags = next((place for place, word in enumerate(args) if word.startswith("-")), len(args))
    return [*(["--runs", *args[:flags]] if flags else []), *args[flags:]]


def check_run(folder: Path) -> None:
    """Refuses a folder that holds no run.

    Raises:
        ValueError: says what it is, and names runs that it holds.
    """
    if (folder / METRICS_FILE).is_file():
        return
    if inside := sorted(str(path.parent) for path in folder.glob(f"*/{METRICS_FILE}")):
        some = " ".join(inside[:3]) + (" …" if len(inside) > 3 else "")
        raise ValueError(f"{folder} is no run, but holds {len(inside)}: jaxrl-llm report {some}")
    what = f"has no {METRICS_FILE}" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
    raise ValueError(f"{folder} is no run: it {what}; give the folder that a run left, runs/NAME-TIME by default")


def _digest(folder: Path) -> Digest:
    digest = Digest(folder)
    digest.defaults = default_settings(digest.settings)
    digest.update()
    return digest
