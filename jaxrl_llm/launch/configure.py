"""Other values of settings: a command line's, a file's, an earlier run's, keywords; checked by the records' types.

A command line has words, which become what the type of their setting says; all others have values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from jaxrl_llm.checks import nearest_name
from jaxrl_llm.launch.short_names import hint, paths_of, setting_paths

ConfigT = TypeVar("ConfigT")

PART = "part"
"""The key that says of which class a record is, where it could be of several."""

OF_ONE_RUN = ("run_dir", "resume")
"""Settings that a run's `config.json` holds and that another run does not take over."""


def read_file(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML or JSON file, nested or under dotted names.

    Args:
        path: its name ends in .yaml, .yml or .json.

    Raises:
        ValueError: it holds no mapping, or cannot be read as what its name says.
        FileNotFoundError: it is not there.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"--config={path}: settings are read from files whose names end in .yaml, .yml or .json")
    if not path.is_file():
        raise FileNotFoundError(f"--config={path}: there is no such file")
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config={path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--config={path} must hold settings by their names, not {type(found).__name__}")
    return found


class Words(tuple[str, ...]):
    """What a command line gives a setting; none where a flag stands alone."""


def configure(config: ConfigT, settings: Mapping[str, Any], *, spelled: Callable[[str], str] = str) -> ConfigT:
    """`config` with other values of some settings.

    Args:
        config: a record of settings.
        settings: by dotted name (`optimizer.learning_rate`), nested, or by one of the short names
            (`jaxrl_llm.launch.short_names`), with dashes or underscores. Values are as JSON has them, records or
            functions, or the `Words` of a command line. What `config.json` of a run holds is such a mapping: `part` is
            then the class of a record.
        spelled: writes a setting's name as who gave it would.

    Raises:
        ValueError: a setting that there is not (names the nearest), a value of another type, two values of one setting.
    """
    tree: dict[str, Any] = {}
    given = [(paths_of(config, name) or (name,), name, value) for name, value in _flat(settings, "")]
    alone = {paths[0] for paths, _, _ in given if len(paths) == 1}
    named: dict[str, str] = {}
    for paths, name, value in given:
        if isinstance(value, Words) and not value and len(paths) == 1:
            paths, value = _switched(config, paths[0])
        for path in paths:
            if len(paths) > 1 and path in alone:  # --epsilon=0.2 --epsilon-high=0.28
                continue
            if (other := named.setdefault(path, name)) != name:
                one, two = spelled(other), spelled(name)
                raise ValueError(f"{one} and {two} are one setting, and one value would be lost: give one of them")
            _put(tree, path, value, spelled)
    return _Changes(config, spelled).of(config, tree, "")


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        path = prefix + str(name).replace("-", "_")
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _switched(config: Any, path: str) -> tuple[tuple[str], Words]:
    """The setting that a flag without a value switches on, or off where its last part begins with no_."""
    folders, dot, last = path.rpartition(".")
    positive = folders + dot + last.removeprefix("no_")
    known = set(setting_paths(config))
    return ((positive,), Words(["false"])) if path not in known and positive in known else ((path,), Words())


def _put(tree: dict[str, Any], path: str, value: Any, spelled: Callable[[str], str]) -> None:
    """Puts a value where the records are nested."""
    *folders, last = path.split(".")
    place = tree
    for folder in folders:
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            raise ValueError(f"{spelled(path)} is a part of {spelled(folder)}, which is given as a whole")
    if last in place:
        raise ValueError(f"{spelled(path)} is given twice, or as a whole and in parts: give it once")
    place[last] = value


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Puts settings into records."""

    config: Any
    """The whole of the settings."""
    spelled: Callable[[str], str]
    """As `configure`."""

    def of(self, record: Any, tree: Mapping[str, Any], path: str) -> Any:
        """A record with what `tree` says of its fields; `path` is what its names begin with."""
        kind = type(record)
        names = [field.name for field in dataclasses.fields(kind)]
        if PART in tree and PART not in names and (other := self._kind(kind, tree, path)) is not kind:
            return self.of(self._begun(other, tree, path), tree, path)
        changes, hints = {}, get_hints(kind)
        for name, value in tree.items():
            if name == PART and name not in names:
                continue
            if name not in names:
                raise self._unknown(path + name, value)
            changes[name] = self._value(value, hints[name], getattr(record, name), f"{path}{name}")
        return dataclasses.replace(record, **changes)

    def _begun(self, kind: type, tree: Mapping[str, Any], path: str) -> Any:
        """A record with what `tree` says of the fields that have no default."""
        missing = dataclasses.MISSING
        needed = [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]
        if absent := [self.spelled(path + name) for name in needed if name not in tree]:
            raise ValueError(f"{kind.__name__} needs {', '.join(absent)}, too")
        hints = get_hints(kind)
        return kind(**{name: self._value(tree[name], hints[name], None, path + name) for name in needed})

    def _kind(self, kind: type, tree: Mapping[str, Any], path: str) -> type:
        """The class that `tree` names, or else `kind`."""
        named = tree.get(PART, kind.__name__)
        return _class_named(kind, " ".join(named) if isinstance(named, Words) else named, self.spelled(path + PART))

    def _unknown(self, path: str, value: Any) -> ValueError:
        """What to say of a setting that there is not, or of the first in a record that there is not."""
        while isinstance(value, Mapping) and value:
            name, value = next(iter(value.items()))
            path = f"{path}.{name}"
        found = hint(self.config, path, self.spelled)
        return ValueError(f"there is no setting {self.spelled(path)}{f'; {found}' if found else ''}")

    def _value(self, value: Any, hint: Any, before: Any, path: str) -> Any:
        """`value` as a field of the type `hint` holds it."""
        kinds = alternatives(hint)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return value
        if isinstance(value, Mapping) and dict not in map(_origin, kinds):
            if dataclasses.is_dataclass(before):
                return self.of(before, value, f"{path}.")
            records = [kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
            if len(records) != 1:
                raise self._unknown(path, value)
            kind = self._kind(records[0], value, f"{path}.")
            return self.of(self._begun(kind, value, f"{path}."), value, f"{path}.")
        if isinstance(value, Mapping) and value and all(isinstance(own, Words) for own in value.values()):
            raise ValueError(f"{self.spelled(path)} takes a JSON object, in quotes")
        for kind in kinds:
            with contextlib.suppress(TypeError):
                return _as(kind, value, before)
        wanted = " or ".join(described(kind) for kind in kinds[::-1])
        if dataclasses.is_dataclass(before):
            inner = ", ".join(self.spelled(f"{path}.{field.name}") for field in dataclasses.fields(before)[:3])
            named = f"; {self.spelled('preset')} names a published one" if path in ("algorithm", "objective") else ""
            raise ValueError(f"{self.spelled(path)} has settings of its own, and takes no value: {inner}, …{named}")
        if isinstance(value, Words) and not value:
            raise ValueError(f"{self.spelled(path)} needs a value: {wanted}")
        if isinstance(value, Words) and "," in "".join(value) and tuple in map(_origin, kinds):
            wanted += "; its words stand apart, with spaces and no commas between"
        raise ValueError(f"{self._given(path, value)} must be {wanted}")

    def _given(self, path: str, value: Any) -> str:
        return f"{self.spelled(path)}={' '.join(value) if isinstance(value, Words) else repr(value)}"


@functools.cache
def get_hints(kind: type) -> dict[str, Any]:
    """The types of a record's fields."""
    return get_type_hints(kind)


def _class_named(kind: type, name: str, setting: str) -> type:
    """The class of that name among those that may stand where `kind` stands."""
    base = next(base for base in reversed(kind.__mro__) if base.__module__.startswith("jaxrl_llm."))
    found = {other.__name__: other for other in _subclasses(base) if dataclasses.is_dataclass(other)}
    if name not in found:
        raise ValueError(f"{setting}={name!r} is no {base.__name__}{nearest_name(name, list(found))}")
    return found[name]


def _subclasses(kind: type) -> Iterator[type]:
    yield kind
    for inner in kind.__subclasses__():
        yield from _subclasses(inner)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, `None` first and text last, since a text may be anything."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(sorted(kinds, key=lambda kind: (kind is not type(None), kind is str)))


def _origin(kind: Any) -> Any:
    return get_origin(kind) or kind


def _as(kind: Any, value: Any, before: Any = None) -> Any:
    """`value` as one of type `kind`.

    Raises:
        TypeError: it is none.
    """
    if _origin(kind) is tuple:
        return _as_tuple(get_args(kind), value, before)
    if isinstance(value, Words):
        if not value and kind is bool:
            return True
        if len(value) != 1:
            raise TypeError(kind)
        return _read_word(kind, value[0])
    origin = _origin(kind)
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
    if _origin(kind) is dict:
        return _read_object(word)
    named: dict[str, Any] = {}
    if kind is bool:
        named = {"true": True, "false": False}
        word = word.lower()
    elif kind is type(None):
        named = {"None": None, "none": None}
    elif _origin(kind) is Literal:
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
    if isinstance(value, Mapping) and dataclasses.is_dataclass(hint) and PART in value:
        kind = _class_named(hint, value[PART], PART)  # pyright: ignore[reportArgumentType]
        changes, own = _Changes(None, str), {name: part for name, part in value.items() if name != PART}
        return changes.of(changes._begun(kind, own, ""), own, "")
    for kind in alternatives(hint):
        with contextlib.suppress(TypeError):
            return _as(kind, Words([value]) if word and isinstance(value, str) else value)
    raise TypeError(hint)


def described(kind: Any) -> str:
    """A type in words."""
    origin = _origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if origin is tuple:
        return f"a list, each {' or '.join(described(inner) for inner in alternatives(get_args(kind)[0]))}"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "None"}
    words |= {dict: "a JSON object", Callable: "a function"}
    return words.get(origin, getattr(kind, "__name__", str(kind)))
