"""What a setting may be: the checks of all records, and the nearest of the names that there are."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any, get_args


def check_fields(prefix: str, record: object, **conditions: tuple[bool, str]) -> None:
    """Raises ValueError for the first field whose condition does not hold: `name=(holds, wanted)`."""
    for field, (holds, wanted) in conditions.items():
        if not holds:
            raise ValueError(f"{prefix}.{field}={getattr(record, field)!r} must {wanted}")


def one_of(value: Any, choices: Any) -> tuple[bool, str]:
    """The condition that a value is one of a `Literal`."""
    return value in get_args(choices), f"be one of {get_args(choices)}"


def not_negative(value: float) -> tuple[bool, str]:
    """The condition that a number is finite and at least 0."""
    return 0 <= value < math.inf, "not be negative"


def positive(value: float | None, *, optional: bool = False) -> tuple[bool, str]:
    """The condition that a number is finite and above 0, or `None` where that is allowed."""
    if value is None:
        return optional, "be positive"
    return 0 < value < math.inf, "be None, or positive" if optional else "be positive"


def share(value: float) -> tuple[bool, str]:
    """The condition that a number is in [0, 1]."""
    return 0 <= value <= 1, "be between 0 and 1"


def nearest_name(name: str, names: Sequence[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the name most like `name`, or an empty string if none is alike."""
    by_lower = {known.lower(): known for known in names}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[matches[0]]!r}?" if matches else ""
