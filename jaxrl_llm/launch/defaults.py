"""What the settings of a run would be if nobody had set them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.config import DistillationExperiment, Experiment, OfflineExperiment, RunConfig, StarExperiment, flatten

_PART = ".part"


def default_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of settings as `config.json` has them; those of an experiment's own record have none.

    Where a part is another than by default (`algorithm.surrogate.part`), its settings' defaults are its own.
    """
    defaults = _of_fields(_kind(settings), "")
    for part in sorted((name for name in settings if name.endswith(_PART)), key=lambda name: name.count(".")):
        folder = part.removesuffix("part")
        if defaults.get(part) == settings[part]:
            continue
        if (kind := _class_named(settings[part])) is not None:
            defaults = {name: value for name, value in defaults.items() if not name.startswith(folder) or name == part}
            defaults |= _of_fields(kind, folder)
    return defaults


def _kind(settings: Mapping[str, Any]) -> type[RunConfig]:
    if any(name.startswith("objective.") for name in settings):
        return OfflineExperiment
    if any(name.startswith("star.") for name in settings):
        return StarExperiment
    return DistillationExperiment if "teachers" in settings else Experiment


def _of_fields(kind: type, prefix: str) -> dict[str, Any]:
    """The defaults of the fields that have one."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value is not dataclasses.MISSING:
            found |= flatten({field.name: value}, prefix)
    return found


def _class_named(name: str) -> type | None:
    """The record of that name in the package, if it is loaded."""
    modules = [module for path, module in sys.modules.items() if path.startswith("jaxrl_llm.")]
    found = (getattr(module, name, None) for module in modules)
    return next((kind for kind in found if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)
