"""Mathematical equivalence with the gold answer: numbers exactly, words as written, formulas by math-verify."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from jaxrl_llm.rewards.answers import Found, find_answer, last_line, statement
from jaxrl_llm.rewards.boxes import boxed, has_box
from jaxrl_llm.rewards.formulas import as_formula, number_as_formula
from jaxrl_llm.rewards.math_pool import MathPool, Question
from jaxrl_llm.rewards.notation import plain
from jaxrl_llm.rewards.numbers import Number, read_number, right_side, same_number
from jaxrl_llm.rewards.per_sample import RewardFunction, make_batch_reward
from jaxrl_llm.rewards.thoughts import spoken_of
from jaxrl_llm.rewards.words import letter, same_letter, squeezed, words

# A decimal of so many places may abbreviate a fraction whose decimals do not end (a gold column of floats).
_ABBREVIATING_PLACES = 6


@dataclass(frozen=True)
class _Gold:
    """A gold answer: a number, a letter, words, or else a formula."""

    text: str
    number: Number | None
    letter: str | None
    words: str | None
    formula: str | None

    @property
    def is_readable(self) -> bool:
        """Whether it can be compared with, if its formula, where it has nothing else, can."""
        return any(form is not None for form in (self.number, self.letter, self.words, self.formula))

    @property
    def needs_formula(self) -> bool:
        """Whether its formula is all that it has."""
        return self.formula is not None and self.number is None and self.letter is None and self.words is None


@functools.lru_cache(maxsize=4096)
def _read_gold(gold: str) -> _Gold:
    said = gold
    if has_box(gold):
        said = boxed(gold)[0]
    elif "####" in gold:
        said = gold.rpartition("####")[2]
    elif read_number(gold) is None and words(gold) is not None:
        said = find_gold_formula(gold)
    number = read_number(said)
    single = None if number else letter(said)
    formula = (number_as_formula(number) if number else None) or (None if single else as_formula(said))
    spelled = None if number or single or formula else words(said)
    return _Gold(said, number, single, spelled, formula)


def find_gold_formula(gold: str) -> str:
    """Returns what a gold answer in prose states as a formula or after "the answer is", else all of it."""
    if "$" in gold or r"\(" in gold or statement(gold) is not None:
        found = find_answer(gold).text
        return found if read_number(found) is not None or as_formula(found) is not None else gold
    return gold


def _same(answer: Number, gold: Number) -> bool:
    return same_number(answer, gold) or _abbreviates(answer, gold.value) or _abbreviates(gold, answer.value)


def _abbreviates(decimal: Number, fraction: Fraction) -> bool:
    """Whether the decimal is a fraction without last decimal, cut or rounded at six places or more."""
    rest = fraction.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return (
        rest > 1
        and decimal.places >= _ABBREVIATING_PLACES
        and abs(decimal.value - fraction) < Fraction(1, 10**decimal.places)
    )


def _verdict(said: str, found: Found, gold: _Gold) -> bool | list[str]:
    """Returns whether the answer is right, or the formulas of which one must equal the gold answer's."""
    # What is written alike is alike; a letter's brackets, a text's capitals and full stop do not matter.
    readings = (found.text, last_line(said)) if found.kind == "text" else (found.text,)
    if gold.letter is not None:
        letters = [letter(reading) for reading in readings]
        return any(single is not None and same_letter(single, gold.letter) for single in letters)
    number = read_number(found.text, letters_are_units=found.is_prose)
    if gold.number is not None and number is not None:
        return _same(number, gold.number)
    if gold.words is not None:
        return any(words(reading) == gold.words for reading in (*readings, right_side(plain(found.text))))
    if any(squeezed(reading) == squeezed(gold.text) != "" for reading in readings):
        return True
    if gold.formula is None or (number is None and letter(found.text) is not None and gold.number is not None):
        return False
    answers = [(number_as_formula(number) if number else None) or as_formula(found.text)]
    if gold.number is None and found.others:
        answers.append(as_formula(found.others))
    return [answer for answer in answers if answer is not None]


class _Verifier:
    """Scores answers; only formulas cost a question to math-verify."""

    def __init__(self, timeout_s: float, batch_timeout_s: float):
        self.pool = MathPool(timeout_s, batch_timeout_s)

    def score_all(self, prompts: Sequence[Any], texts: list[str], golds: Sequence[Any]) -> list[float | None]:
        """1 where the final answer equals the gold one, else 0; None where that cannot be read."""
        scores: list[float | None] = []
        asked: dict[int, list[Question]] = {}
        for index, (said, value) in enumerate(zip(spoken_of(prompts, texts), golds, strict=True)):
            gold = None if value is None else _read_gold(str(value))
            if gold is None or not gold.is_readable:
                scores.append(None)
                continue
            verdict = _verdict(said, find_answer(said), gold)
            if isinstance(verdict, bool):
                scores.append(float(verdict))
                continue
            scores.append(0.0)
            assert gold.formula is not None
            questions = [Question(gold.formula, answer) for answer in verdict]
            # Without an answer to compare, whether the gold one can be read is still to be told.
            asked[index] = questions or ([Question(gold.formula, None)] if gold.needs_formula else [])
        flat = [question for questions in asked.values() for question in questions]
        verdicts = dict(zip(flat, self.pool.ask(flat), strict=True)) if flat else {}
        for index, questions in asked.items():
            said_of = [verdicts[question] for question in questions]
            if "unread" in said_of:
                scores[index] = None
            elif any(verdicts[question] == "right" and question.answer is not None for question in questions):
                scores[index] = 1.0
        return scores

    def check(self, value: object) -> str | None:
        """Returns why no answer could be compared with a gold one; None if one can."""
        gold = None if value is None else _read_gold(str(value))
        if gold is not None and gold.is_readable:
            if not gold.needs_formula:
                return None
            assert gold.formula is not None
            if self.pool.ask([Question(gold.formula, None)]) == ["right"]:
                return None
        return (
            f"{value!r:.120} is no gold answer that can be read within the time limit: it must be a number, a "
            r"formula, a letter or a few words, bare, in $…$ or in \boxed{…}"
        )


def make_math_reward(
    *,
    answer_column: str = "answer",
    timeout_s: float = 5.0,
    batch_timeout_s: float = 30.0,
    name: str = "math_reward",
) -> RewardFunction:
    r"""Returns the reward 1 for a completion whose final answer equals the gold one mathematically, else 0.

    The final answer stands outside the thoughts (`<think>…</think>`; one that does not end has none) in the
    last `\boxed{…}` or `\fbox{…}`, boxes side by side being one list; without a box it follows "the answer
    is", or is the last formula or number. An answer is read as a whole or not at all:

    - numbers exactly (`read_number`): `1{,}000`, `1e3`, `2 1/2`, `0.\overline{3}`, `5 million` are what they
      say, currency and units are left out, and `5%` is 0.05; 0.5 = \frac{1}{2} = 1/2. A decimal of six places
      or more may stand for the fraction that it abbreviates;
    - letters and words as they are written: `A` is `(A)` and `\text{A}`, never the variable `a`, and
      `no solution` is `\text{No solution.}`;
    - all else by math-verify. Several prose-separated boxes may also be the set that the gold answer is.

    Left: units are not compared; ratios (`3:4`), times, numbers in other bases (`101_2`) and words must be
    written like the gold answer; number words, decimal commas and approximations are not read; `(1, 2)` is both
    the point and the interval.

    None where the gold answer cannot be read; `check_row` says so ahead. The first formula starts a process
    (about a second; more of them where many wait), which ends with the interpreter. The function may be called
    from any thread; calls take turns.

    Args:
        answer_column: The column with the gold answer: a number, a formula, a letter or a few words, bare, in
            `$…$` or in `\boxed{…}`, in which case there may be text around it.
        timeout_s: Limit for one answer, in seconds. A completion that takes longer gets 0, a gold answer
            None.
        batch_timeout_s: Limit for all answers of a call, in seconds. What looks costly comes last, and gets 0
            when it is not reached.
        name: The metric's name.

    Raises:
        ValueError: If a time limit is not positive.
        RuntimeError: In the call, if the process does not start.
    """
    for limit, seconds in (("timeout_s", timeout_s), ("batch_timeout_s", batch_timeout_s)):
        if not 0.0 < seconds < math.inf:
            raise ValueError(f"{name}: {limit} must be positive and finite, got {seconds}")
    verifier = _Verifier(timeout_s, batch_timeout_s)
    return make_batch_reward(verifier.score_all, name, [answer_column], check=verifier.check)


#: `make_math_reward()`: gold answer in the column `answer`, five seconds an answer, thirty a call.
math_reward = make_math_reward()
