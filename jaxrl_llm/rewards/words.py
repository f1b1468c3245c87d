r"""Answers that are words or a letter: `no solution`, `\text{Yes}`, `(B)`; equal where the same is written."""

from __future__ import annotations

import re

from jaxrl_llm.rewards.notation import plain, unwrapped

# "B", "(B)", "option b)" as a whole; "(B) 12" or "B. Paris" with its text; "B because …".
_CHOOSING = (
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:i\s+(?:would\s+|will\s+)?(?:choose|pick|select)\s+)?"
    r"(?:(?:the\s+)?(?:option|choice|answer)\s+)?"
)
_LETTER = re.compile(rf"{_CHOOSING}\(?\s*(?P<letter>[A-Za-z])\s*\)?", re.IGNORECASE)
_BRACKETED = re.compile(rf"{_CHOOSING}\(\s*(?P<letter>[A-Za-z])\s*\)", re.IGNORECASE)
_BEGUN = re.compile(
    rf"(?i:{_CHOOSING})(?:\((?P<a>[A-Z])\)|(?P<b>[A-Z])"
    r"(?:[.):]|\s+(?:because|since|as|which|is\s+(?:correct|right))\b|,\s))\s*(?P<more>.*)"
)
_OTHER_LETTER = re.compile(r"\([A-Za-z]\)|(?<![A-Za-z])[B-HJ-Z](?![A-Za-z'])|\b(?:not|wrong|incorrect)\b")
# A word, or what is neither number nor formula but can be compared as it is written: 10:30, 3:4, 101_2.
_AS_WRITTEN = re.compile(r"\d+(?::\d+)+(?: ?[ap]\.?m)?|[0-9A-Fa-f]+_\{?\d+\}?")
_A_WORD = re.compile(r"[^\W\d_]{2,}")
#: Longer texts are solutions, not answers.
LONGEST_ANSWER = 200


def letter(text: str) -> str | None:
    r"""Returns the single letter that a text chooses, `(B)`, `\text{B}`, `B.` or `(B) 12`; None without.

    One in brackets keeps them: it is a choice, while a bare letter may be a variable (`same_letter`).
    """
    said = unwrapped(plain(text))
    bracketed = _BRACKETED.fullmatch(plain(text).rstrip("."))
    if bracketed:
        return f"({bracketed['letter']})"
    whole = _LETTER.fullmatch(said)
    if whole:
        return whole["letter"]
    begun = _BEGUN.fullmatch(said)
    if begun and not _OTHER_LETTER.search(begun["more"]):
        return f"({begun['a']})" if begun["a"] else begun["b"]
    return None


def same_letter(answer: str, gold: str) -> bool:
    """Whether two letters are the same; their case counts, unless one stands in brackets."""
    if "(" in answer or "(" in gold:
        return answer.strip("()").lower() == gold.strip("()").lower()
    return answer == gold


def words(text: str) -> str | None:
    """Returns a text of words in the form in which it is compared; None if there is no word, or no end of them."""
    said = unwrapped(plain(text)).strip("\"'“”‘`!").casefold()
    if _AS_WRITTEN.fullmatch(said):
        return re.sub(r"[{} .]", "", said)
    if len(said) > LONGEST_ANSWER or "\\" in said or "$" in said or not _A_WORD.search(said):
        return None
    return said


def squeezed(text: str) -> str:
    """Returns the text without delimiters and white space: equal ones are written alike."""
    return re.sub(r"\{([A-Za-z0-9])\}", r"\1", re.sub(r"(?<![0-9])\s|\s(?![0-9])", "", unwrapped(plain(text))))
