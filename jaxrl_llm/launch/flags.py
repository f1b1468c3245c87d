"""The command line's flags: read by tyro, and the nearest named where one is misplaced."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import operator
import re
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import tyro

from jaxrl_llm.checks import check_idle
from jaxrl_llm.launch.errors import plain_errors
from jaxrl_llm.launch.settings import check_effects

ConfigT = TypeVar("ConfigT")


def read_flags(config: ConfigT, args: list[str] | None, description: str, *, own: Any = None) -> ConfigT:
    """`config` with the changes of `args` (`None`: the command line's).

    Flags without effect are refused. Of an unknown one tyro names the nearest only where its path is right; here its
    last part finds it elsewhere.

    Args:
        config: settings that the flags change.
        args: the command line.
        description: of the experiment, for `--help`.
        own: the experiment's own settings, where a flag that was read before has changed them to `config`.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            changed = tyro.cli(type(config), args=args, default=config, description=description)
    except SystemExit as stop:
        print(_one_line(said.getvalue()), end="", file=sys.stderr)
        if stop.code == 2:
            for hint in _hints(config, sys.argv[1:] if args is None else args):
                print(hint, file=sys.stderr)
        raise
    with plain_errors():
        check_effects(own or config, changed)
        check_idle(changed, config)
    return changed


def _one_line(said: str) -> str:
    """What tyro says of a value, without its frame and help; of unknown flags all, since it lists those alike."""
    lines = [line.strip(" │╭╮╰╯─") for line in said.splitlines()]
    if not lines or lines[0] not in ("Value error", "Invalid choice"):
        return said
    text = ["" if set(line) == {"-"} else line for line in lines[1:]]  # rules, where the terminal has ASCII alone
    message = itertools.takewhile(bool, itertools.dropwhile(operator.not_, text))  # a rule follows it
    return re.sub(r"^Error parsing (?!--)\S+: ", "", " ".join(message)).join(("error: ", "\n"))


def _hints(config: Any, args: list[str]) -> Iterator[str]:
    paths = sorted(_paths(config, ""), key=lambda path: -path.count("."))
    by_name = {path.rpartition(".")[2]: path for path in paths}  # of several alike, the outermost
    for flag in (arg.partition("=")[0] for arg in args if arg.startswith("--")):
        name = flag.removeprefix("--").replace("_", "-")
        nearest = difflib.get_close_matches(name.rpartition(".")[2], by_name, n=1)
        if nearest and name not in paths:
            yield f"{flag}: did you mean --{by_name[nearest[0]]}?"


def _paths(config: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(config):
        path, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _paths(value, path + ".")
        else:
            yield path
