"""What may follow a number: words that scale it, percent, units that leave it as it is, words that change it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction


def words_of(text: str) -> frozenset[str]:
    """Returns the words of a list that is written with spaces between them."""
    return frozenset(text.split())


_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "lakh": 10**5, "crore": 10**7, "mn": 10**6, "bn": 10**9, "mil": 10**6, "tn": 10**12, "k": 10**3, "K": 10**3,
    "M": 10**6, "B": 10**9,
}  # fmt: skip
_PERCENT = re.compile(r"\s?(?:%|(?:percent|per\s?cent|pct)\b)", re.IGNORECASE)
# Units that stand right after a number, or are too short to be told from a product of variables.
_SHORT_UNITS = words_of(
    "mm cm dm km nm um in ft yd mi kg mg lb lbs oz hr hrs min mins sec secs ms ml mL dl cl kl mph kmh kph "
    "kw kW kWh Hz kHz MHz GHz Pa kPa J kJ cal kcal eV ha sq pm am PM AM st nd rd th pts pcs USD EUR GBP "
    "CAD AUD INR JPY CHF cents deg rad mol ppm GB MB KB TB yr yrs wk wks mo mos bpm rpm gal qt pt tsp "
    "tbsp kr zl 円 元 원 圆 块"
)
_LETTER_UNITS = frozenset("mgshlLNJWVKCF")
_SCALE_WORDS = frozenset(scale for scale in _SCALES if len(scale) > 2)
_NUMBER_WORDS = words_of(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety half "
    "halves third thirds quarter quarters fourth fourths fifths sixth sixths seventh sevenths eighth "
    "eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths millionth millionths"
)
# Right after a number, these make it another one, or none.
_CHANGING = (
    _NUMBER_WORDS
    | _SCALE_WORDS
    | words_of(
        "squared cubed choose plus minus or point factorial mod modulo divided multiplied raised power root "
        "sqrt sin cos tan cot sec csc log ln exp pi percent percentage pct not wrong incorrect no base e x y "
        "z i alpha beta gamma delta epsilon theta lambda sigma omega infinity inf nan"
    )
)
#: Units whose smaller ones may follow: "5 feet 3 inches" and "2 hours and 30 minutes" are not their last part.
COMPOUND_UNITS = words_of(
    "foot feet ft yard yards hour hours hrs hr h minute minutes min day days week weeks month months year "
    "years pound pounds lb lbs dollar dollars mile miles meter meters metres kilometers degree degrees "
    "gallon gallons"
)
_JOINING = words_of("and or to plus minus times point")
_FRACTION_WORDS = words_of("half quarter third fourth fifth sixth seventh eighth ninth tenth hundredth")
_CARDINALS = (_NUMBER_WORDS - _FRACTION_WORDS) | _SCALE_WORDS | {"half"}
_ACRONYM = re.compile(r"[A-Z]{2,}s")
_LITTLE_WORDS = words_of("a an of is he we by i my it to in on at as so if or o go do be")
_WORD = re.compile(r"[^\W\d_]+")
_UNIT_POWER = re.compile(
    r"(?<=[A-Za-z)])(?:\s?\^\s?\{?[-+]?[1-9]\}?)|(?<=\b[mM])[23]\b|(?<=\b[cdkm]m)[23]\b|(?<=\bft)[23]\b"
)
_NOON = re.compile(r"\b[ap]\.\s?m\b\.?", re.IGNORECASE)
_RATES = re.compile(r"\b(?:[kcm]?m|ft|mi|in|[km]?g|lbs?|N|J|kJ|mol|m?L)/(?:s|h|hr|min|m|cm|ft|m?L|kg|g|K|mol)\b")
_DEGREES = re.compile(r"^\s?°\s?[CFK](?![A-Za-z])")
_ALLOWED = re.compile(r"(?:[\s,;:.!?()'/°\"$€£¥¢*_–—-]|[^\W\d_])*")
_START = re.compile(r"[\s,;(°$€£¥¢-]|/\s?[^\W\d_]{2}|[^\W\d_]")


@dataclass(frozen=True)
class Tail:
    """What the words after a number make of it."""

    factor: Fraction
    percent: bool = False


def _scales(rest: str, after_currency: bool) -> tuple[int, str]:
    """Returns the product of the scale words that `rest` starts with, and what follows them."""
    factor = 1
    while match := re.match(r"[\s-]?([A-Za-z]+)", rest):
        word = match[1]
        name = word if len(word) == 1 else word.lower()
        if name not in _SCALES and name.endswith("s"):
            name = name[:-1]
        scale = 10**6 if after_currency and word == "m" else _SCALES.get(name)
        if scale is None:
            break
        factor, rest = factor * scale, rest[match.end() :]
        # After a letter there is no second one: "5 k B" is nothing.
        after_currency = False
    return factor, rest


def _leaves_value(rest: str, letters_are_units: bool) -> bool:
    """Whether the text after a number is a unit, or words that do not change what was said before them."""
    if not rest:
        return True
    if not _START.match(rest):
        return False
    rest = _UNIT_POWER.sub("", _RATES.sub("km", _NOON.sub("pm", _DEGREES.sub("", rest))))
    if not _ALLOWED.fullmatch(rest):
        return False
    words = _WORD.findall(rest)
    if not words:
        return not rest.startswith(("-", "/"))
    first, known = words[0], _SHORT_UNITS | _LETTER_UNITS if letters_are_units else _SHORT_UNITS
    if first not in known:
        if first.lower() in _CHANGING and first != "I":
            return False
        # Two letters, or three without a vowel, are a product of variables; so is one that stands alone.
        if len(first) < 3 and (first.lower() not in _LITTLE_WORDS or len(words) == 1):
            return False
        if (
            first.isascii()
            and not _ACRONYM.fullmatch(first)
            and first.lower() not in _LITTLE_WORDS
            and not re.search("[aeiou]", first.lower())
        ):
            return False
        # "72rolls" is 72 of them, "5ab" and "5sin" are not.
        if rest[:1].isalpha() and len(first) < 4:
            return False
    return not _goes_on([word.lower() for word in words])


def _goes_on(words: list[str]) -> bool:
    """Whether words after a number go on with it ("feet three inches", "hours and a half") or deny it."""
    if words[0] in ("is", "was") and len(words) > 1 and words[1] in ("not", "wrong", "incorrect"):
        return True
    if len(words) > 1 and words[0] in COMPOUND_UNITS and words[1] in _NUMBER_WORDS:
        return True
    for index, word in enumerate(words):
        following = words[index + 1 : index + 3]
        if word in _JOINING and following:
            # "and a third", "and five"; "the third and fourth" goes on with nothing.
            part = following[-1] in _FRACTION_WORDS and following[0] in ("a", "one", "an")
            if part or following[0] in _CARDINALS - {"one"}:
                return True
    return False


def factor_of(rest: str, *, after_currency: bool, letters_are_units: bool) -> Tail | None:
    """Returns by what the text after a number scales it; None if the text makes it another number, or none.

    Args:
        rest: All that follows the number, plain.
        after_currency: Whether a currency sign stood before the number: `$5m` is five million.
        letters_are_units: Whether a single letter may be a unit.
    """
    factor, rest = _scales(rest, after_currency)
    percent = _PERCENT.match(rest)
    if percent:
        rest = rest[percent.end() :]
    if rest[:1].isalpha() and percent:
        return None
    if not _leaves_value(rest, letters_are_units):
        return None
    return Tail(Fraction(factor, 100 if percent else 1), percent is not None)
