"""A reward function that may take so long: a call of a slow service, a search, a proof."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrl_llm.rewards.per_sample import RewardFunction


class TimeLimit(NamedTuple):
    """How long one call of a reward function may take, and what its samples get where it takes longer."""

    seconds: float
    otherwise: float | None


def with_time_limit(function: RewardFunction, seconds: float, *, otherwise: float | None = None) -> RewardFunction:
    """Returns the reward function with a time limit of its own, after which the run goes on without it.

    A call that takes longer is ended, and each of its samples gets `otherwise`. `rewards/<name>/timed_out` is the share
    of calls that were. Without such a limit `reward_timeout` holds, which ends the run.

    An `async def` function is cancelled where it awaits; any other is interrupted in the main thread by a signal, at
    its next step in Python. One that does not end then, since it catches everything or waits in code that knows no
    signals, ends the process with a line that names it.

    Args:
        function: Of either kind.
        seconds: Of one call, for all its samples.
        otherwise: A reward, or None: it does not apply to these samples, which must then have another.

    Raises:
        ValueError: The seconds are not positive, or the reward is not finite.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"a time limit must be positive seconds, got {seconds!r}")
    if otherwise is not None and not math.isfinite(otherwise):
        raise ValueError(f"otherwise={otherwise!r} must be a finite reward, or None")
    limited: Any = functools.update_wrapper(functools.partial(function), function)
    limited.time_limit = TimeLimit(float(seconds), otherwise)
    return limited


def time_limit_of(function: Callable[..., Any]) -> TimeLimit | None:
    """The limit that `with_time_limit` gave a function."""
    return getattr(function, "time_limit", None)
