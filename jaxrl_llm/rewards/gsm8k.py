"""Correctness under GSM8K's convention: the answer stands after `####`."""

from __future__ import annotations

import re
from decimal import Decimal

from jaxrl_llm.rewards.per_sample import RewardFunction, make_per_sample_reward

# A hyphen after a word, a digit or a bracket is a minus between two operands ("5-3") or a dash, not a sign.
_SIGN = r"(?:(?<![\w)])(?P<sign>[-+−]))?(?:\\?\$\s?(?P<inner_sign>[-−])?)?"
# Atomic: a number is taken whole or not at all, so that what follows it is judged after its last digit.
_NUMBER = _SIGN + r"(?P<digits>(?>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+))"
# "3/4" and "2*9" are not the numbers 3 and 2.
_ANSWER = re.compile(rf"####\s*{_NUMBER}(?!,?[0-9])(?!\s*[/*^×]\s*[0-9])")
_ANY_NUMBER = re.compile(_NUMBER)


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", ""))
    negative = (match["sign"] in ("-", "−")) != (match["inner_sign"] is not None)
    return -value if negative else value


def _last(pattern: re.Pattern[str], text: str) -> Decimal | None:
    matches = list(pattern.finditer(text))
    return _value(matches[-1]) if matches else None


def make_gsm8k_reward(
    *, answer_column: str = "answer", strict: bool = True, name: str = "gsm8k_reward"
) -> RewardFunction:
    """Returns the reward 1 for a completion whose final number equals the gold one, else 0.

    Gold and prediction are the number right after the last `####`; `$`, thousands commas, a trailing period
    and trailing zeros do not matter, and the comparison is exact (72.0 = 72, 0.333 ≠ 1/3). None where the
    gold answer has no such number.

    Args:
        answer_column: The column with the gold solution, which ends in `#### <number>`.
        strict: If False, a completion with no number after `####` is judged by its last number.
        name: The metric's name.

    Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems" (2021).
    """

    def score(text: str, gold: object) -> float | None:
        """1 where the number after `####` equals the gold one, else 0; None without a gold number."""
        expected = _last(_ANSWER, str(gold))
        if expected is None:
            return None
        predicted = _last(_ANSWER, text)
        if predicted is None and not strict:
            predicted = _last(_ANY_NUMBER, text)
        return float(predicted == expected)

    return make_per_sample_reward(score, name, [answer_column])


#: `make_gsm8k_reward()`: the number after `####`, gold solution in the column `answer`.
gsm8k_reward = make_gsm8k_reward()
