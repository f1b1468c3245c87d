"""A plan as the settings of the run that it is, and as the flags that make a command be this run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from jaxrl_llm.config import Experiment, flatten
from jaxrl_llm.launch.configure import PART, configure
from jaxrl_llm.launch.on_policy import PRESETS_BY_NAME
from jaxrl_llm.launch.plan.settings import Plan
from jaxrl_llm.launch.words import as_flag

OF_RUN: Mapping[str, str] = MappingProxyType(
    {
        "prompts": "training.prompts_per_step",
        "samples": "training.samples_per_prompt",
        "prompt_tokens": "data.max_prompt_length",
        "completion_tokens": "sampling.max_tokens",
        "slots": "sampling.slots",
        "sampling_tensor": "sampling.tensor",
        "sampling_attention": "sampling.attention",
        "sampling_cache_dtype": "sampling.cache_dtype",
        "sampling_weights_dtype": "sampling.weights_dtype",
    }
)
"""Settings of a plan that a run has under other names."""

SAME = ("model", "algorithm", "critic", "update", "optimizer", "mesh")
"""Those that it has under the same."""

_BATCH = ("training.", "data.", "sampling.max_tokens")
"""Beginnings of a run's settings that say what it computes, on whatever devices."""

_COMMAND = Experiment(name="grpo")
"""What the flags change: the settings of `jaxrl-llm grpo`."""


def experiment_of(plan: Plan) -> Experiment:
    """The settings of the run."""
    run = configure(_COMMAND, {name: getattr(plan, own) for own, name in OF_RUN.items()})
    return dataclasses.replace(run, **{name: getattr(plan, name) for name in SAME})


def run_flags(plan: Plan) -> tuple[str, str]:
    """What `jaxrl-llm grpo` has to be given to be this run, beside model, data and rewards, as words for a shell.

    Returns:
        How it runs, and which batch it computes.
    """
    wanted, begun = flatten(experiment_of(plan)), {"": _COMMAND}
    begun |= {f"--preset={name}": preset(_COMMAND) for name, preset in PRESETS_BY_NAME.items()}
    preset, changed = min(
        ((name, _changed(flatten(config), wanted)) for name, config in begun.items()),
        key=lambda found: bool(found[0]) + len(found[1]),
    )
    batch = {name: value for name, value in changed.items() if name.startswith(_BATCH)}
    others = {name: value for name, value in changed.items() if name not in batch}
    return " ".join([*filter(None, [preset]), *_words(others)]), " ".join(_words(batch))


def of_plan(message: str) -> str:
    """A message in which settings of a run are the flags of a plan."""
    for own, name in OF_RUN.items():
        message = message.replace(name, as_flag(own))
    return message


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What differs; of a part of another class all that it has, since it begins with defaults of its own."""
    parts = [name for name in after if name.endswith(f".{PART}") and before.get(name) != after[name]]
    others = tuple(name.removesuffix(PART) for name in parts)
    return {
        name: value
        for name, value in after.items()
        if name not in before or before[name] != value or name.startswith(others)
    }


def _words(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, list):
            yield shlex.join([as_flag(name), *map(str, value)])
        else:
            yield shlex.quote(f"{as_flag(name)}={str(value).lower() if isinstance(value, bool) else value}")
