"""Reward functions by name: ours, those of a Python file, those of a module."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, cast

from jaxrl_llm.rewards.format import make_regex_reward, make_think_answer_reward
from jaxrl_llm.rewards.gsm8k import gsm8k_reward
from jaxrl_llm.rewards.math import math_reward
from jaxrl_llm.rewards.per_sample import RewardFunction
from jaxrl_llm.rewards.python_syntax import python_syntax_reward

REWARDS: Mapping[str, RewardFunction] = MappingProxyType(
    {
        "gsm8k": gsm8k_reward,
        "math": math_reward,
        "python_syntax": python_syntax_reward,
        "format": make_think_answer_reward(name="format"),
        "gsm8k_format": make_regex_reward(r"[^#]*\n#### -?\$?[\d,]+(\.\d+)?\s*", name="gsm8k_format"),
    }
)
"""Those that have a name of their own. `format`: `<think>…</think><answer>…</answer>`; `gsm8k_format`: some lines, then
one with `#### <number>`, and nothing after it."""


def find_reward(name: str) -> RewardFunction:
    """Returns the reward function that `name` names.

    Args:
        name: One of `REWARDS`, `file.py:function`, or `package.module:function`. A file is run once, whatever the
            number of its functions; what lies beside it can be imported by it.

    Raises:
        ValueError: If there is no such name or function (the nearest is named), or the file cannot be run.
        FileNotFoundError: If the file is missing.
    """
    place, colon, function = name.rpartition(":")
    if not colon:
        if (known := name.replace("-", "_")) in REWARDS:
            return REWARDS[known]
        if "," in name:
            raise ValueError(f"no reward is named {name!r}: names of several stand apart, with spaces between")
        of_file = f"{name}:function" if name.endswith(".py") else "file.py:function"
        near = _nearest(name, REWARDS)
        raise ValueError(f"no reward is named {name!r}{near}; there are {', '.join(REWARDS)}, or give {of_file}")
    if not place or not function:
        raise ValueError(f"the reward {name!r} must be given as file.py:function or module:function")
    module = _of_file(Path(place)) if place.endswith(".py") else _of_module(place, name)
    found: Any = getattr(module, function, None)
    if not callable(found):
        own = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
        what = "is no function" if found is not None else "is not there"
        there = f"; there are {', '.join(own)}" if own else ""
        raise ValueError(f"the reward {name}: {function!r} {what}{_nearest(function, own) or there}")
    return cast(RewardFunction, found)


def _nearest(name: str, names: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _of_file(path: Path) -> ModuleType:
    """The module that a file is, run the first time."""
    path = path.expanduser().absolute()
    key = f"{__name__}:{path}"
    if key in sys.modules:
        return sys.modules[key]
    if not path.is_file():
        raise FileNotFoundError(f"the rewards' file {path} is not there")
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[key]
        raise ValueError(f"the rewards' file {path} cannot be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _of_module(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ImportError as error:
        file = Path(f"{place}.py")
        hint = f"; did you mean {file}:{name.rpartition(':')[2]}?" if file.is_file() else ""
        raise ValueError(f"the reward {name}: the module {place!r} cannot be imported: {error}{hint}") from error
