"""The words of a command line: flags that stand for many settings (a file, a run, a preset), and those of one each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxrl_llm.checks import expand_home, nearest_name
from jaxrl_llm.launch.configure import OF_ONE_RUN, configure, read_file
from jaxrl_llm.launch.settings import CONFIG_FILE, check_resumed
from jaxrl_llm.launch.values import Words

ConfigT = TypeVar("ConfigT")

Presets = Mapping[str, Callable[[Any], Any]]
"""By name, what makes of an experiment's settings those of a published algorithm."""


def take_flag(args: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag on a command line, `None` without it, and the other arguments.

    Args:
        args: the command line.
        flag: with its dashes.

    Raises:
        ValueError: it is given twice, or without a value.
    """
    rest, values, arguments = [], [], iter(args)
    for argument in arguments:
        name, given, value = argument.partition("=")
        if name == flag:
            values.append(value if given else next(arguments, ""))
        else:
            rest.append(argument)
    if len(values) > 1:
        raise ValueError(f"{flag} is given {len(values)} times ({', '.join(values)}), and one would be lost: give one")
    if values and (not values[0] or values[0].startswith("--")):
        raise ValueError(f"{flag} needs a value: {flag}=…")
    return values[0] if values else None, rest


def take_file(config: ConfigT, args: Sequence[str], presets: Presets) -> tuple[ConfigT, list[str]]:
    """`config` with the settings of the file that `--config` names, or of the run that `--resume` does.

    Of a run's `config.json` everything is taken but its folder; `--resume=RUN` goes on with it in that folder.

    Returns:
        The settings, and the other arguments.

    Raises:
        ValueError: there is no such run, or the file's settings are none of `config`.
    """
    run, args = _take_run(args) if hasattr(config, "resume") else (None, list(args))
    file, args = take_flag(args, "--config")
    if run is not None and file is not None:
        raise ValueError(f"--resume={run} has its own settings: leave --config={file} out")
    if run is not None:
        if any(argument == "--resume" or argument.startswith("--resume=") for argument in args):
            raise ValueError("--resume is given twice, and one run would be lost: give one")
        file = _settings_of(Path(run))
        args = [*args, "--resume", f"--run-dir={run}"]
    if file is None:
        return config, args
    settings = {name: value for name, value in read_file(expand_home(file)).items() if name not in OF_ONE_RUN}
    if run is not None:
        _check_stage(config, settings.get("objective.part"), presets, run)
    preset = settings.pop("preset", None)
    try:
        return configure(config if preset is None else with_preset(config, preset, presets), settings), args
    except ValueError as error:
        if run is not None:
            what = str(error).partition(";")[0]
            raise ValueError(f"{file} cannot be gone on with: {what}; is it a run of another command?") from error
        raise ValueError(f"{file}: {error}") from error


def _take_run(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """The run that `--resume` names, if it names one."""
    args = list(args)
    for place, argument in enumerate(args):
        if argument == "--resume=":
            raise ValueError("--resume needs the folder of a run: --resume=RUN")
        if argument.startswith("--resume="):
            return expand_home(argument.partition("=")[2]), args[:place] + args[place + 1 :]
        following = args[place + 1 : place + 2]
        if argument == "--resume" and following and not following[0].startswith("-"):
            return expand_home(following[0]), args[:place] + args[place + 2 :]
    return None, args


def _settings_of(run: Path) -> str:
    """The file of a run's settings."""
    path = run / CONFIG_FILE
    if (above := run.parent / CONFIG_FILE).is_file() and not path.is_file() and "run_dir" in read_file(above):
        raise ValueError(f"--resume={run} is a part of a run: give --resume={run.parent}")
    if not path.is_file():
        check_resumed(run, None)
        if runs := sorted(str(found.parent) for found in run.glob(f"*/{CONFIG_FILE}")):
            raise ValueError(f"--resume={run} is a folder of runs: give one, as --resume={runs[-1]}")
        raise ValueError(f"--resume={run}: it has no {CONFIG_FILE}; give its settings and --run-dir={run} --resume")
    if "run_dir" not in read_file(path):
        raise ValueError(f"--resume={run}: its {CONFIG_FILE} is no run's; to start from this model, give --model={run}")
    return str(path)


def _check_stage(config: Any, kind: str | None, presets: Presets, run: str) -> None:
    """Refuses to go on with a run whose objective this command has under no name: its model may have another head."""
    if kind is None or not hasattr(config, "objective"):
        return
    known = {type(own.objective).__name__ for own in (config, *(preset(config) for preset in presets.values()))}
    if kind not in known:
        raise ValueError(f"{run} is a run of another command: its objective is {kind}, and here {', '.join(known)}")


def with_preset(config: ConfigT, named: str, presets: Presets) -> ConfigT:
    """`config` with a published algorithm; a dash in its name is as good as an underscore.

    Raises:
        ValueError: there is none of that name (names the nearest), or none at all.
    """
    name = str(named).replace("-", "_")
    if not presets:
        raise ValueError(f"--preset={named}: this has no presets; leave it out")
    if name not in presets:
        raise ValueError(
            f"no preset is named {named!r}{nearest_name(name, [*presets])}; there are {', '.join(presets)}"
        )
    return presets[name](config)


def read_words(args: Sequence[str]) -> dict[str, Words]:
    """What a command line gives each setting: `--a.b 1 2` or `--a.b=1`, with dashes or underscores.

    Of a flag that is there twice the last one holds, so that a script's line can be changed at its end.

    Raises:
        ValueError: a word belongs to no flag.
    """
    found: dict[str, list[str]] = {}
    words: list[str] | None = None
    for argument in args:
        if argument[0:1] in _TYPOGRAPHIC:
            plain = argument.lstrip("".join(_TYPOGRAPHIC))
            raise ValueError(f"{argument!r} begins with a dash of print, as texts that are copied do: write --{plain}")
        if argument.startswith("--") and not argument.strip("-"):
            raise ValueError(f"{argument!r} names no setting: a value of dashes is given as --name={argument}")
        if not argument.startswith("--"):
            if words is None:
                raise ValueError(f"{argument!r} belongs to no flag: settings are given as --name=value")
            words.append(argument)
            continue
        flag, joined, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        words = found[name] = [value] if joined else []
        words = None if joined else words
    return {name: Words(given) for name, given in found.items()}


_TYPOGRAPHIC = ("–", "—", "‒", "―")
"""Dashes that word processors and pages put in place of --."""


def as_flag(path: str) -> str:
    """The flag of a setting."""
    return f"--{path.replace('_', '-')}"
