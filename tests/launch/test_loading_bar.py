"""What is said of a checkpoint while it is read."""

import io
import itertools

from rich.console import Console

from jaxrl_llm.launch.loading_bar import LoadingBar


def shown(console: Console, seconds_a_piece: float, pieces: int = 40) -> None:
    clock = itertools.count(0.0, seconds_a_piece)
    with LoadingBar("llama", pieces * 10**6, console=console, clock=lambda: next(clock)) as bar:
        for _ in range(pieces):
            bar(10**6)


def test_lines_now_and_then_where_there_is_no_terminal():
    out = io.StringIO()
    shown(Console(file=out), 1.0)
    lines = out.getvalue().splitlines()
    assert lines[0] == "loading llama: 1 MB of 40 MB" and len(lines) == 5
    assert lines[-1].strip() == "loaded llama: 40 MB in 41s"


def test_what_is_quick_is_not_told():
    out = io.StringIO()
    shown(Console(file=out), 0.01)
    assert not out.getvalue()


def test_a_bar_on_a_terminal_goes_again():
    out = io.StringIO()
    shown(Console(file=out, force_terminal=True, width=100), 1.0)
    assert "loading llama" in out.getvalue() and out.getvalue().endswith("\x1b[2K")


def test_one_line_in_a_notebook(capsys):
    shown(Console(force_jupyter=True), 1.0)
    assert capsys.readouterr().out.count("\n") == 1
