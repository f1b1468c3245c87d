"""Correctness under GSM8K's convention: the answer stands after `####`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxrl_llm.rewards.answers import last_number, marked
from jaxrl_llm.rewards.boxes import boxed, has_box
from jaxrl_llm.rewards.numbers import Number, read_number, same_number
from jaxrl_llm.rewards.per_sample import RewardFunction, make_batch_reward
from jaxrl_llm.rewards.thoughts import spoken_of


def _read(text: str) -> Number | None:
    if has_box(text):
        text = boxed(text)[0]
    return read_number(text, letters_are_units=True)


def _gold_number(gold: object) -> Number | None:
    if isinstance(gold, bool) or gold is None:
        return None
    text = str(gold)
    return _read(text if "####" not in text else marked(text) or "")


def make_gsm8k_reward(
    *, answer_column: str = "answer", strict: bool = True, name: str = "gsm8k_reward"
) -> RewardFunction:
    r"""Returns the reward 1 for a completion whose final number equals the gold one, else 0.

    The prediction is the number after the last `####`, read as a whole (`read_number`): currency, units,
    thousands and trailing zeros do not matter, exponents, fractions, percent and scale words do (`5e3`, `5/7`,
    `5%` and `$5 million` are not 5), and what is another number or several is none. The comparison is exact
    (72.0 = 72, 0.333 ≠ 1/3). Thoughts (`<think>…</think>`) are not read, nor is what follows one that does not
    end. None where the gold answer has no such number; `check_row` says so ahead.

    Left: number words ("seventy-two"), decimal commas, sums (`70 + 2`) and clock times are no numbers;
    `5 dozen` is 60, `3 quarters` is not read, and units are not compared ("72 euros" equals "72 dollars").

    Args:
        answer_column: The column with the gold answer: a number, or a solution that ends in `#### <number>`.
        strict: If False, a completion with no number after `####` is judged by its box (`\boxed`), or without
            one by its last number.
        name: The metric's name.

    Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems" (2021).
    """

    def score(said: str, gold: object) -> float | None:
        expected = _gold_number(gold)
        if expected is None:
            return None
        predicted = marked(said)
        if predicted is None and not strict:
            predicted = said if has_box(said) else last_number(said.replace("####", "\n"))
        number = None if predicted is None else _read(predicted)
        return float(number is not None and same_number(number, expected))

    def score_all(prompts: Sequence[Any], texts: list[str], golds: Sequence[Any]) -> list[float | None]:
        """1 where the number after `####` equals the gold one, else 0; None without a gold number."""
        return [score(said, gold) for said, gold in zip(spoken_of(prompts, texts), golds, strict=True)]

    def check(gold: object) -> str | None:
        if _gold_number(gold) is not None:
            return None
        return f"{gold!r:.120} has no gold answer that can be read: it must be a number or end in '#### <number>'"

    return make_batch_reward(score_all, name, [answer_column], check=check)


#: `make_gsm8k_reward()`: the number after `####`, gold solution in the column `answer`.
gsm8k_reward = make_gsm8k_reward()
