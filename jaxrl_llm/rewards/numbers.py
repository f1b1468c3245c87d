"""Reading a text that is one number, exactly and as a whole or not at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from jaxrl_llm.rewards.notation import plain, unwrapped
from jaxrl_llm.rewards.units import factor_of

# Longer texts are no numbers that anyone asks for; powers beyond have more digits than anyone compares.
_LONGEST_TEXT = 6_000
_LARGEST_POWER_BITS = 50_000

_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[1-9][0-9]{0,2}(?:[ '][0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
_POWER = r"\s?(?:\^|\*\*)\s?(?:\{{\s?(?P<{0}a>[-+]?[0-9]+)\s?\}}|\((?P<{0}b>[-+]?[0-9]+)\)|(?P<{0}c>[-+]?[0-9]+))"
_CURRENCY = r"(?:(?:US|A|C|CA|AU|NZ|HK|S|R)\$|[$€£¥₹₽₩₪₫฿₦₱¢]|(?:USD|EUR|GBP|CAD|AUD|INR|JPY|CHF|Rs\.?)(?=[\s0-9]))"
_FORM = re.compile(
    rf"(?P<sign>[-+]|(?:minus|negative)\b)?\s*(?P<currency>{_CURRENCY})?\s*(?P<inner_sign>[-+])?\s*(?:"
    rf"(?P<whole>{_INTEGER})\s(?:and\s)?(?P<part>[0-9]+)\s?/\s?(?P<parts>[0-9]+)"
    rf"|(?P<numerator>{_DECIMAL})\s?/\s?(?P<denominator>{_DECIMAL})"
    r"|(?P<head>[0-9]*)\.(?P<fixed>[0-9]*)\((?P<period>[0-9]+)\)(?:\.{3,})?"
    r"|(?P<begun_head>[0-9]*)\.(?P<begun>[0-9]+)\s?\.{3,}"
    rf"|(?P<mantissa>{_DECIMAL})(?:[eE](?P<exponent>[-+]?[0-9]+)|\s?[*xX]\s?10{_POWER.format('ten')})"
    rf"|(?P<base>{_DECIMAL}){_POWER.format('power')}"
    rf"|(?P<decimal>{_DECIMAL})"
    r")(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_REPEATED = re.compile(r"([0-9]*?)([0-9]+?)\2+")
_EQUALS = re.compile(r"(?<![<>!:=])=(?!=)")
_RELATION = re.compile(r"[<>≤≥≠≈]|\\(?:n?eq?|n?e|l[et]q?|g[et]q?|approx|sim|pm|mp)(?![A-Za-z])|!=")
_SEVERAL = re.compile(r",(?![0-9]{3}(?![0-9]))|;|\b(?:and|or)\b")


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: Fraction
    places: int = 0
    """Digits after the point, where it was written as a decimal."""
    percent: bool = False
    """Whether it was written in percent; the value is then the hundredth part."""


def _exact(digits: str) -> Fraction:
    return Fraction(Decimal(re.sub("[ ,']", "", digits)))


def _power(base: Fraction, exponent: str) -> Fraction | None:
    if len(exponent) > 6 or (base == 0 and int(exponent) <= 0):
        return None
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    return base ** int(exponent) if size * abs(int(exponent)) <= _LARGEST_POWER_BITS else None


def _repeating(head: str, fixed: str, period: str) -> Fraction:
    """0.fixed(period): the period is worth period / (10ᵏ − 1), shifted."""
    digits = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(fixed)
    return _exact(f"{head or '0'}.{fixed or '0'}") + digits


def _magnitude(form: re.Match[str]) -> Fraction | None:
    def exponent_of(name: str) -> str | None:
        return form[name + "a"] or form[name + "b"] or form[name + "c"]

    if form["whole"]:
        part, parts = _exact(form["part"]), _exact(form["parts"])
        # 2 3/2 is no mixed number; it may be a product.
        return _exact(form["whole"]) + part / parts if part < parts else None
    if form["numerator"]:
        denominator = _exact(form["denominator"])
        return _exact(form["numerator"]) / denominator if denominator else None
    if form["period"]:
        return _repeating(form["head"], form["fixed"], form["period"]) if len(form["period"]) < 1000 else None
    if form["begun"]:
        # 0.333… and 0.1666…, where at least two periods are written; not 3.14….
        begun = _REPEATED.fullmatch(form["begun"]) if len(form["begun"]) < 100 else None
        return _repeating(form["begun_head"], begun[1], begun[2]) if begun else None
    if form["mantissa"]:
        scale = _power(Fraction(10), form["exponent"] or exponent_of("ten") or "")
        return None if scale is None else _exact(form["mantissa"]) * scale
    if form["base"]:
        return _power(_exact(form["base"]), exponent_of("power") or "")
    return _exact(form["decimal"])


def right_side(text: str) -> str:
    """Returns what stands after the last equals sign of a chain such as `6*12 = 72` or `x = 72`."""
    sides = _EQUALS.split(text)
    if len(sides) == 1 or _RELATION.search(text) or _SEVERAL.search(" ".join(sides[:-1])):
        return text
    return sides[-1]


def read_number(text: str, *, letters_are_units: bool = False) -> Number | None:
    r"""Returns the number that the whole text is; None where it is anything else, or more than one number.

    Read are signs, thousands (`1,000`, `1{,}000`, `1\,000`, `1 000`), decimals, exponents (`1e3`, `10^{3}`,
    `5 \times 10^3`), fractions, mixed numbers (`2 1/2`, `2\frac12`, `2½`), repeating decimals
    (`0.\overline{3}`, `0.(3)`, `0.333…`), percent, scale words (`5 million`, `7k`); currency and units are
    left out. `x = 5` is the number 5. Not read: decimal commas, number words, times of day, sums, bounds,
    several numbers, and powers of more than some 15 000 digits.

    Args:
        text: Plain or LaTeX.
        letters_are_units: Whether `5 m` is five metres; otherwise it is a product with a variable.
    """
    if len(text) > _LONGEST_TEXT:
        return None
    form = _FORM.fullmatch(unwrapped(plain(right_side(unwrapped(plain(unwrapped(text)))))))
    if form is None or (form["sign"] and form["inner_sign"]):
        return None
    tail = factor_of(form["rest"], after_currency=form["currency"] is not None, letters_are_units=letters_are_units)
    magnitude = None if tail is None else _magnitude(form)
    if tail is None or magnitude is None:
        return None
    negative = (form["sign"] or form["inner_sign"] or "+")[0] in "-mMnN"
    places = len(form["decimal"].partition(".")[2]) if form["decimal"] else 0
    return Number((-magnitude if negative else magnitude) * tail.factor, places, tail.percent)


def same_number(answer: Number, gold: Number) -> bool:
    """Whether the values are equal; to a gold answer in percent, the percent sign may be left out."""
    if answer.value == gold.value:
        return True
    return gold.percent and not answer.percent and answer.value == 100 * gold.value
