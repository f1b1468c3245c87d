"""Procedurally generated reasoning tasks, through the `reasoning-gym` package."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_llm.checks import nearest_name
from jaxrl_llm.data.interfaces import Row
from jaxrl_llm.extras import require

# Tasks whose scorer hands the answer, here a model's text, to Python's eval (some through sympy.parse_expr).
_EVALUATES_ANSWER = frozenset(
    {
        "binary_matrix",
        "composite",  # may contain any of the others
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
# These evaluate too, but their answers are plain arithmetic, which is recognised before it is scored.
_EVALUATES_ARITHMETIC = frozenset({"countdown", "puzzle24"})
_ARITHMETIC = re.compile(r"(?!.*\*\s*\*)[\d\s.+\-*/()]{1,200}", re.DOTALL)


def reasoning_gym_rows(name: str, *, size: int, seed: int, config: Mapping[str, Any] | None = None) -> list[Row]:
    """Generates the rows of a task: `question`, `answer` and `metadata`.

    All rows are made at once, since some tasks take long for one (tens of milliseconds for `sudoku`) and some
    do not make the same row twice.

    Args:
        name: Task of reasoning-gym, such as `chain_sum`.
        size: Number of rows.
        seed: Seed of the task; train and evaluation rows need different ones, further apart than `size` (row
            i comes from seed + i).
        config: Options of the task, such as `{"min_terms": 2, "max_terms": 3}`.

    Raises:
        ValueError: Unknown task or option.
    """
    task = _create_task(name, {**(config or {}), "size": size, "seed": seed})
    return [dict(task[index]) for index in range(size)]


def make_reasoning_gym_reward(
    name: str, *, config: Mapping[str, Any] | None = None, answer_tag: str | None = None
) -> Callable[..., list[float]]:
    """Makes a reward function that scores completions with the task's own scorer (0 to 1).

    A completion that the scorer cannot parse scores 0.

    Args:
        name: Task of reasoning-gym, the one the rows came from.
        config: Options of the task, the same as for the rows.
        answer_tag: `"answer"` scores the text in the last `<answer>…</answer>` (without one the score is 0);
            None scores the whole completion.

    Returns:
        `reward(prompts, completions, *, answer, metadata, **columns)`, named `reasoning_gym`.

    Raises:
        ValueError: Unknown task or option, or a task whose scorer would execute the completion as Python.
    """
    if name in _EVALUATES_ANSWER:
        raise ValueError(
            f"the scorer of reasoning_gym:{name} evaluates the answer as Python code, which is not safe with "
            "text that a model wrote; compare it with the column 'answer' in a reward function of your own"
        )
    task = _create_task(name, dict(config or {}))

    def score(text: str, entry: Row) -> float:
        answer = _tagged(text, answer_tag) if answer_tag is not None else text.strip()
        if answer is None or (name in _EVALUATES_ARITHMETIC and not _ARITHMETIC.fullmatch(answer)):
            return 0.0
        try:
            return float(task.score_answer(answer, entry))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return 0.0  # most scorers catch what they cannot parse, some let it escape

    def reasoning_gym(
        prompts: list[Any],
        completions: list[Any],
        *,
        answer: list[Any],
        metadata: list[Any],
        **columns: list[Any],
    ) -> list[float]:
        questions = columns.get("question", prompts)
        return [
            score(
                completion if isinstance(completion, str) else completion[-1]["content"],
                {"question": question, "answer": correct, "metadata": details},
            )
            for completion, question, correct, details in zip(completions, questions, answer, metadata, strict=True)
        ]

    return reasoning_gym


def _create_task(name: str, options: dict[str, Any]) -> Any:
    require("reasoning_gym")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {name!r}{nearest_name(name, list(DATASETS))}")
    known = list(DATASETS[name][1].__dataclass_fields__)
    for option in options:
        if option not in known:
            raise ValueError(
                f"reasoning_gym:{name} has no option {option!r}{nearest_name(option, known)} "
                f"(options: {', '.join(known)})"
            )
    try:
        return reasoning_gym.create_dataset(name, **options)
    except (AssertionError, TypeError) as error:
        raise ValueError(f"reasoning_gym:{name} refuses {options}: {error}") from error


def _tagged(text: str, tag: str) -> str | None:
    matches = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL)
    return matches[-1].strip() if matches else None
