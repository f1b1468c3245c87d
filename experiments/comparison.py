"""What the comparisons share: many runs from one warm start, a result file of each, a table and a figure.

No experiment by itself: see compare_algorithms.py and compare_preferences.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxrl_llm.cli import plain_errors, start
from jaxrl_llm.config import RunConfig
from jaxrl_llm.training.run.formatting import duration

RESULT, TABLE, FIGURE, ALL_RUNS = "result.json", "table.md", "figure.png", "runs.json"

Result = dict[str, Any]
"""What came out of a run: preset, seed, accuracy before, accuracy, seconds, stopped, and what else is compared."""
Curve = tuple[Any, Any]
"""Abscissae and ordinates."""


class ManyRuns(Protocol):
    """Settings of a comparison: a `RunConfig` with presets and seeds."""

    @property
    def presets(self) -> tuple[str, ...]: ...

    @property
    def seeds(self) -> int: ...

    @property
    def run_dir(self) -> str | None: ...


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def check_runs(presets: Sequence[str], seeds: int, names: Sequence[str]) -> None:
    """Rejects unknown names, and no run at all."""
    unknown = [name for name in presets if name not in names]
    if unknown or not presets:
        raise ValueError(f"presets={unknown or presets} must be some of {', '.join(names)}")
    if seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")


def run_folder(config: ManyRuns, name: str, seed: int) -> Path:
    """The folder of one run, in that of the comparison."""
    return Path(config.run_dir or "") / f"{name}-{seed}"


def begin(config: ConfigT) -> ConfigT:
    """Prepares the process and the folder; a comparison that goes on may have other presets and seeds."""
    config = start(config)
    path, settings = Path(config.run_dir or "") / ALL_RUNS, config.settings()
    with plain_errors():
        if path.exists() and not (
            config.resume and _of_each_run(json.loads(path.read_text())) == _of_each_run(settings)
        ):
            raise ValueError(
                f"{path.parent} holds another comparison: pass --resume with the same settings, or another folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2, sort_keys=True))
    return config


def _of_each_run(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("presets", "seeds")}


def run_all(config: ManyRuns, run_one: Callable[[str, int], Result]) -> list[Result]:
    """The results of all runs, made or read; the last one is that of a run that was stopped, if one was."""
    results: list[Result] = []
    for name in config.presets:
        for seed in range(config.seeds):
            result = _kept(run_folder(config, name, seed), partial(run_one, name, seed))
            results.append(result)
            print(
                f"{name}, seed {seed}: accuracy {result['accuracy before']:.3f} → {result['accuracy']:.3f}, "
                f"{duration(result['seconds'])}",
                flush=True,
            )
            if result["stopped"]:
                where = f"--resume --run-dir={config.run_dir}"
                print(f"stopped ({result['stopped']}); go on with the same command and {where}")
                return results
    return results


def _kept(folder: Path, run: Callable[[], Result]) -> Result:
    """The result in a run's folder, or what the run now gives; one that was stopped leaves none."""
    if (folder / RESULT).exists():
        return json.loads((folder / RESULT).read_text())
    result = run()
    if result["stopped"] is None:
        (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n")
    return result


def compare(
    config: ManyRuns,
    run_one: Callable[[str, int], Result],
    *,
    table: Callable[[list[Result]], str],
    draw: Callable[[Path], None],
) -> list[Result]:
    """Makes all runs; then writes and prints the table, and draws the figure."""
    began, folder = time.perf_counter(), Path(config.run_dir or "")
    results = run_all(config, run_one)
    if not results[-1]["stopped"]:
        (folder / TABLE).write_text(table(results))
        draw(folder / FIGURE)
        print(table(results))
        print(f"{len(results)} runs in {duration(time.perf_counter() - began)}; {folder / TABLE}, {folder / FIGURE}")
    return results


def results_table(results: Sequence[Result], *, ranged: Sequence[str], columns: Sequence[str]) -> str:
    """Means over seeds as Markdown, the best of the first column first; behind those of `ranged` their range."""
    rows = []
    for name in dict.fromkeys(result["preset"] for result in results):
        runs = [result for result in results if result["preset"] == name]
        cells = [_with_range([run[key] for run in runs]) for key in ranged]
        cells += [_mean([run[key] for run in runs]) for key in columns]
        rows.append((float(np.mean([run[ranged[0]] for run in runs])), f"| `{name}` | {' | '.join(cells)} |"))
    names = [*ranged, *columns]
    head = f"| preset | {' | '.join(names)} |\n|---|{'---|' * len(names)}"
    return "\n".join([head, *(row for _, row in sorted(rows, reverse=True))]) + "\n"


def _with_range(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3g}" if known else "–"


def draw_families(
    families: Mapping[str, Sequence[str]],
    presets: Sequence[str],
    titles: Sequence[str],
    curves: Callable[[str], Sequence[Curve]],
) -> tuple[Any, Any]:
    """A figure with a row a family and a column a title, and its axes; families without a preset are left out.

    Args:
        families: names of presets by family.
        presets: those that were run.
        titles: of the columns.
        curves: from a preset to its curve in each column.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = {name: [p for p in members if p in presets] for name, members in families.items()}
    families = {name: members for name, members in families.items() if members}
    figure = Figure(figsize=(17, 3.4 * len(families)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(families), len(titles), squeeze=False)
    for row, (family, members) in zip(axes, families.items(), strict=True):
        for name in members:
            for column, (x, y) in zip(row, curves(name), strict=True):
                column.plot(x, y, label=name)
        for column, title in zip(row, titles, strict=True):
            column.set_title(title, fontsize=10)
            column.grid(alpha=0.25, linewidth=0.6)
            column.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(family)
        row[0].legend(frameon=False, fontsize=8)
    return figure, axes


def save_figure(figure: Any, path: Path, *, dpi: int) -> None:
    """Writes a PNG of 64 colours, which is a fraction of the size that it has with all of them."""
    from PIL import Image

    figure.savefig(path, dpi=dpi)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(64)
    small.save(path, optimize=True)
