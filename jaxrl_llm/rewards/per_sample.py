"""A reward function from a rule about one completion."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

#: `f(prompts, completions, **columns)`: one value a sample, None where the function does not apply.
RewardFunction = Callable[..., Sequence[float | None]]


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
        columns: The columns that the rule reads. They are part of the returned function's signature,
            `name(prompts, completions, <columns>, **other_columns)`, so that a missing one is found before
            training.

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
        values = [arguments[column] for column in columns]
        samples = zip(arguments["completions"], *values, strict=True)
        return [score(completion_text(completion), *sample) for completion, *sample in samples]

    reward.__name__ = reward.__qualname__ = name
    reward.__doc__ = score.__doc__
    reward.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return reward
