"""An experiment's settings with the changes of a command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar

from jaxrl_llm.checks import check_idle
from jaxrl_llm.launch.configure import configure
from jaxrl_llm.launch.errors import plain_errors
from jaxrl_llm.launch.help_page import help_page
from jaxrl_llm.launch.settings import check_effects
from jaxrl_llm.launch.words import Presets, as_flag, read_words, take_file, take_flag, with_preset

ConfigT = TypeVar("ConfigT")


def read_flags(
    config: ConfigT, args: Sequence[str] | None, description: str, *, presets: Presets | None = None
) -> ConfigT:
    """`config` with the changes of a command line: of a file (`--config`), a preset, and flags, in this order.

    What is wrong (an unknown setting, a value that it cannot have, one without effect) ends the program with one line
    that names the way out. `--help` prints the settings that are set most, `--help-all` all of them.

    Args:
        config: settings that the flags change.
        args: the command line; `None`: the program's own.
        description: of the experiment, for `--help`.
        presets: what `--preset` may name.
    """
    args, presets = sys.argv[1:] if args is None else list(args), presets or {}
    with plain_errors():
        own, args = take_file(config, args, presets)
        preset, args = take_flag(args, "--preset")
        config = own if preset is None else with_preset(own, preset, presets)
        if asked := {"-h", "--help", "--help-all"}.intersection(args):
            print(help_page(config, program(), description, list(presets), everything="--help-all" in asked))
            raise SystemExit(0)
        changed = configure(config, read_words(args), spelled=as_flag)
        check_effects(own, changed)
        check_idle(changed, config)
    return changed


def program() -> str:
    """How the command line begins."""
    name = sys.argv[0]
    return f"python {name}" if name.endswith(".py") else name
