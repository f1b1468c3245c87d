"""The flag `--preset=NAME`, which is read before the others, wherever it stands: they belong to what it names."""

from __future__ import annotations

from collections.abc import Sequence

from jaxrl_llm.checks import nearest_name


def take_preset(args: Sequence[str], names: Sequence[str]) -> tuple[str | None, list[str]]:
    """The preset that a command line names, `None` without one, and the other arguments.

    Args:
        args: the command line.
        names: of all presets; a dash is as good as an underscore.

    Raises:
        ValueError: there is no such preset; names the nearest.
    """
    rest, name, arguments = [], None, iter(args)
    for argument in arguments:
        flag, given, value = argument.partition("=")
        if flag != "--preset":
            rest.append(argument)
        else:
            name = value if given else next(arguments, "")
    if name is None:
        return None, rest
    wanted = name.replace("-", "_")
    if wanted not in names:
        raise ValueError(f"no preset is named {name!r}{nearest_name(wanted, names)}; there are {', '.join(names)}")
    return wanted, rest
