r"""Finding the answer that a text states: in its box, after `####` or "the answer is", at its end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxrl_llm.rewards.boxes import boxed, has_box
from jaxrl_llm.rewards.notation import plain, unicode_as_ascii, unwrapped
from jaxrl_llm.rewards.numbers import read_number
from jaxrl_llm.rewards.units import COMPOUND_UNITS, factor_of, words_of
from jaxrl_llm.rewards.words import letter

_IS = r"\b(?:is|are|be|was|equals|becomes)\b"
_STATEMENT = re.compile(
    rf"\b(?:answers?|correct (?:option|choice))\b(?:(?![.:=\n]|{_IS}).){{0,80}}?(?:{_IS}(?:\s*:)?|[:=])",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[^\s.])(?:[.?]|(?<![0-9)}])!)(?=\s|\Z)|\n")
# What comes after it explains: "72, since 70 + 2 = 72", "72, not 73".
_CLAUSE_END = re.compile(r"[,;]\s+(?!and\b|or\b)[a-zA-Z]{2,}|\s(?:because|since|which)\s")
_MARKED = re.compile(r"####\s*([^\n#]*)")
# The fourth heading of a text in Markdown is no answer: "#### Step 1".
_BEGINS_AS_NUMBER = re.compile(
    r"(?:[^A-Za-z0-9\\]|\\[A-Za-z]*+|\b(?:minus|negative|USD|EUR|GBP|Rs|[A-Z]{1,3}(?=\$)|[A-Za-z]\w{0,20}\s*=))*+[0-9]"
)
_MARKED_END = re.compile(r"(?<=[^\s.])[.?]\s")
_FORMULA = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|(?<![\\$0-9])\$(?P<inline>(?!\s)(?:\\.|[^$\\\n])*?)(?<![\s\\])\$(?![0-9$])"
    r"|\\\((?P<round>.*?)\\\)|\\\[(?P<square>.*?)\\\]",
    re.DOTALL,
)
_BETWEEN_FORMULAS = re.compile(r"\s*(?:,|,?\s*\b(?:and|or)\b)\s*")
_NUMBER_TOKEN = re.compile(
    r"[-+~(\[$€£¥*/^x.,0-9{}]*[0-9][-+0-9.,/^*x(){}eE%$€£]*|[-+*/x^]|[$€£¥]"
    # With these before it, it is no number of its own.
    r"|and|or|to|minus|negative|plus|times|log|ln|sin|cos|tan|sqrt|[<>≤≥≠±≈~√!=]*[<>≤≥≠±≈~√!]=?"
    r"|\\(?!therefore|implies|[Rr]ightarrow|to\b)[A-Za-z]+",
    re.IGNORECASE,
)
_JOINING_WORDS = words_of("and or to plus times over choose mod of out by")
_ONE_OF_SEVERAL = re.compile(r"\b[A-Za-z] = \S*[0-9]\S* (?:and )?[A-Za-z] =\Z")
_UNIT_POWER = re.compile(r"(?:[A-Za-z/]{1,12})?\^\{?[-+]?[1-9]\}?|[mM][23]|[ck]m[23]|ft[23]")
_HAS_DIGIT = re.compile(r"[0-9]")

# An answer without a box stands at the end; a limit, as some of the patterns take the square of a length.
_LONGEST_END = 4_000


def marked(text: str) -> str | None:
    """Returns what stands after the last `####` that a number follows; None if there is none."""
    answers = [match[1] for match in _MARKED.finditer(text) if _BEGINS_AS_NUMBER.match(unicode_as_ascii(match[1]))]
    return _MARKED_END.split(answers[-1] + " ", maxsplit=1)[0] if answers else None


def statement(text: str) -> str | None:
    """Returns the sentence after the last "the answer is"; None if there is none."""
    matches = list(_STATEMENT.finditer(text))
    if not matches:
        return None
    said = text[matches[-1].end() :].lstrip(" \t*_:\n")
    end = _SENTENCE_END.search(said)
    return said[: end.start()] if end else said


def _last_sentence(text: str, position: int) -> tuple[int, int]:
    """Returns where the sentence around a position starts and ends."""
    start = 0
    for end in _SENTENCE_END.finditer(text):
        if end.start() >= position:
            return start, end.start()
        start = end.end()
    return start, len(text)


def _is_unit_power(tokens: Sequence[str], index: int) -> bool:
    """Whether a token is the cm² of "5 cm^2", or its power alone."""
    before = [token for token in tokens[max(0, index - 2) : index] if _HAS_DIGIT.search(token)]
    return bool(before) and _UNIT_POWER.fullmatch(tokens[index].strip(".,;:!?)")) is not None


def _start_of_number(tokens: Sequence[str], last: int) -> int:
    """Returns where what belongs to the number in `tokens[last]` starts: operands, signs, larger units."""
    first = last
    while first > 0:
        joined = 2 if tokens[first - 1].lower() == "and" and first > 1 else 1
        unit = tokens[first - joined].lower().strip(",")
        if _NUMBER_TOKEN.fullmatch(tokens[first - 1]) or tokens[first - 1].lower() in _JOINING_WORDS:
            first -= 1
        elif first > joined and unit in COMPOUND_UNITS and _HAS_DIGIT.search(tokens[first - joined - 1]):
            first -= joined + 1
        else:
            break
    return first


def last_number(text: str) -> str | None:
    """Returns the last number of a text with the signs, operands and words that belong to it; None without.

    What is returned holds all that could change the number, so that reading it as a whole decides: "72 or 73"
    and "100-28" come back entire.
    """
    lines = [line for line in unicode_as_ascii(text).splitlines() if _HAS_DIGIT.search(line)]
    text = re.sub(r"(?<![<>!:=])=(?!=)", " = ", plain(lines[-1])) if lines else ""
    digit = next((index for index in reversed(range(len(text))) if text[index] in "0123456789"), None)
    if digit is None:
        return None
    start, end = _last_sentence(text, digit)
    tokens = text[start:end].split(" ")
    last = next(
        index
        for index in reversed(range(len(tokens)))
        if _HAS_DIGIT.search(tokens[index]) and not _is_unit_power(tokens, index)
    )
    first = _start_of_number(tokens, last)
    # "and 72" joins nothing.
    while first < last and tokens[first].lower() in _JOINING_WORDS:
        first += 1
    if _ONE_OF_SEVERAL.search(" ".join(tokens[:first])):
        return text[start:end]
    said = " ".join(tokens[first : last + 1]).lstrip("([\"'")
    if "(" not in said:
        said = re.sub(r"[)\]\"'*_]+[.,;:?]?\Z", "", said)
    return " ".join([said, *tokens[last + 1 :]])


Kind = Literal["box", "statement", "text"]


@dataclass(frozen=True)
class Found:
    """The answer of a text, as it is written there."""

    text: str
    kind: Kind
    others: str = ""
    """The contents of all boxes, where there are several."""
    is_prose: bool = False
    """Whether no formula stands there: the m of `5 m` is then no variable."""


def _from_prose(clause: str, *, whole_text: bool) -> str:
    """Returns the answer within a clause: itself if it is a number or a letter, else its last formula or number."""
    if read_number(clause) is not None or (not whole_text and letter(clause) is not None):
        return clause
    formulas = list(_FORMULA.finditer(clause))
    if formulas and not (whole_text and _HAS_DIGIT.search(plain(clause[formulas[-1].end() :]))):
        parts = [formulas[-1]]
        for formula in reversed(formulas[:-1]):
            if not _BETWEEN_FORMULAS.fullmatch(clause, formula.end(), parts[0].start()):
                break
            parts.insert(0, formula)
        contents = [next(group for group in part.groups() if group is not None) for part in parts]
        if len(contents) == 1 and not contents[0].strip().endswith((".", ",")):
            _, end = _last_sentence(clause, parts[0].end())
            tail = plain(clause[parts[0].end() : end]).lstrip("*_")
            meant = factor_of(tail and " " + tail, after_currency=False, letters_are_units=False)
            # "$5$ rolls" is 5, "$5$ million" is not.
            return contents[0] if meant and meant.factor == 1 else f"{contents[0]} {tail}"
        return ", ".join(contents)
    if not whole_text:
        explained = _CLAUSE_END.search(clause)
        if explained and _HAS_DIGIT.search(clause[: explained.start()]):
            clause = clause[: explained.start()]
        # "5 feet 3 inches", "72 or 73": what begins as a number is one as a whole, or none.
        if _BEGINS_AS_NUMBER.match(unicode_as_ascii(clause)):
            return clause
    if whole_text or re.search(r"[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+", "", plain(clause))):
        return last_number(clause) or clause
    return clause


def find_answer(text: str) -> Found:
    r"""Returns the answer that a text, without its thoughts, gives.

    It is what stands in the last box (`\boxed`, `\fbox`; boxes side by side are one list); without a box, the
    number after the last `####`, or what follows the last "answer is" or "Answer:"; without that, the whole
    text if it is one number, else its last formula or number. An unfinished box is an empty answer.
    """
    if has_box(text):
        last, every = boxed(text)
        return Found(last, "box", "" if every == last else every)
    text = text[-_LONGEST_END:]
    said = marked(text) or statement(text)
    if said is not None:
        return Found(_from_prose(said, whole_text=False), "statement", is_prose=_FORMULA.search(said) is None)
    return Found(_from_prose(text, whole_text=True), "text", is_prose=_FORMULA.search(text) is None)


def last_line(text: str) -> str:
    """Returns the last line that is not empty, without what surrounds it."""
    lines = [line for line in text.splitlines() if line.strip()]
    return unwrapped(lines[-1]) if lines else ""
