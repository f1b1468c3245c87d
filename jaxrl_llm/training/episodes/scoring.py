"""Rewards of sampled completions: several weighted functions, run on the host."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_llm.checks import nearest_name
from jaxrl_llm.rewards import RewardFunction, completion_text

# What every reward function is given beside the columns of the data set.
_SAMPLE_ARGUMENTS = ("prompts", "completions", "completion_ids")
_POSITIONAL_OR_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RewardScores:
    """The rewards of N samples."""

    total: np.ndarray
    """float32 [N]: the weighted sum over the functions that apply to the sample."""
    by_name: dict[str, np.ndarray]
    """float32 [N] by function name, unweighted; NaN where the function returned None."""


@dataclass(frozen=True)
class RewardSum:
    """A weighted sum of reward functions: rᵢ = Σₖ wₖ rₖᵢ over the functions k that apply to sample i.

    Raises:
        ValueError: If there is no function, one is not callable or has no `__name__`, two bear the same name,
            or the weights are not one finite number a function.
    """

    functions: Sequence[RewardFunction]
    """Each is called as `f(prompts=…, completions=…, completion_ids=…, **columns)`; one without `**columns`
    is given only what it names."""
    weights: Sequence[float] | None = None
    """One a function; all 1 unless given. A function of weight 0 is only logged."""

    def __post_init__(self) -> None:
        if not self.functions:
            raise ValueError("no reward function: give at least one")
        unnamed = [f for f in self.functions if not (callable(f) and isinstance(getattr(f, "__name__", None), str))]
        if unnamed:
            raise ValueError(
                f"a reward function must be callable and have a __name__ (for its metric), got {unnamed[0]!r}"
            )
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"several reward functions are named {repeated}: give each its own __name__ (or name=)")
        weights = (1.0,) * len(self.functions) if self.weights is None else self.weights
        if len(weights) != len(self.functions) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(
                f"reward weights must be one finite number a function, got {list(weights)} for {self.names}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The functions' names, in order."""
        return tuple(function.__name__ for function in self.functions)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Checks, before anything is sampled, that the data set has what each function requires.

        Args:
            columns: The names of the data set's columns.

        Raises:
            ValueError: If a function requires a column that is not there (the message lists those that are),
                or a column bears the name of an argument that the functions are given anyway.
        """
        present = list(columns)
        reserved = [column for column in present if column in _SAMPLE_ARGUMENTS]
        if reserved:
            raise ValueError(
                f"the data set's columns {reserved} bear the name of an argument that each reward function "
                f"gets anyway ({', '.join(_SAMPLE_ARGUMENTS)}): rename them"
            )
        for function in self.functions:
            missing = [
                parameter.name
                for parameter in inspect.signature(function).parameters.values()
                if parameter.kind in _POSITIONAL_OR_KEYWORD
                and parameter.default is inspect.Parameter.empty
                and parameter.name not in (*_SAMPLE_ARGUMENTS, *present)
            ]
            if missing:
                raise ValueError(
                    f"the reward function {function.__name__!r} requires the column(s) {missing}, which "
                    f"the data set lacks{nearest_name(missing[0], present)}; its columns are {sorted(present)}"
                )

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> RewardScores:
        """Scores N samples.

        Args:
            prompts: N prompts, each a string or a list of messages.
            completions: N completions, likewise.
            completion_ids: N lists of sampled token ids.
            columns: The data set's columns, each with N values: a prompt's value is repeated for each of its
                samples.

        Raises:
            RuntimeError: If a function raises; its exception is the cause.
            ValueError: If a column is missing or an argument has not N entries; if a function returns another
                number of values, or something that is no finite number; if none applies to a sample.
        """
        count = len(completions)
        arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        self.check_columns(columns)
        for name, values in {**arguments, **columns}.items():
            if len(values) != count:
                raise ValueError(f"there are {count} completions, but {name!r} has {len(values)} values")

        by_name = {
            function.__name__: _rewards_of(function, {**arguments, **columns}, completions)
            for function in self.functions
        }
        rewards = np.stack(list(by_name.values()))  # [functions, N]
        none_applies = np.flatnonzero(np.isnan(rewards).all(axis=0))
        if none_applies.size:
            index = int(none_applies[0])
            raise ValueError(
                f"every reward function ({', '.join(self.names)}) returned None for sample {index}, "
                f"completion {_excerpt(completions[index])} ({none_applies.size} of {count} samples in all): "
                "at least one function must apply to each sample"
            )
        weights = np.ones(len(rewards)) if self.weights is None else np.asarray(self.weights, np.float64)
        total = np.where(np.isnan(rewards), 0.0, weights[:, None] * rewards).sum(axis=0)
        return RewardScores(total=total.astype(np.float32), by_name=by_name)


def _rewards_of(function: RewardFunction, arguments: Mapping[str, Any], completions: Sequence[Any]) -> np.ndarray:
    """Calls the function and returns its values as float32 [N], NaN for None."""
    name, count = function.__name__, len(completions)
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    try:
        values = function(**arguments)
    except Exception as error:  # the user's code, which may raise anything
        raise RuntimeError(
            f"the reward function {name!r} raised {type(error).__name__} on {count} samples: {error}"
        ) from error
    try:
        returned = len(values)
    except TypeError:
        raise ValueError(
            f"the reward function {name!r} must return a list of {count} values, got {values!r:.80}"
        ) from None
    if returned != count:
        raise ValueError(f"the reward function {name!r} must return {count} values, one a sample, got {returned}")
    return np.asarray(
        [_number(value, name, index, completions[index]) for index, value in enumerate(values)], np.float32
    )


def _number(value: Any, name: str, index: int, completion: Any) -> float:
    """Returns the value as a float, NaN for None."""
    if value is None:
        return math.nan
    try:
        # float() would read a number from a string.
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise ValueError(
            f"the reward function {name!r} must return finite numbers or None, got {value!r:.80} for sample "
            f"{index}, completion {_excerpt(completion)}"
        )
    return number


def _excerpt(completion: Any) -> str:
    return repr(completion_text(completion)[:80])
