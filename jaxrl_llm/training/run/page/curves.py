"""Metrics over steps in bounded memory: long curves become means, least and greatest values of equal parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

POINTS = 400
"""Points of a curve at most."""


@dataclasses.dataclass
class Point:
    """The values of some neighbouring steps."""

    first: int
    """Step of the first one."""
    total: float
    count: int
    least: float
    greatest: float

    @classmethod
    def of(cls, step: int, value: float) -> Point:
        """One value."""
        return cls(step, value, 1, value, value)

    def join(self, other: Point) -> None:
        """Takes those of later steps in."""
        self.total, self.count = self.total + other.total, self.count + other.count
        self.least, self.greatest = min(self.least, other.least), max(self.greatest, other.greatest)


class Curve:
    """One metric. A point stands for `width` steps, which doubles whenever there would be too many points."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.width, self.not_finite = 1, 0
        self.first: float | None = None
        self.last: tuple[int, float] = (0, math.nan)

    def add(self, step: int, value: float) -> None:
        """Adds the value of a step that is not before the last one."""
        self.last = step, value
        if not math.isfinite(value):
            self.not_finite += 1
            return
        if self.first is None:
            self.first = value
        self._put(Point.of(step, value))
        if len(self.points) > POINTS:
            self.width *= 2
            points, self.points = self.points, []
            for point in points:
                self._put(point)

    def _put(self, point: Point) -> None:
        if self.points and self.points[-1].first // self.width == point.first // self.width:
            self.points[-1].join(point)
        else:
            self.points.append(point)


class Curves:
    """All metrics of a run."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.last_step = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line of `metrics.jsonl`."""
        step = line["step"]
        self.last_step = max(self.last_step, step)
        for name, value in line.items():
            if name != "step":
                self.curves.setdefault(name, Curve()).add(step, float(value))

    def data(self) -> dict[str, Any]:
        """As JSON has it.

        Returns:
            `axes`: lists of steps, which curves share; `curves` by name: `axis` (the number of one), `mean`, where a
            point is of several steps `least` and `greatest`, `first` and `last` value, how many were `not_finite`.
        """
        axes: dict[tuple[int, ...], int] = {}
        curves = {}
        for name in sorted(self.curves):
            curve = self.curves[name]
            steps = tuple(point.first for point in curve.points)
            told: dict[str, Any] = {"axis": axes.setdefault(steps, len(axes))}
            told["mean"] = [rounded(point.total / point.count) for point in curve.points]
            if any(point.count > 1 for point in curve.points):
                told["least"] = [rounded(point.least) for point in curve.points]
                told["greatest"] = [rounded(point.greatest) for point in curve.points]
            told |= {"first": rounded(curve.first), "last": rounded(curve.last[1]), "not_finite": curve.not_finite}
            curves[name] = told
        return {"axes": [list(steps) for steps in axes], "curves": curves}


def rounded(value: float | None, digits: int = 5) -> float | None:
    """A number to be looked at; `None` for what is none."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")
