"""The task of experiments/reverse_text.py; that it runs is shown with the other experiments."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import pytest

from experiments.reverse_text import CONFIG, common, lcs, load_texts, solved


def by_recursion(one: str, other: str) -> int:
    """The definition."""

    @functools.cache
    def longest(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        return 1 + longest(i + 1, j + 1) if one[i] == other[j] else max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


def test_the_common_subsequence_is_the_longest() -> None:
    draw = random.Random(0)
    for _ in range(50):
        one, other = ("".join(draw.choices("abc ", k=draw.randrange(9))) for _ in range(2))
        assert common(one, other) == by_recursion(one, other)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<reversed_text>god dlo</reversed_text>", 1.0),
        ("Here:\n<reversed_text> god dlo\n</reversed_text>", 1.0),
        ("<reversed_text>old dog</reversed_text>", 5 / 7),
        ("<reversed_text>god dlo god dlo</reversed_text>", 7 / 15),
        ("<reversed_text>god</reversed_text>", 3 / 7),
        ("<reversed_text></reversed_text>", 0.0),
        ("<reversed_text>god dlo", 0.0),
        ("god dlo", 0.0),
    ],
)
def test_an_answer_is_worth_what_it_has_in_common(completion: str, reward: float) -> None:
    assert lcs(["?"], [completion], text=["old dog"]) == [reward]
    assert lcs(["?"], [[{"role": "assistant", "content": completion}]], text=["old dog"]) == [reward]


def test_texts_are_held_out_and_their_solutions_right() -> None:
    train_rows, eval_rows = load_texts(CONFIG)
    train, held_out = ([rows[n]["text"] for n in range(len(rows))] for rows in (train_rows, eval_rows))
    assert (len(train), len(held_out)) == (CONFIG.texts, CONFIG.held_out)
    assert len({*train, *held_out}) == len(train) + len(held_out)
    assert load_texts(CONFIG) == (train_rows, eval_rows) != load_texts(dataclasses.replace(CONFIG, seed=1))
    assert lcs(["?"], [solved(eval_rows[0])["completion"]], text=held_out[:1]) == [1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": 10_000}, "texts=10000 and held_out=64 are more than the"),
        ({"texts": 0}, "texts=0 and held_out=64 must be at least 1"),
    ],
)
def test_texts_that_there_are_not_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)
