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
        ValueError: there is no such preset (names the nearest), or two are named.
    """
    rest, named, arguments = [], [], iter(args)
    for argument in arguments:
        flag, given, value = argument.partition("=")
        if flag == "--preset":
            named.append(value if given else next(arguments, ""))
        else:
            rest.append(argument)
    if not named:
        return None, rest
    if len(named) > 1:
        raise ValueError(f"--preset is given {len(named)} times ({', '.join(named)}), and one would be lost: give one")
    name = named[0].replace("-", "_")
    if name not in names:
        raise ValueError(f"no preset is named {named[0]!r}{nearest_name(name, names)}; there are {', '.join(names)}")
    return name, rest
