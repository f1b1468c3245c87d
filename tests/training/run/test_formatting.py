from __future__ import annotations

import math

from jaxrl_llm.training.run.formatting import clip, duration, printable, short_number, sparkline


def test_sparkline_spans_least_to_greatest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0], 8) == "▄▄"
    assert sparkline([], 8) == ""


def test_sparkline_averages_long_series_and_skips_what_is_not_finite() -> None:
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([0, math.nan, 1], 3) == "▁ █"
    assert sparkline([math.nan, math.inf], 2) == "  "
    assert len(sparkline(range(1001), 32)) == 32


def test_printable_shows_control_characters() -> None:
    assert printable("a\nb", "⏎") == "a⏎b"
    assert printable("\x1b[2J\t\r\u202e\ud800", "⏎") == r"\x1b[2J\t\r\u202e\ud800"
    assert printable("naïve 数学 ∑", "⏎") == "naïve 数学 ∑"


def test_clip_keeps_both_ends() -> None:
    assert clip("short", 10) == "short"
    clipped = clip("a" * 50 + "z" * 50, 30)
    assert clipped == "a" * 10 + " ... " + "z" * 20


def test_numbers_and_durations() -> None:
    assert [short_number(x) for x in (0.123456, 12345.6, math.nan, math.inf)] == [
        "0.123",
        "12,346",
        "nan",
        "inf",
    ]
    assert [duration(x) for x in (42.4, 185, 7830)] == ["42s", "3m05s", "2h10m"]
