from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.text import Text

from jaxrl_llm.training.run.report import Report, SampledCompletion

METRICS = {
    "reward": 0.5,
    "reward_std": 0.25,
    "rewards/correct/mean": 0.4,
    "rewards/format/mean": 0.1,
    "loss": 1e-9,
    "kl": 0.001,
    "completions/mean_length": 12.0,
    "perf/tokens_per_second": 2345.6,
    "perf/sample_seconds": 1.0,
    "perf/update_seconds": 2.0,
    "never/shown": 1.0,
}
HOSTILE = SampledCompletion("2+2 [bold]?[/bold]", "[/red] four\x1b[2J\nend", 1.0)


def clock() -> Iterator[float]:
    """The compiling first step ends at 100 s; from then on a step takes 3 s."""
    yield from (100.0 + 3.0 * step for step in range(1000))


def plain_report(encoding: str = "utf-8", **settings: object) -> tuple[Report, io.BytesIO]:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding, write_through=True), width=40)
    ticks = clock()
    return Report(10, console=console, clock=lambda: next(ticks), **settings), raw  # type: ignore[arg-type]


def live_report() -> tuple[Report, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=60, _environ={"TERM": "xterm"})
    return Report(10, console=console, title="run [1]"), out


def test_plain_output_is_one_line_a_step_without_escape_codes() -> None:
    report, raw = plain_report()
    with report:
        report.phase("sampling")
        report.log(1, METRICS)
        report.log(2, METRICS)
    lines = raw.getvalue().decode().splitlines()
    assert lines[0] == (
        "step 1/10 | reward 0.5 (std 0.25) | rewards/correct 0.4 | rewards/format 0.1 | kl 0.001 | length 12"
        " | tok/s 2,346 | seconds: sample 1, update 2"
    )
    # Eight steps of three seconds: the compiling one does not count.
    assert lines[1] == lines[0].replace("1/10", "2/10") + " | 24s left"
    assert len(lines) == 2


def test_plain_evaluation_and_resumed_start() -> None:
    report, raw = plain_report(start_step=4)
    with report:
        report.log(4, {"eval/accuracy": 0.75})
        report.log(5, {"loss": 0.5})
        report.log(6, {"loss": 0.5})
    assert raw.getvalue().decode().splitlines() == [
        "step 4/10 | eval/accuracy 0.75",
        "step 5/10 | loss 0.5",  # it compiled
        "step 6/10 | loss 0.5 | 12s left",
    ]


def test_plain_lines_come_once_a_second_but_evaluations_and_the_last_step_always() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="utf-8", write_through=True), width=40)
    ticks = iter([0.0, 0.4, 0.5, 1.1, 1.2, 1.3])
    with Report(5, console=console, clock=lambda: next(ticks), samples_every=0) as report:
        report.log(1, {"kl": 0.1})
        report.log(2, {"kl": 0.2})
        report.log(2, {"eval/reward": 0.5, "eval/rewards/correct": 0.5})
        report.log(3, {"kl": 0.3})
        report.log(4, {"kl": 0.4})
        report.log(5, {"kl": 0.5})
    shown = [line.split(" | ")[:2] for line in raw.getvalue().decode().splitlines()]
    assert shown == [
        ["step 1/5", "kl 0.1"],
        ["step 2/5", "eval/reward 0.5"],
        ["step 3/5", "kl 0.3"],
        ["step 5/5", "kl 0.5"],
    ]


def test_a_notebook_has_one_line_that_changes_and_those_that_stay(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 10))
    with Report(4, console=Console(force_jupyter=True), clock=lambda: next(clock)) as report:
        report.message("begins")
        report.log(1, {"reward": 0.12345})
        report.log(2, {"reward": 0.5})
        report.message("a remark")
        report.log(3, {"reward": 0.5})
        report.log(3, {"eval/reward": 0.25})
        report.log(4, {"reward": 1.0})
    shown = [line.rpartition("\r")[2].rstrip() for line in capsys.readouterr().out.rstrip("\n").split("\n")]
    assert shown[0] == "begins" and shown[2] == "a remark" and len(shown) == 5
    assert [line.partition(" |")[0] for line in shown[1:] if line.startswith("step")] == [
        "step 2/4",
        "step 3/4",
        "step 4/4",
    ]
    assert "eval/reward 0.25" in shown[3]


def test_plain_samples_come_every_n_steps_and_cannot_steer_the_terminal() -> None:
    report, raw = plain_report(samples_every=5)
    with report:
        assert [step for step in range(11) if report.wants_samples(step)] == [0, 5, 10]
        report.samples(4, [HOSTILE])
        assert raw.getvalue() == b""
        report.samples(5, [HOSTILE])
    assert raw.getvalue().decode().splitlines() == [
        "  reward 1",
        "    prompt:     2+2 [bold]?[/bold]",
        "    completion: [/red] four\\x1b[2J⏎end",
    ]


def test_plain_output_in_ascii() -> None:
    report, raw = plain_report(encoding="ascii", samples_every=1)
    with report:
        report.log(1, METRICS)
        report.samples(1, [SampledCompletion("∑", "a\nb", 0.0)])
        report.message("saved → folder")
    assert (
        raw.getvalue()
        .decode("ascii")
        .endswith("    prompt:     \\u2211\n    completion: a\\nb\nsaved \\u2192 folder\n")
    )


def test_live_view_shows_metrics_trends_and_samples_as_they_are() -> None:
    report, out = live_report()
    with report:
        for step in range(1, 4):
            report.phase("update")
            report.log(step, METRICS | {"reward": step / 4})
        report.log(3, {"eval/accuracy": 0.875})
        report.samples(3, [HOSTILE])
        report.message("a [warning] that stays")
    text = Text.from_ansi(out.getvalue()).plain
    assert "\x1b[2J" not in out.getvalue()
    last = text[text.rindex("run [1]") :]
    for shown in ("update", "3/10", "▁▅█", "0.75", "eval/accuracy", "0.875", "step 3", "sample 1 · update 2"):
        assert shown in last, shown
    for shown in ("completions of step 3", "2+2 [bold]?[/bold]", "[/red] four\\x1b[2J⏎end"):
        assert shown in last, shown
    assert "never/shown" not in text
    assert "a [warning] that stays" in text


def test_live_view_ends_with_an_error_inside() -> None:
    report, out = live_report()
    with pytest.raises(RuntimeError, match="boom"), report:
        report.log(1, METRICS)
        raise RuntimeError("boom")
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Report(10, enabled=False, samples_every=1) as report:
        report.phase("sampling")
        report.log(1, METRICS)
        report.samples(1, [HOSTILE])
        report.message("hello")
        assert not report.wants_samples(1)
    report.summary("Done", [("accuracy", "1")], next_steps=["more"])
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with Report(10) as report:
        report.log(1, {"loss": 0.5})
    assert capsys.readouterr().out == "step 1/10 | loss 0.5\n"


SUMMARY = [("accuracy before", "41 %"), ("after", "93 %"), ("files", "/a/rather/long/path/" + "x" * 60)]


def test_summary() -> None:
    report, raw = plain_report()
    report.summary("Learned [x]", SUMMARY, next_steps=["python train.py --steps=200"])
    assert raw.getvalue().decode().splitlines() == [
        "",
        "Learned [x]",
        "  accuracy before  41 %",
        "  after            93 %",
        f"  files            {SUMMARY[2][1]}",
        "",
        "Next:",
        "  python train.py --steps=200",
    ]
    report, out = live_report()
    report.summary("Learned [x]", SUMMARY)
    for shown in ("Learned [x]", "41 %", "93 %", SUMMARY[2][1]):
        assert shown in out.getvalue()


def test_a_run_outlives_who_reads_its_output() -> None:
    program = """
from jaxrl_llm.training.run.report import Report
with Report(3) as report:
    report.message("first")
    input()
    for step in range(1, 4):
        report.log(step, {"loss": 1.0})
    report.message("last")
print("what others print")
open(2, "w", closefd=False).write("at its end")
"""
    run = subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None and run.stdout.readline() == "first\n"
    run.stdout.close()
    run.stdout = None
    errors = run.communicate("go on\n", timeout=60)[1]
    assert run.returncode == 0
    assert errors == "Nobody reads the run's output any more; it goes on. Ctrl-C or SIGTERM stops it.\nat its end"
