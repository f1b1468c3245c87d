"""Rewards of sampled completions: several weighted functions, run on the host."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_llm.checks import nearest_name, positive
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.training.episodes.user_functions import UserFunction, excerpt, shown

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
        ValueError: If there is no function, or no sequence of them, one is not callable, is async or has no `__name__`,
            two bear the same name, or the weights are not one finite number a function.
    """

    functions: Sequence[RewardFunction]
    """Each is called as `f(prompts=…, completions=…, completion_ids=…, **columns)`; one without `**columns`
    is given only what it names."""
    weights: Sequence[float] | None = None
    """One a function; all 1 unless given. A function of weight 0 is only logged."""
    timeout: float | None = None
    """Seconds that one call of a function may take; `None`: any time."""

    def __post_init__(self) -> None:
        if not self.functions:
            raise ValueError("no reward function: give at least one")
        if not isinstance(self.functions, Sequence):
            raise ValueError(f"rewards are a tuple or list of functions, got {shown(self.functions)}: put it in one")
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
        if not positive(self.timeout, optional=True)[0]:
            raise ValueError(f"timeout={self.timeout!r} must be None, or positive seconds")
        _ = self._called  # each is checked

    @functools.cached_property
    def _called(self) -> list[UserFunction]:
        wanted = "finite numbers or None"
        return [UserFunction(function, "reward function", "sample", wanted) for function in self.functions]

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
            UserCodeError: If a function raises, or takes too long; its exception is the cause.
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
            function.name: _rewards_of(function, {**arguments, **columns}, completions, self.timeout)
            for function in self._called
        }
        rewards = np.stack(list(by_name.values()))  # [functions, N]
        none_applies = np.flatnonzero(np.isnan(rewards).all(axis=0))
        if none_applies.size:
            index = int(none_applies[0])
            raise ValueError(
                f"every reward function ({', '.join(self.names)}) returned None for sample {index}, "
                f"completion {excerpt(completions[index])} ({none_applies.size} of {count} samples in all): "
                "at least one function must apply to each sample"
            )
        weights = np.ones(len(rewards)) if self.weights is None else np.asarray(self.weights, np.float64)
        total = np.where(np.isnan(rewards), 0.0, weights[:, None] * rewards).sum(axis=0)
        if (beyond := np.flatnonzero(~(np.abs(total) <= _LARGEST))).size:
            index, of = int(beyond[0]), weights.tolist()
            parts = {name: float(values[index]) for name, values in by_name.items()}
            raise ValueError(f"the rewards {parts} of sample {index}, weighted by {of}, add up beyond float32")
        return RewardScores(total=total.astype(np.float32), by_name=by_name)


def _rewards_of(
    function: UserFunction, arguments: Mapping[str, Any], completions: Sequence[Any], timeout: float | None
) -> np.ndarray:
    """Calls the function and returns its values as float32 [N], NaN for None."""
    parameters = inspect.signature(function.call).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    values = function.values(arguments, completions, timeout=timeout)
    return np.asarray([_number(function, *row) for row in zip(values, range(len(values)), completions, strict=True)])


def _number(function: UserFunction, value: Any, index: int, completion: Any) -> np.float32:
    """Returns the value as a number, NaN for None."""
    if value is None:
        return np.float32(math.nan)
    # float() would read a number from a string, leave out an imaginary part, and take an array of one entry.
    if isinstance(value, str | bytes | complex | np.complexfloating) or getattr(value, "ndim", 0) > 0:
        raise function.refuse(value, index, completion)
    try:
        number = float(value)
    except (Exception, SystemExit) as error:  # of any kind: a __float__ of the user's
        raise function.refuse(value, index, completion, why=f" ({type(error).__name__})") from error
    if not abs(number) <= _LARGEST:
        raise function.refuse(value, index, completion)
    return np.float32(number)
