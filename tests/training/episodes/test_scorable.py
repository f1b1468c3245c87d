"""Rows that no reward function can score are found before anything is sampled."""

from __future__ import annotations

from typing import Any

import pytest

from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.rewards import make_length_reward
from jaxrl_llm.training.episodes.scorable import check_scorable
from jaxrl_llm.training.episodes.scoring import RewardSum


class Digits:
    """A reward function that reads gold answers of digits."""

    def __init__(self, name: str = "digits") -> None:
        self.__name__, self.asked = name, 0

    def __call__(self, prompts: Any, completions: Any, *, answer: Any, **columns: Any) -> list[float]:
        return [1.0 for _ in completions]

    def check_row(self, *, answer: Any, **columns: Any) -> str | None:
        self.asked += 1
        assert "prompt" not in columns
        return None if answer is not None and answer.isdigit() else f"'answer': {answer!r} is no number"


def prompts(*answers: Any) -> PromptDataset:
    rows = [{"prompt": "a", "answer": answer} for answer in answers]
    return PromptDataset(rows, CharTokenizer("a"), max_prompt_length=1)


def test_each_row_is_asked_about_once() -> None:
    digits, dataset = Digits(), prompts("1", "2", "3")
    for _ in range(2):
        check_scorable(RewardSum((digits,)), dataset)
    assert digits.asked == 3
    check_scorable(
        RewardSum((digits, make_length_reward(3, unit="characters"))), dataset
    )  # others together are another question
    assert digits.asked == 6


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (("1", "x", "y"), r"row 1: .*'digits' cannot score it: 'answer': 'x' is no number \(2 of 3 rows"),
        (("1", None), r"row 1: .*'answer': None is no number \(1 of 2 rows cannot be scored\): mend"),
        ((3,), "row 0: .*its check_row raised AttributeError: 'int'"),
    ],
)
def test_the_first_row_is_named(answers: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_scorable(RewardSum((Digits(),)), prompts(*answers))


class Letters(Digits):
    """A reward function for another task, with a gold answer of its own."""

    def __call__(self, prompts: Any, completions: Any, *, letter: Any, **columns: Any) -> list[float]:
        return [1.0 for _ in completions]

    def check_row(self, *, letter: Any, **columns: Any) -> str | None:
        return None if letter == "A" else f"'letter': {letter!r} is no letter"


def test_what_is_not_there_is_left_to_the_function_of_another_task() -> None:
    """But not what is there and cannot be read, and not to one that would score anything."""
    rows = [{"prompt": "a", "answer": answer, "letter": letter} for answer, letter in (("1", None), (None, "A"))]
    both = RewardSum((Digits(), Letters("letters"), make_length_reward(3, unit="characters")))

    def dataset(*more: dict[str, Any]) -> PromptDataset:
        return PromptDataset([*rows, *more], CharTokenizer("a"), max_prompt_length=1)

    check_scorable(both, dataset())
    for row, message in (
        ({"answer": None, "letter": "B"}, "'letters' cannot score it: 'letter': 'B'"),
        ({"answer": "x", "letter": "A"}, "'digits' cannot score it: 'answer': 'x'"),
        ({"answer": None, "letter": None}, "'digits' cannot score it: 'answer': None"),
        ({}, "'digits' cannot score it: 'answer': None"),
    ):
        with pytest.raises(ValueError, match=f"row 2: the reward function {message}"):
            check_scorable(both, dataset({"prompt": "a", **row}))


def test_functions_without_a_check_are_not_asked() -> None:
    check_scorable(RewardSum((make_length_reward(3, unit="characters"),)), prompts(None, "x"))
    with pytest.raises(ValueError, match="lacks"):
        check_scorable(
            RewardSum((Digits(),)), PromptDataset([{"prompt": "a"}], CharTokenizer("a"), max_prompt_length=1)
        )
