"""Rewards of sampled completions: several weighted functions, run on the host."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_llm.checks import nearest_name, positive
from jaxrl_llm.rewards import RewardFunction, reward_name
from jaxrl_llm.rewards.time_limit import time_limit_of
from jaxrl_llm.training.episodes.async_calls import BackgroundLoop, as_they_end
from jaxrl_llm.training.episodes.telling import Sums, Told, TrainerState, added
from jaxrl_llm.training.episodes.user_functions import Call, TooLongError, UserFunction, excerpt, shown

# What every reward function is given beside the columns of the data set.
_SAMPLE_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
_WITH_ENVIRONMENTS = "environments"
_POSITIONAL_OR_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RewardScores:
    """The rewards of N samples."""

    total: np.ndarray
    """float32 [N]: the weighted sum over the functions that apply to the sample; NaN where none does."""
    by_name: dict[str, np.ndarray]
    """float32 [N] by function name, unweighted; NaN where the function returned None."""
    metrics: Sums = dataclasses.field(default_factory=dict)
    """What the functions told by `log_metric`, and `rewards/<name>/timed_out` of those that have a time limit."""
    extra: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """What they told by `log_extra`: N values by column."""


@dataclass(frozen=True)
class RewardSum:
    """A weighted sum of reward functions: rᵢ = Σₖ wₖ rₖᵢ over the functions k that apply to sample i.

    Raises:
        ValueError: If there is no function, or no sequence of them, one is not callable, two bear the same name, or the
            weights are not one finite number a function.
    """

    functions: Sequence[RewardFunction]
    """Each is called as `f(prompts=…, completions=…, completion_ids=…, trainer_state=…, log_metric=…, log_extra=…,
    **columns)`; one without `**columns` is given only what it names. Those that are `async def` are awaited together,
    while the others are called one after another."""
    weights: Sequence[float] | None = None
    """One a function; all 1 unless given. A function of weight 0 is only logged."""
    timeout: float | None = None
    """Seconds that one call of a function without a limit of its own (`with_time_limit`) may take; `None`: any time."""

    def __post_init__(self) -> None:
        if not self.functions:
            raise ValueError("no reward function: give at least one")
        if not isinstance(self.functions, Sequence):
            raise ValueError(f"rewards are a tuple or list of functions, got {shown(self.functions)}: put it in one")
        _ = self._called  # each is checked
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

    @functools.cached_property
    def _called(self) -> list[UserFunction]:
        wanted = "finite numbers or None"
        return [UserFunction(function, "reward function", "sample", wanted, True) for function in self.functions]

    @functools.cached_property
    def _loop(self) -> BackgroundLoop | None:
        """Of the functions that are async, the same for all calls."""
        return BackgroundLoop() if any(function.is_async for function in self._called) else None

    @property
    def names(self) -> tuple[str, ...]:
        """The functions' names, in order."""
        return tuple(map(reward_name, self.functions))

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
        for function in self._called:
            missing = [
                parameter.name
                for parameter in inspect.signature(function.call).parameters.values()
                if parameter.kind in _POSITIONAL_OR_KEYWORD
                and parameter.default is inspect.Parameter.empty
                and parameter.name not in (*_SAMPLE_ARGUMENTS, *present)
            ]
            if _WITH_ENVIRONMENTS in missing:
                raise ValueError(
                    f"{function} requires 'environments', of which there are none: completions are sampled in one "
                    "turn; give it a default (environments=None)"
                )
            if missing:
                raise ValueError(
                    f"{function} requires the column(s) {missing}, which the data set "
                    f"lacks{_nearest(missing[0], present)}; its columns are {sorted(present)}"
                )

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        trainer_state: TrainerState | None = None,
        *,
        may_lack: bool = False,
    ) -> RewardScores:
        """Scores N samples.

        Args:
            prompts: N prompts, each a string or a list of messages.
            completions: N completions, likewise.
            completion_ids: N lists of sampled token ids.
            columns: The data set's columns, each with N values: a prompt's value is repeated for each of its
                samples.
            trainer_state: How far the run is; `None`: there is none.
            may_lack: Whether there may be samples to which no function applies.

        Raises:
            UserCodeError: If a function raises, or takes longer than `timeout`; its exception is the cause.
            ValueError: If a column is missing or an argument has not N entries; if a function returns another
                number of values, or something that is no finite number; if none applies to a sample that must have one.
        """
        count = len(completions)
        arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        self.check_columns(columns)
        for name, values in {**arguments, **columns}.items():
            if len(values) != count:
                raise ValueError(f"there are {count} completions, but {name!r} has {len(values)} values")

        told = Told(count)
        state = TrainerState() if trainer_state is None else trainer_state
        given = {**arguments, "trainer_state": state, **told.arguments, **columns}
        by_name, timed_out = self._values(given, completions)
        told.close()
        rewards = np.stack(list(by_name.values()))  # [functions, N]
        lacks = np.asarray(np.isnan(rewards).all(axis=0))
        if lacks.any() and not may_lack:
            ended = [name for name, too_long in timed_out.items() if too_long]
            raise ValueError(self.none_applies(lacks, completions, ended) + ": at least one must apply to each")
        weights = np.ones(len(rewards)) if self.weights is None else np.asarray(self.weights, np.float64)
        total = np.where(np.isnan(rewards), 0.0, weights[:, None] * rewards).sum(axis=0)
        if (beyond := np.flatnonzero(~(np.abs(total) <= _LARGEST))).size:
            index, of = int(beyond[0]), weights.tolist()
            parts = {name: float(values[index]) for name, values in by_name.items()}
            raise ValueError(f"the rewards {parts} of sample {index}, weighted by {of}, add up beyond float32")
        limits = {f"rewards/{name}/timed_out": (float(ended), 1) for name, ended in timed_out.items()}
        total = np.where(lacks, np.nan, total).astype(np.float32)
        return RewardScores(total, by_name, added(told.metrics, limits), told.extra)

    def none_applies(self, lacks: np.ndarray, completions: Sequence[Any], timed_out: Sequence[str] = ()) -> str:
        """What to say of samples to which no function applies.

        Args:
            lacks: `[N]` bool: which they are.
            completions: N, or only the first ones.
            timed_out: functions that took too long.
        """
        index, late = int(lacks.argmax()), ", ".join(timed_out)
        said = (
            f"every reward function ({', '.join(self.names)}) returned None for sample {index}, completion "
            f"{excerpt(completions[index])} ({int(lacks.sum())} of {len(lacks)} samples in all)"
        )
        return said + (f"; {late} took too long, and with_time_limit(…, otherwise=0.0) rewards that" if late else "")

    def _values(
        self, given: Mapping[str, Any], completions: Sequence[Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, bool]]:
        """What each function returns, float32 [N] and NaN for None, and whether those with a limit exceeded it."""
        calls = [self._begin(function, given, completions) for function in self._called]
        found, timed_out = {}, {}
        try:
            for call in _in_turn(calls):
                function, limit = call.function, time_limit_of(call.function.call)
                try:
                    values = call.values()
                except TooLongError:
                    if limit is None:
                        raise
                    values = [limit.otherwise] * len(completions)
                    timed_out[function.name] = True
                if limit is not None:
                    timed_out.setdefault(function.name, False)
                rows = zip(values, range(len(values)), completions, strict=True)
                found[function.name] = np.asarray([_number(function, *row) for row in rows])
        finally:
            for call in calls:
                call.cancel()
        return {name: found[name] for name in self.names}, timed_out

    def _begin(self, function: UserFunction, arguments: Mapping[str, Any], completions: Sequence[Any]) -> Call:
        """A call with what the function names, or with all of it."""
        parameters = inspect.signature(function.call).parameters
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            arguments = {key: value for key, value in arguments.items() if key in parameters}
        limit = time_limit_of(function.call)
        timeout = self.timeout if limit is None else limit.seconds
        return function.begin(arguments, completions, timeout=timeout, loop=self._loop)


def _in_turn(calls: Sequence[Call]) -> Iterator[Call]:
    """First those that are to be called, while the async ones go on; then these, as they end."""
    yield from (call for call in calls if call.pending is None)
    under_way = {call.pending: call for call in calls if call.pending is not None}
    yield from (under_way[pending] for pending in as_they_end(under_way))


def _nearest(name: str, columns: Sequence[str]) -> str:
    """The argument that is spelt almost so, or else the column that is most like it, for an error."""
    arguments = difflib.get_close_matches(name, _SAMPLE_ARGUMENTS, n=1, cutoff=0.9)
    return nearest_name(name, arguments or columns)


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
