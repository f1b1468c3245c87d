"""What an entry of a file that describes a model may be: its type, its range and what it means, said in one form.

`config.json`, the metadata of GGUF files, `adapter_config.json` and `generation_config.json` each have a table of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Json = Mapping[str, Any]
Table = Mapping[str, "Entry"]

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 4, 4, 80, 80


@dataclasses.dataclass(frozen=True)
class Entry:
    """What one entry may be."""

    holds: Callable[[Any], bool]
    """Whether a value may be meant."""
    wanted: str
    """The values that may be meant, in words."""
    meaning: str = ""
    """What the entry says, for who has to mend it."""

    def or_null(self) -> Entry:
        """The same, where null stands for an entry that is not there."""
        holds = self.holds
        return Entry(lambda value: value is None or holds(value), f"{self.wanted}, or null", self.meaning)


def whole(meaning: str, low: int, high: int) -> Entry:
    """A whole number, both ends included; `true` and `2.0` are none."""
    wanted = f"a whole number from {low} to {high}"
    return Entry(lambda value: _is_whole(value) and low <= value <= high, wanted, meaning)


def number(meaning: str, low: float, high: float) -> Entry:
    """A finite number, both ends included; `true` is none."""
    wanted = f"a number from {low:g} to {high:g}"
    return Entry(lambda value: _is_number(value) and low <= value <= high, wanted, meaning)


def number_between(meaning: str, low: float, high: float) -> Entry:
    """A finite number, neither end included; `true` is none."""
    wanted = f"a number above {low:g} and below {high:g}"
    return Entry(lambda value: _is_number(value) and low < value < high, wanted, meaning)


def truth(meaning: str) -> Entry:
    """`true` or `false`; 0, 1 and texts are neither."""
    return Entry(lambda value: isinstance(value, bool), "true or false", meaning)


def text(meaning: str) -> Entry:
    """A text that is not empty."""
    return Entry(lambda value: isinstance(value, str) and value != "", "a text that is not empty", meaning)


def one_of(meaning: str, *values: str | bool | float) -> Entry:
    """One of a few values."""

    # Compared with their types, for 0 == False, and without hashes, which lists lack.
    def holds(value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in values)

    return Entry(holds, f"one of {', '.join(str(value) for value in values)}", meaning)


def mapping(meaning: str) -> Entry:
    """A JSON object."""
    return Entry(lambda value: isinstance(value, dict), "an object", meaning)


def list_of(entry: Entry) -> Entry:
    """A list, each element of which holds."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and all(map(entry.holds, value))

    return Entry(holds, f"a list, each element {entry.wanted}", entry.meaning)


def one_or_list_of(entry: Entry) -> Entry:
    """A value, or a list of them."""
    several = list_of(entry)
    wanted = f"{entry.wanted}, or a list of such"
    return Entry(lambda value: entry.holds(value) or several.holds(value), wanted, entry.meaning)


def check_entries(entries: Json, table: Table, prefix: str = "") -> None:
    """Checks the entries that are there and that the table knows.

    Args:
        entries: of a file.
        table: what they may be, by name.
        prefix: of the names, in the error.

    Raises:
        ValueError: an entry is none of the values that may be meant; says which these are.
    """
    for key, entry in table.items():
        if key in entries and not entry.holds(entries[key]):
            meaning = f" ({entry.meaning})" if entry.meaning else ""
            raise ValueError(f"{prefix}{key}={shown(entries[key])} must be {entry.wanted}{meaning}")


def require(entries: Json, key: str, prefix: str = "") -> Any:
    """`entries[key]`, or an error that names the missing key."""
    if entries.get(key) is None:
        raise ValueError(f"{prefix}{key!r} is missing")
    return entries[key]


@contextlib.contextmanager
def errors_name(file: object) -> Iterator[None]:
    """Puts the file before what an error says of its entries."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def shown(value: Any) -> str:
    """A value as an error shows it: what is long, or nested deeply, is cut short."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # of whole numbers with thousands of digits
        return f"<{type(value).__name__} too long to be shown>"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
