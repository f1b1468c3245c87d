"""Flags that are read before the others, wherever they stand, since these belong to what `--preset=NAME` names."""

from __future__ import annotations

from collections.abc import Sequence

from jaxrl_llm.checks import nearest_name


def take_preset(args: Sequence[str], names: Sequence[str]) -> tuple[str | None, list[str]]:
    """The preset that a command line names, `None` without one, and the other arguments.

    Args:
        args: the command line.
        names: of all presets; a dash is as good as an underscore.

    Raises:
        ValueError: there is no such preset (names the nearest), or two are named.
    """
    named, rest = take_flag(args, "--preset")
    if named is None:
        return None, rest
    name = named.replace("-", "_")
    if name not in names:
        raise ValueError(f"no preset is named {named!r}{nearest_name(name, names)}; there are {', '.join(names)}")
    return name, rest


def take_flag(args: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag on a command line, `None` without it, and the other arguments.

    Args:
        args: the command line.
        flag: with its dashes.

    Raises:
        ValueError: it is given twice.
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
    return values[0] if values else None, rest
