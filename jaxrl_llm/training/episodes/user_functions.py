"""What a reward function and a judge may do and return: the one place where code of the user's is called.

It gets copies, may take so long, and gives back a list of one value a row. What it does otherwise ends the run in one
line with its name, the row and the place, in every process together.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from jaxrl_llm.rewards import completion_text, reward_name
from jaxrl_llm.training.episodes import async_calls, time_limits
from jaxrl_llm.training.episodes.async_calls import AsyncCall, BackgroundLoop, BlockedError
from jaxrl_llm.training.episodes.time_limits import NotMainThreadError, TimeIsUpError, interrupting
from jaxrl_llm.training.run.distributed import any_process
from jaxrl_llm.training.run.errors import RunError

_PLAIN = frozenset({str, bytes, int, float, bool, type(None)})

Returned = TypeVar("Returned")


class RewardError(RunError):
    """A reward function or a judge raised, or returned what it may not; its exception is the cause."""


class UserCodeError(RuntimeError):
    """A function of the user's raised; the message names it, the row and the place, and its exception is the cause."""


class TooLongError(UserCodeError):
    """A function of the user's took longer than it may."""


@dataclass(frozen=True)
class UserFunction:
    """A reward function or a judge.

    Raises:
        ValueError: it cannot be called, or is async and may not be.
    """

    call: Callable[..., Any]
    """The function itself."""
    kind: str
    """"reward function" or "judge"."""
    row: str
    """What it returns a value for: "sample" or "pair"."""
    returns: str
    """What its values must be."""
    may_be_async: bool = False
    """Whether it may be `async def`."""

    def __post_init__(self) -> None:
        if not callable(self.call):
            raise ValueError(f"a {self.kind} must be a function, got {shown(self.call)}")
        if self.is_async and not self.may_be_async:
            raise ValueError(
                f"{self} is async, and would never be awaited: call asyncio.run in a function that returns its values"
            )
        try:
            inspect.signature(self.call)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self} does not say what it takes ({error}): wrap it in a function of Python") from None

    def __str__(self) -> str:
        return f"the {self.kind} {self.name!r}"

    @property
    def name(self) -> str:
        """How it is called."""
        return reward_name(self.call)

    @property
    def is_async(self) -> bool:
        """Whether it is a coroutine function, or an object whose `__call__` is one."""
        function = self.call
        while isinstance(function, functools.partial):
            function = function.func
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)

    def begin(
        self,
        arguments: Mapping[str, Any],
        texts: Sequence[Any],
        *,
        timeout: float | None = None,
        loop: BackgroundLoop | None = None,
    ) -> Call:
        """A call with copies of the arguments; an async function is under way at once, any other when it is waited for.

        Args:
            arguments: by name.
            texts: a row's text each, by which a row is known.
            timeout: seconds that it may take; `None`: any time.
            loop: of async functions.
        """
        copies = _copied(dict(arguments))
        known = next((copies[name] for name, given in arguments.items() if given is texts), texts)
        known = list(known)  # it may empty its list
        pending = None
        if self.is_async:
            assert loop is not None  # whoever allows async functions has one
            pending = loop.begin(functools.partial(self.call, **copies), timeout=timeout)
        return Call(self, copies, known, timeout, pending)

    def values(self, arguments: Mapping[str, Any], texts: Sequence[Any], *, timeout: float | None = None) -> list[Any]:
        """What one call returns, a value a row; arguments and errors as of `begin` and `Call.values`."""
        return self.begin(arguments, texts, timeout=timeout).values()

    def refuse(self, value: Any, index: int, text: Any, *, why: str = "") -> ValueError:
        """The error for a value that it may not return for a row."""
        return ValueError(
            f"{self} must return {self.returns}, got {shown(value)}{why} for {self.row} {index}, "
            f"completion {excerpt(text)}"
        )

    def as_list(self, returned: Any, count: int) -> list[Any]:
        """What it returned as a list; raises _NotAListError for what has no order, or not one value a row."""
        if inspect.isawaitable(returned) or inspect.isasyncgen(returned):
            if inspect.iscoroutine(returned):
                returned.close()
            raise _NotAListError(f"must return a list of {count} values, got {shown(returned)}: it is async")
        unordered = isinstance(returned, str | bytes | Mapping | Set)
        if unordered or not (hasattr(returned, "__len__") and hasattr(returned, "__iter__")):
            raise _NotAListError(f"must return a list of {count} values, got {shown(returned)}")
        if getattr(returned, "ndim", 1) == 0:
            raise _NotAListError(f"must return a list of {count} values, got a single one: {shown(returned)}")
        values = list(returned)
        if len(values) != count:
            raise _NotAListError(f"must return {count} values, one a {self.row}, got {len(values)}")
        return values


class _NotAListError(Exception):
    """What was returned is no list of one value a row."""


@dataclass(frozen=True)
class Call:
    """One call of a function of the user's."""

    function: UserFunction
    arguments: dict[str, Any]
    texts: list[Any]
    timeout: float | None
    pending: AsyncCall | None

    def values(self) -> list[Any]:
        """What it returned, a value a row; of an async function, once it has ended.

        Raises:
            TooLongError: it took longer than it may.
            UserCodeError: it raised; or it is async, took longer and awaits nothing, so that no other can go on.
            ValueError: it returned something else.
        """
        function, on = self.function, f"on {len(self.texts)} {self.function.row}s"
        try:
            if self.pending is not None:
                return function.as_list(self.pending.result(), len(self.texts))
            with interrupting(self.timeout, f"{function} {on}"):
                return function.as_list(function.call(**self.arguments), len(self.texts))
        except BlockedError as up:
            raise UserCodeError(
                f"{function} took longer than {self.timeout:g} s {on} and awaits nothing, so that no other async "
                "function can go on: await what it waits for (asyncio.to_thread calls what cannot be awaited), or make "
                "it a def"
            ) from up
        except TimeIsUpError as up:
            where = _where(up.__cause__ or up, self.texts, function.row)
            raise TooLongError(f"{function} took longer than {self.timeout:g} s {on}{where}") from up
        except (_NotAListError, NotMainThreadError) as error:
            raise ValueError(f"{function} {error}") from None
        except (Exception, SystemExit) as error:  # the user's code, which may raise anything
            text = f": {_text(error)}" if _text(error) else ""
            where = _where(error, self.texts, function.row)
            raise UserCodeError(f"{function} raised {type(error).__name__} {on}{text}{where}") from error

    def cancel(self) -> None:
        """Ends it, if it is async and under way."""
        if self.pending is not None:
            self.pending.cancel()


def together(call: Callable[[], Returned], what: str) -> Returned:
    """Calls what may fail; if it does in one process, it fails in all, and none waits for another.

    Args:
        call: what may raise `UserCodeError` or ValueError.
        what: what it calls, for the processes where it did not fail.

    Raises:
        RewardError: it failed.
    """
    returned, failure = None, None
    try:
        returned = call()
    except (UserCodeError, ValueError) as error:
        failure = error
    if any_process(failure is not None):
        raise RewardError(str(failure or f"{what} failed in another process")) from failure
    return returned  # pyright: ignore[reportReturnType]


def shown(value: Any) -> str:
    """A value for an error message: on one line, not long, and such that any terminal can print it."""
    try:
        return _one_line(repr(value))[:80]
    except Exception:  # of any kind: a repr of the user's
        return f"a {type(value).__name__}"


def excerpt(completion: Any) -> str:
    """The beginning of a completion, for an error message."""
    return _one_line(repr(completion_text(completion)[:80]))


def _text(error: BaseException) -> str:
    try:
        return _one_line(str(error))[:500]
    except Exception:  # of any kind: a __str__ of the user's
        return "(its text cannot be read)"


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def _copied(value: Any) -> Any:
    """The same lists, dicts, tuples, sets and NumPy arrays anew, whatever they hold; anything else as it is."""
    kind = type(value)
    if kind in (np.ndarray, set) or (kind is list and _PLAIN.issuperset(map(type, value))):
        return value.copy()
    if kind is dict:
        return {key: _copied(entry) for key, entry in value.items()}
    return kind(map(_copied, value)) if kind in (list, tuple) else value


_NOT_THEIRS = frozenset({__file__, contextlib.__file__, async_calls.__file__, time_limits.__file__})


def _where(error: BaseException, texts: Sequence[Any], row: str) -> str:
    """The row that the function was at, if its variables tell, and the line of its own code, not of a library's."""
    at = _row_at(error.__traceback__, texts)
    text = "" if at is None else f", at {row} {at}, completion {excerpt(texts[at])}"
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    frames = [(file, line) for file, line in frames if file not in _NOT_THEIRS]
    libraries = ("<frozen", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
    own = [(file, line) for file, line in frames if not file.startswith(libraries)] or frames
    return f"{text} ({own[-1][0]}:{own[-1][1]})" if own else text


def _row_at(trace: TracebackType | None, texts: Sequence[Any]) -> int | None:
    """The row whose very text is among the variables of the innermost function that has one."""
    shared = collections.Counter(map(id, texts))  # short texts may be one object: they do not tell rows apart
    rows = {id(text): number for number, text in enumerate(texts) if shared[id(text)] == 1}
    for frame, _ in reversed(list(traceback.walk_tb(trace))):
        found = {rows[id(value)] for value in frame.f_locals.values() if id(value) in rows}
        if len(found) == 1:
            return found.pop()
    return None
