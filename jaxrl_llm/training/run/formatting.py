"""Text for people: short numbers, durations, trends, and sampled text made safe to print."""

from __future__ import annotations

import math
from collections.abc import Iterable

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Iterable[float], width: int) -> str:
    """The values as a row of at most `width` bars, from their least to their greatest.

    Longer series are averaged over equal parts. A value that is not finite is a blank.
    """
    values = list(values)
    count = min(width, len(values))
    bins = []
    for index in range(count):
        part = values[index * len(values) // count : (index + 1) * len(values) // count]
        finite = [value for value in part if math.isfinite(value)]
        bins.append(sum(finite) / len(finite) if finite else math.nan)
    finite = [value for value in bins if math.isfinite(value)]
    if not finite:
        return " " * count
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        " " if math.isnan(value) else _BARS[round((value - low) / span * 7) if span else 3] for value in bins
    )


def printable(text: str, newline: str) -> str:
    """Line breaks as `newline`; other control characters (a model may sample escape codes) as escapes."""
    return "".join(
        newline if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def clip(text: str, limit: int) -> str:
    """Cuts the middle: how a prompt ends and how a completion ends both matter."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 3]} ... {text[-(limit - limit // 3) :]}"


def short_number(value: float) -> str:
    """Three significant digits, or whole thousands with separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 and math.isfinite(value) else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as "42s", "3m05s" or "2h10m"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
