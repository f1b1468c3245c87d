"""JSON as its standard has it: what Python's reader lets pass and a row cannot mean is refused, with its place."""

from __future__ import annotations

import json
import math
from typing import Any

_SHOWN = 200
_DIGITS = 4300
"""Digits of the longest integer that Python reads."""


def parse_json(text: str, place: str) -> Any:
    """The value that `text` is.

    Python's reader takes NaN and infinities, which JSON has not, and of two entries with one name silently the last.

    Args:
        text: the whole of it.
        place: file and line, for errors.

    Raises:
        ValueError: it is not JSON, holds a number that is none or too large, names an entry twice, or is nested too
            deep; names place, reason and text.
    """
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    try:
        return json.loads(
            text, parse_constant=_constant, parse_float=_float, parse_int=_integer, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{place}: not valid JSON ({error.msg}, {where}): {shown}") from error
    except RecursionError as error:
        raise ValueError(f"{place}: nested too deep to be read; write it flatter: {shown}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}: {shown}") from error


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON; write null where there is none")


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is beyond the numbers that can be held; write it as text")
    return number


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits is beyond those that can be read; write it as text")
    return int(digits)


def _object(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(entries)
    if len(row) < len(entries):
        names = [name for name, _ in entries]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the entry {twice!r} is there twice, and only one can be meant; leave one out")
    return row
