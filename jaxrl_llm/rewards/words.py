r"""Answers that are words or a letter: `no solution`, `\text{Yes}`, `(B)`; equal where the same is written."""

from __future__ import annotations

import re

from jaxrl_llm.rewards.notation import plain, unwrapped

# "B", "(B)", "option b)" as a whole; "(B) 12" or "B. Paris" with its text; "B because …".
_LETTER = re.compile(r"(?:(?:option|choice|answer)\s+)?\(?\s*(?P<letter>[A-Za-z])\s*\)?", re.IGNORECASE)
_BRACKETED = re.compile(r"(?:(?:option|choice)\s+)?\(\s*(?P<letter>[A-Za-z])\s*\)", re.IGNORECASE)
_BEGUN = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice)\s+)?(?:\((?P<a>[A-Z])\)|(?P<b>[A-Z])(?:[.):]|\s+(?:because|since|as|which|is\s+(?:correct|right))\b|,\s))\s*(?P<more>.*)"
)
_OTHER_LETTER = re.compile(r"\([A-Za-z]\)|(?<![A-Za-z])[B-HJ-Z](?![A-Za-z'])|\b(?:not|wrong|incorrect)\b")
# A word, or what is neither number nor formula but can be compared as it is written: 10:30, 3:4, 101_2.
_AS_WRITTEN = re.compile(r"\d+(?::\d+)+(?: ?[ap]\.?m)?|[0-9A-Fa-f]+_\{?\d+\}?")
_A_WORD = re.compile(r"[^\W\d_]{2,}")
#: Longer texts are solutions, not answers.
LONGEST_ANSWER = 200


def letter(text: str) -> str | None:
    r"""Returns the single letter that a text chooses, `(B)`, `\text{B}`, `B.` or `(B) 12`; None without.

    A bare letter keeps its case, since `a` may be a variable where `A` is a choice; one in brackets is a choice.
    """
    said = unwrapped(plain(text))
    bracketed = _BRACKETED.fullmatch(plain(text).rstrip("."))
    if bracketed:
        return bracketed["letter"].upper()
    whole = _LETTER.fullmatch(said)
    if whole:
        return whole["letter"]
    begun = _BEGUN.fullmatch(said)
    if begun and not _OTHER_LETTER.search(begun["more"]):
        return begun["a"] or begun["b"]
    return None


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
    return re.sub(r"\{([A-Za-z0-9])\}", r"\1", re.sub(r"\s|\\[,;:! ]|~|\\left|\\right", "", unwrapped(text)))
