"""Pictures of a run's metrics."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from jaxrl_llm.extras import require
from jaxrl_llm.training.run.metrics import read_metrics

_COLORS = ("#1f6feb", "#d1570c", "#2da44e", "#8250df", "#bf3989", "#57606a")
_PANEL_INCHES = (5.2, 3.2)


def plot_curves(
    metrics_path: str | os.PathLike[str],
    png_path: str | os.PathLike[str],
    panels: Sequence[str | Sequence[str]],
    *,
    title: str = "",
) -> None:
    """Draws metrics over steps and writes a PNG.

    A metric of training is drawn as measured, pale, under its running mean, since rewards of single steps are
    noisy. A metric of evaluation (`eval/…`) is drawn as its points, joined, the last one labelled.

    Args:
        metrics_path: The run's `metrics.jsonl`.
        png_path: The picture to write.
        panels: One entry a panel, side by side: the name of a metric, or several names to draw together.
        title: Text above the panels.

    Raises:
        ValueError: If no panel is given, or a metric is not in the file.
    """
    require("matplotlib")
    # Not pyplot: it would keep the figure, and choose a back end, for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("plot_curves needs the name of at least one metric in panels")
    lines = read_metrics(metrics_path)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    FigureCanvasAgg(figure)
    for index, panel in enumerate(panels):
        names = [panel] if isinstance(panel, str) else list(panel)
        axes = figure.add_subplot(1, len(panels), index + 1)
        for color, name in zip(_COLORS * len(names), names, strict=False):
            steps, values = _series(lines, name, metrics_path)
            _draw(axes, steps, values, name, color)
        axes.set_xlabel("step")
        if len(names) == 1:
            axes.set_title(names[0], fontsize=10)
        else:
            axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    if title:
        figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.savefig(os.fspath(png_path), dpi=150)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values at each place, of those that are finite (NaN if none is)."""
    means = []
    for end in range(1, len(values) + 1):
        finite = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _series(lines: list[dict[str, Any]], name: str, path: str | os.PathLike[str]) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if name in line]
    if not points:
        known = sorted({key for line in lines for key in line} - {"step"})
        raise ValueError(f"no metric {name!r} in {path}; it has: {', '.join(known) or 'none'}")
    return [step for step, _ in points], [value for _, value in points]


def _draw(axes: Any, steps: list[int], values: list[float], name: str, color: str) -> None:
    if name.startswith("eval/"):
        axes.plot(steps, values, color=color, marker="o", markersize=5, linewidth=1.2, label=name)
        axes.annotate(
            f"{values[-1]:.3g}",
            (steps[-1], values[-1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=color,
        )
        return
    window = max(1, len(values) // 20)
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, running_mean(values, window), color=color, linewidth=1.8, label=name)
