"""Values as the types of settings say: of a command line's words, and of what JSON, YAML or Python give."""

from __future__ import annotations

import contextlib
import functools
import json
import types
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class Words(tuple[str, ...]):
    """What a command line gives a setting; none where a flag stands alone."""


@functools.cache
def get_hints(kind: type) -> dict[str, Any]:
    """The types of a record's fields."""
    return get_type_hints(kind)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, `None` first and text last, since a text may be anything."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(sorted(kinds, key=lambda kind: (kind is not type(None), kind is str)))


def origin_of(kind: Any) -> Any:
    """What a type is made of: `tuple` of `tuple[int, ...]`, itself of one that is not made of others."""
    return get_origin(kind) or kind


def as_value(kind: Any, value: Any, before: Any = None) -> Any:
    """`value` as one of type `kind`.

    Raises:
        TypeError: it is none.
    """
    if origin_of(kind) is tuple:
        return _as_tuple(get_args(kind), value, before)
    if isinstance(value, Words):
        if not value and kind is bool:
            return True
        if len(value) != 1:
            raise TypeError(kind)
        return _read_word(kind, value[0])
    origin = origin_of(kind)
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    elif kind is float:
        if isinstance(value, str):  # YAML reads 1e-5 as a text
            return _number(float, value)
        fits = _is_a(Real, value)
    elif kind is int:
        fits = _is_a(Integral, value)
    elif origin is Callable:
        fits = callable(value)
    else:
        fits = not isinstance(origin, type) or kind is Any or isinstance(value, origin)
    if not fits:
        raise TypeError(kind)
    return kind(value) if kind in (int, float) else value


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value is such a number, of Python or of numpy; a truth value is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _read_word(kind: Any, word: str) -> Any:
    """What a word of a command line is as a value of type `kind`; raises TypeError if it is none."""
    if kind in (str, Any):
        return word
    if kind in (int, float):
        return _number(kind, word)
    if origin_of(kind) is dict:
        return _read_object(word)
    named: dict[str, Any] = {}
    if kind is bool:
        named = {"true": True, "false": False}
        word = word.lower()
    elif kind is type(None):
        named = {"None": None, "none": None}
    elif origin_of(kind) is Literal:
        named = {str(choice): choice for choice in get_args(kind)}
    if word not in named:
        raise TypeError(kind)
    return named[word]


def _read_object(word: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(word), dict):
            return found
    raise TypeError(word)


def _number(kind: type[int] | type[float], text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise TypeError(text) from None


def _as_tuple(kinds: tuple[Any, ...], value: Any, before: Any) -> tuple[Any, ...]:
    """A sequence as a tuple; functions that `before` holds are known by their names."""
    if not isinstance(value, list | tuple):
        raise TypeError(kinds)
    known = {getattr(item, "__name__", None): item for item in before or ()}
    values = [known.get(item, item) if isinstance(item, str) else item for item in value]
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(values)
    if len(kinds) != len(values):
        raise TypeError(kinds)
    words = isinstance(value, Words)
    return tuple(_item(kind, item, word=words) for kind, item in zip(kinds, values, strict=True))


def _item(hint: Any, value: Any, *, word: bool) -> Any:
    """One of several values of a setting."""
    for kind in alternatives(hint):
        with contextlib.suppress(TypeError):
            return as_value(kind, Words([value]) if word and isinstance(value, str) else value)
    raise TypeError(hint)


def described(kind: Any) -> str:
    """A type in words."""
    origin = origin_of(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if origin is tuple:
        return f"a list, each {' or '.join(described(inner) for inner in alternatives(get_args(kind)[0]))}"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "None"}
    words |= {dict: "a JSON object", Callable: "a function"}
    return words.get(origin, getattr(kind, "__name__", str(kind)))
