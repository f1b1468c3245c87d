"""Whether reward functions can score the rows of a data set: asked before anything is sampled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.rewards import reward_name
from jaxrl_llm.training.episodes.scoring import RewardSum


def check_scorable(rewards: RewardSum, dataset: PromptDataset) -> None:
    """Checks that the data set has the columns that reward functions require, and that they can read them in each row.

    A function may have an attribute `check_row(**columns) -> str | None`, which says why it can score no completion on
    a row: a gold answer that it cannot read, say. A row in which a column that it requires is `None` may be left to
    another function that has such a check: data may be of several tasks. What was found to be scorable is not looked
    at again.

    Raises:
        ValueError: a column is missing, or rows cannot be scored; names the first one, the function, and what it says.
    """
    rewards.check_columns(dataset.column_names)
    functions = tuple(rewards.functions)
    if functions in dataset.scorable_by or not any(hasattr(function, "check_row") for function in functions):
        return
    problems = {}
    for item in range(len(dataset)):
        number, columns = dataset.columns_of(item)
        if problem := _problem(functions, columns):
            problems[number] = problem
    if problems:
        first = min(problems)
        raise ValueError(
            f"row {first}: {problems[first]} ({len(problems)} of {len(dataset)} rows cannot be scored): mend these "
            "rows, or leave them out"
        )
    dataset.scorable_by.append(functions)


def _problem(functions: tuple[Any, ...], columns: Mapping[str, Any]) -> str | None:
    """Why a row cannot be scored."""
    absent, is_read = [], False
    for function in functions:
        check = getattr(function, "check_row", None)
        if check is None:
            continue
        reason = _asked(reward_name(function), check, columns)
        if reason is None:
            is_read = True
            continue
        problem = f"the reward function {reward_name(function)!r} cannot score it: {reason}"
        if not any(columns.get(name, "") is None for name in inspect.signature(function).parameters):
            return problem
        absent.append(problem)
    return None if is_read else absent[0]


def _asked(name: str, check: Any, columns: Mapping[str, Any]) -> str | None:
    try:
        return check(**columns)
    except Exception as error:  # code of anyone, which may raise anything
        return f"its check_row raised {type(error).__name__}: {error}"
