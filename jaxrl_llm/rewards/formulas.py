r"""Formulas in the LaTeX that math-verify reads as a whole; what it would read in part is no formula here."""

from __future__ import annotations

import re
from fractions import Fraction
from unicodedata import normalize

from jaxrl_llm.rewards.notation import plain, unicode_as_ascii, unwrapped
from jaxrl_llm.rewards.numbers import Number
from jaxrl_llm.rewards.units import factor_of, words_of

# Enough for any honest answer.
_LONGEST = 1_000
_UNICODE = str.maketrans(
    {
        "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ",
        "∅": r"\emptyset ", "±": r"\pm ", "∈": r"\in ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
        "÷": r"\div ", "ℝ": r"\mathbb{R}", "€": "", "£": "", "¥": "", "°": "",
    }
)  # fmt: skip
_ROOT = re.compile(r"(?:√|(?<![A-Za-z\\])sqrt)\s*(?:\{([^{}]*)\}|\(([^()]*)\)|([0-9]+|[A-Za-z]))")
_CUBE_ROOT = re.compile(r"∛\s*(?:\(([^()]*)\)|([0-9]+|[A-Za-z]))")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,;:! ]| )(?=[0-9]{3}(?![0-9]))")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]{1,4})(?![A-Za-z0-9])")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{?\s*([0-9]{1,50})\s*\}?")
_NAMES = {
    "pi": r"\pi ", "infinity": r"\infty ", "inf": r"\infty ", "oo": r"\infty ", "theta": r"\theta ",
    **{name: rf"\{name} " for name in ("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp")},
}  # fmt: skip
_NAME = re.compile(r"(?<![A-Za-z\\])(?:" + "|".join(_NAMES) + r")(?![A-Za-z])")
_TEXT = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mathrm|mbox|hbox)\s*\{([^{}]*)\}"
_TEXTS = re.compile(_TEXT)
_LAST_TEXT = re.compile(rf"(?:\\[,;: ]|~|\s)*{_TEXT}(?:\^\s?\{{?[-+]?[0-9]\}}?)?$")
_JOINING = frozenset(("and", "or", "if", "for", "otherwise", ""))
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[a-z]*matrix\*?\}|\{cases\}|\{array\}(?:\{[lcr|]*\})?)?")
_RUN = re.compile(r"[^\W\d_]{2,}")
_PROSE_PAIRS = words_of("is in of to at it no he we me us my by so if as on up do go am an be")
# A base (101₂), a prime or inches, a time, what belongs to no formula: the parser drops or misreads them. And
# powers that nobody can compute.
_MISREAD = re.compile(
    r"[0-9)}]\s*_|[0-9]\s*['\"]|[0-9]\s*:\s*[0-9]|[?@#`\"]|\.\.|\\(?:l|c)?dots|[0-9][eE][-+]?[0-9]"
    r"|[0-9](?:\s|\\[,;: ])+[0-9]|\^\s*\{?\s*-?[0-9]{7}"
)


def _repeating(match: re.Match[str]) -> str:
    head, fixed, period = match[1] or "0", match[2], match[3]
    value = Fraction(int(head + fixed + period) - int(head + fixed), 10 ** len(fixed) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _is_prose(formula: str) -> bool:
    for run in _RUN.findall(_COMMAND.sub(" ", _TEXTS.sub(" ", formula))):
        if run.lower() in ("and", "or"):
            continue
        if run.lower() in _PROSE_PAIRS or (len(run) > 2 and run != "abc" and re.search("[aeiouAEIOU]", run)):
            return True
    return False


def as_formula(text: str) -> str | None:
    """Returns the formula that a text is, in the LaTeX of math-verify; None where it is prose or none.

    Unicode becomes LaTeX; thousands, exponents and repeating decimals become numbers that it knows; a unit
    at the end is left out, a word that scales the formula makes it none.
    """
    formula = " ".join(unwrapped(text).split())
    if not 0 < len(formula) <= _LONGEST:
        return None
    # 1/2 x would be half an x for one reader and 1/(2x) for another.
    formula = _VULGAR.sub(lambda match: r"\frac{{{}}}{{{}}}".format(*normalize("NFKC", match[0]).split("⁄")), formula)
    formula = unicode_as_ascii(formula).translate(_UNICODE).replace(r"\$", "").replace("**", "^")
    last = _LAST_TEXT.search(formula)
    if last and last.start() and last[1].strip() not in _JOINING:
        meant = factor_of(" " + plain(last[1]), after_currency=False, letters_are_units=True)
        if meant is None or meant.factor != 1:
            return None
        formula = formula[: last.start()]
    if any(content.strip() not in _JOINING for content in _TEXTS.findall(formula)) or "$" in formula:
        return None
    formula = _CUBE_ROOT.sub(lambda match: rf"\sqrt[3]{{{match[1] or match[2]}}}", formula)
    for _ in range(3):
        formula = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2] or match[3]}}}", formula)
    formula = _REPEATING.sub(_repeating, _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", _THOUSANDS.sub("", formula)))
    formula = _NAME.sub(lambda match: _NAMES[match[0]], formula)
    if _MISREAD.search(formula) or _is_prose(formula) or not re.search(r"[0-9A-Za-z]", formula):
        return None
    return formula.strip()


def number_as_formula(number: Number) -> str | None:
    """Returns a number in LaTeX: a decimal as it was written, else an exact fraction; None if it is too long."""
    numerator, denominator = number.value.numerator, number.value.denominator
    if max(numerator.bit_length(), denominator.bit_length()) > _LONGEST:
        return None
    if number.places and 10**number.places % denominator == 0:
        digits = str(abs(numerator) * 10**number.places // denominator).zfill(number.places + 1)
        return f"{'-' if numerator < 0 else ''}{digits[: -number.places]}.{digits[-number.places :]}"
    return str(numerator) if denominator == 1 else rf"\frac{{{numerator}}}{{{denominator}}}"
