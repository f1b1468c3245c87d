"""What a setting may be: the checks of all records, what has no effect, and the nearest of the names that there are."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, TypeVar, get_args

PathT = TypeVar("PathT", str, str | None)


def check_fields(prefix: str, record: object, **conditions: tuple[bool, str]) -> None:
    """Raises ValueError for the first field whose condition does not hold: `name=(holds, wanted)`."""
    for field, (holds, wanted) in conditions.items():
        if not holds:
            raise ValueError(f"{prefix}.{field}={getattr(record, field)!r} must {wanted}")


def one_of(value: Any, choices: Any) -> tuple[bool, str]:
    """The condition that a value is one of a `Literal`."""
    return value in get_args(choices), f"be one of {get_args(choices)}"


def finite(value: float) -> tuple[bool, str]:
    """The condition that a number is neither infinite nor NaN."""
    return math.isfinite(value), "be finite"


def count(value: int | None, *, least: int = 1) -> tuple[bool, str]:
    """The condition that a count is at least so much, and no more than 32 bits hold; `None`, where allowed, is none."""
    if value is None or value >= 2**31:
        return value is None, f"be below {2**31}, which is what counters hold"
    return value >= least, f"be at least {least}"


def not_negative(value: float | None, *, optional: bool = False) -> tuple[bool, str]:
    """The condition that a number is finite and at least 0, or `None` where that is allowed."""
    return _number(value, lambda x: x >= 0, "not be negative", "be None, or not negative" if optional else None)


def positive(value: float | None, *, optional: bool = False) -> tuple[bool, str]:
    """The condition that a number is finite and above 0, or `None` where that is allowed."""
    return _number(value, lambda x: x > 0, "be positive", "be None, or positive" if optional else None)


def at_least(value: float | None, least: float, *, optional: bool = False) -> tuple[bool, str]:
    """The condition that a number is finite and not below a bound, or `None` where that is allowed."""
    wanted = f"at least {least}"
    return _number(value, lambda x: x >= least, f"be {wanted}", f"be None, or {wanted}" if optional else None)


def share(value: float) -> tuple[bool, str]:
    """The condition that a number is in [0, 1]."""
    return 0 <= value <= 1, "be between 0 and 1"


def below_one(value: float | None, *, optional: bool = False) -> tuple[bool, str]:
    """The condition that a number is in [0, 1), or `None` where that is allowed."""
    wanted = "at least 0 and below 1"
    return _number(value, lambda x: 0 <= x < 1, f"be {wanted}", f"be None, or {wanted}" if optional else None)


def _number(value: float | None, holds: Callable[[float], bool], wanted: str, or_none: str | None) -> tuple[bool, str]:
    """A condition on a finite number; `or_none` is what is wanted where `None` will do as well."""
    wanted = or_none or wanted
    if value is None:
        return or_none is not None, wanted
    return (holds(value), wanted) if math.isfinite(value) else (False, f"be finite, and {wanted.removeprefix('be ')}")


def expand_home(path: PathT) -> PathT:
    """A path given as a setting, with `~` or `~name` at its beginning written out; `None` stays `None`."""
    return os.path.expanduser(path) if isinstance(path, str) else path  # pyright: ignore[reportReturnType]


def check_idle(config: Any, default: Any, prefix: str = "") -> None:
    """Raises ValueError where `config` differs from `default` in a setting that changes nothing as the others are.

    A record says which of its settings these are: its property `without_effect` maps their dotted paths to what is
    missing. What the default holds is never refused, since who took it over has not asked for it; a record that is
    there of a kind of its own is compared with one of its kind.
    """
    if not dataclasses.is_dataclass(config):
        return
    if type(default) is not type(config):
        default = SimpleNamespace(**{field.name: field.default for field in dataclasses.fields(config)})
    for path, missing in getattr(config, "without_effect", {}).items():
        read = attrgetter(path)
        for changed, value in changes(read(config), read(default), prefix + path):
            raise ValueError(f"{changed}={value!r} would have no effect: {missing}")
    for name in [field.name for field in dataclasses.fields(config)]:
        check_idle(getattr(config, name), getattr(default, name), f"{prefix}{name}.")


def changes(record: Any, default: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The dotted paths of the settings in which two records of a kind, or two values, differ, and the first's value."""
    if dataclasses.is_dataclass(record) and type(record) is type(default):
        for field in dataclasses.fields(record):
            yield from changes(getattr(record, field.name), getattr(default, field.name), f"{path}.{field.name}")
    elif record != default:
        yield path, record


def nearest_name(name: str, names: Sequence[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the name most like `name`, or an empty string if none is alike."""
    by_lower = {known.lower(): known for known in names}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[matches[0]]!r}?" if matches else ""
