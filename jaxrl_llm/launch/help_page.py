"""Pages of help: settings, each with what it is, what it may be, and what it is as things are."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrl_llm.launch.short_names import SHORT, paths_of, setting_paths
from jaxrl_llm.launch.values import alternatives, described, get_hints
from jaxrl_llm.launch.words import as_flag

FIRST = (
    *("slice", "size", "prompts", "data", "teachers", "rewards", "reward_weights", "hint", "samples", "ks"),
    *("prompt_tokens", "completion_tokens", "slots", "output", "overwrite"),
)
LAST = ("json", "picture", "seed", "name", "run_dir")
"""Settings of a command itself that are shown before and after those with a short name."""

AS = {"model_path": "model", "train_data": "data"}
"""Names under which they are shown, where there is a shorter one."""

_WIDTH = 100


def help_page(config: Any, program: str, description: str, presets: Sequence[str], *, everything: bool = False) -> str:
    """The text that `--help` prints, or `--help-all`.

    Args:
        config: settings as they are without a flag.
        program: how the command line begins.
        description: of the experiment.
        presets: names of `--preset`; none: there is no such flag.
        everything: show all settings, not those alone that are set most.
    """
    lines = [f"usage: {program}{' [--preset NAME]' if presets else ''} [--config FILE] [--SETTING=VALUE …]", ""]
    lines += [*(line.rstrip() for line in description.strip().splitlines()), ""]
    lines += ["All settings:" if everything else "Settings that are set most:", ""]
    for name, path in _all(config) if everything else _common(config):
        lines += _entry(f"--{name.replace('_', '-')}", config, path)
    if presets:
        lines += [
            "  --preset NAME",
            *_wrapped(f"A published algorithm, which other flags change: {', '.join(presets)}."),
        ]
    lines += ["  --config FILE", *_wrapped("YAML or JSON file of settings, such as the config.json of a run.")]
    if hasattr(config, "resume"):
        lines += ["  --resume RUN", *_wrapped("Folder of a run to go on with, by its own settings.")]
    return "\n".join(lines if everything else [*lines, "", "--help-all shows all settings."])


def _all(config: Any) -> Iterator[tuple[str, str]]:
    yield from ((path, path) for path in setting_paths(config))


def _common(config: Any) -> Iterator[tuple[str, str]]:
    """Names and paths of the settings that the page shows."""
    own = [
        field.name for field in dataclasses.fields(config) if not dataclasses.is_dataclass(getattr(config, field.name))
    ]
    unread = getattr(config, "UNREAD", ())
    yield from ((name, name) for name in FIRST if name in own)
    for name in SHORT:
        paths = paths_of(config, name)
        if paths and not paths[0].startswith(unread) and paths[0] not in FIRST:
            yield AS.get(name, name), paths[0]
    yield from ((name, name) for name in LAST if name in own)


def _entry(flag: str, config: Any, path: str) -> Iterator[str]:
    """The lines of a setting: its flag, what it may be and is, its whole name if the flag is not that, its text."""
    *folders, name = path.split(".")
    record = functools.reduce(getattr, folders, config)
    kinds = alternatives(get_hints(type(record))[name])
    may_be = " | ".join(described(kind) for kind in kinds[::-1])
    whole = "" if flag == as_flag(path) else f" ({path})"
    yield f"  {flag}{whole}: {may_be} = {_shown(getattr(record, name))}"
    yield from _wrapped(doc_of(type(record), name))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(getattr(item, "__name__", str(item)) for item in value) or "(none)"
    return str(value)


def doc_of(kind: type, name: str) -> str:
    """The text under the field `name` of a record of this kind, or of one that it extends."""
    return next(
        (_docs(base)[name] for base in kind.__mro__ if dataclasses.is_dataclass(base) and name in _docs(base)), ""
    )


@functools.cache
def _docs(kind: type) -> dict[str, str]:
    """The texts under the fields of a class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
