"""A reward function from a rule about one completion."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

#: `f(prompts, completions, **columns)`: one value a sample, None where the function does not apply; or `async def`.
RewardFunction = Callable[..., Any]


def reward_name(function: Callable[..., Any]) -> str:
    """Returns what a reward function is called: its `__name__`, a partial's function's, or its class's."""
    while isinstance(function, functools.partial) and not hasattr(function, "__name__"):
        function = function.func
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """Returns the text of a completion, plain or conversational.

    Args:
        completion: A string, or messages such as `[{"role": "assistant", "content": "..."}]`; the contents of
            several messages are joined by a newline.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(completion, str):
        return completion
    try:
        return "\n".join(message["content"] for message in completion)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"a completion must be a string or a list of messages with a string 'content', got {completion!r:.200}"
        ) from error


def make_per_sample_reward(
    score: Callable[..., float | None], name: str, columns: Sequence[str] = ()
) -> RewardFunction:
    """Returns the reward function that scores one completion at a time.

    Args:
        score: Called as `score(text, *values)` with the completion's text and the sample's value of each of
            `columns`.
        name: The function's `__name__`, hence the metric `rewards/<name>/mean`.
        columns: The columns that the rule reads, as in `make_batch_reward`.

    Raises:
        ValueError: If a column's name is not a Python identifier.
    """

    def score_all(prompts: Sequence[Any], texts: list[str], *values: Sequence[Any]) -> list[float | None]:
        return [score(text, *sample) for text, *sample in zip(texts, *values, strict=True)]

    reward = make_batch_reward(score_all, name, columns)
    reward.__doc__ = score.__doc__
    return reward


def make_batch_reward(
    score_all: Callable[..., list[float | None]],
    name: str,
    columns: Sequence[str] = (),
    *,
    check: Callable[..., str | None] | None = None,
) -> RewardFunction:
    """Returns the reward function that scores all completions of a call together.

    Args:
        score_all: Called as `score_all(prompts, texts, *columns)` with lists of one entry a sample.
        name: The function's `__name__`, hence the metric `rewards/<name>/mean`.
        columns: The columns that the rule reads. They are part of the returned function's signature,
            `name(prompts, completions, <columns>, **other_columns)`, so that a missing one is found before
            training.
        check: Called as `check(*values)` with one row's value of each of `columns`: why no completion could be
            scored on that row, or None. It becomes the attribute `check_row(**columns) -> str | None`, which
            is asked about each row before training, and names the columns.

    Raises:
        ValueError: If a column's name is not a Python identifier.
    """
    unusable = [column for column in columns if not column.isidentifier()]
    if unusable:
        raise ValueError(f"{name}: a column must be named by a Python identifier, got {unusable}; rename the column")
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(parameter, kind) for parameter in ("prompts", "completions", *columns)]
        + [inspect.Parameter("other_columns", inspect.Parameter.VAR_KEYWORD)]
    )

    def reward(*args: Any, **kwargs: Any) -> list[float | None]:
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{name}(): {error}") from None
        texts = [completion_text(completion) for completion in arguments["completions"]]
        return score_all(arguments["prompts"], texts, *(arguments[column] for column in columns))

    def check_row(**values: Any) -> str | None:
        assert check is not None
        problem = check(*(values[column] for column in columns))
        return None if problem is None else f"{', '.join(map(repr, columns))}: {problem}"

    reward.__name__ = reward.__qualname__ = name
    reward.__doc__ = score_all.__doc__
    reward.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    if check is not None:
        reward.check_row = check_row  # pyright: ignore[reportFunctionMemberAccess]
    return reward
