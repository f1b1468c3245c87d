"""Other values of settings: a command line's, a file's, an earlier run's, keywords; checked by the records' types.

A command line has words, which become what the type of their setting says; all others have values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from jaxrl_llm.checks import nearest_name
from jaxrl_llm.launch.short_names import hint, paths_of, setting_paths
from jaxrl_llm.launch.values import Words, alternatives, as_value, described, get_hints, origin_of

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
        if isinstance(value, Mapping) and dict not in map(origin_of, kinds):
            if dataclasses.is_dataclass(before):
                return self.of(before, value, f"{path}.")
            records = [kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
            if len(records) != 1:
                raise self._unknown(path, value)
            return self._new(records[0], value, f"{path}.")
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = [self._value(item, self._of_items(kinds), None, f"{path}.{n}") for n, item in enumerate(value)]
        for kind in kinds:
            with contextlib.suppress(TypeError):
                return as_value(kind, value, before)
        raise ValueError(self._refusal(value, kinds, before, path))

    def _new(self, kind: type, tree: Mapping[str, Any], path: str) -> Any:
        """A record of the class that `tree` names, or else of `kind`, as `tree` says."""
        kind = self._kind(kind, tree, path)
        return self.of(self._begun(kind, tree, path), tree, path)

    @staticmethod
    def _of_items(kinds: tuple[Any, ...]) -> Any:
        """What a list of one of these types holds."""
        return next((get_args(kind)[0] for kind in kinds if origin_of(kind) is tuple), Any)

    def _refusal(self, value: Any, kinds: tuple[Any, ...], before: Any, path: str) -> str:
        """Why a value cannot be that of a setting."""
        name, wanted = self.spelled(path), " or ".join(described(kind) for kind in kinds[::-1])
        if dataclasses.is_dataclass(before):
            inner = ", ".join(self.spelled(f"{path}.{field.name}") for field in dataclasses.fields(before)[:3])
            named = f"; {self.spelled('preset')} names a published one" if path in ("algorithm", "objective") else ""
            return f"{name} has settings of its own, and takes no value: {inner}, …{named}"
        if isinstance(value, Mapping) and value and all(isinstance(own, Words) for own in value.values()):
            return f"{name} takes a JSON object, in quotes"
        if not isinstance(value, Words):
            return f"{name}={value!r} must be {wanted}"
        if not value:
            return f"{name} needs a value: {wanted}"
        if "," in "".join(value) and tuple in map(origin_of, kinds):
            wanted += "; its words stand apart, with spaces and no commas between"
        return f"{name}={' '.join(value)} must be {wanted}"


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
