r"""One spelling for what LaTeX and Unicode write in many: signs, spaces, fractions, powers, repeating decimals."""

from __future__ import annotations

import re
import unicodedata

_SPACES = "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t\r\f\v"
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-")
    | dict.fromkeys(_SPACES, " ")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")
    | dict.fromkeys("×✕·⋅∙∗", "*")
    | {"\u2215": "/", "\u2044": "/", "…": "...", "⋯": "...", "’": "'", "º": "°", "％": "%"}
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT_RUN = re.compile(r"[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_VULGAR = re.compile(r"[¼-¾⅐-⅞]")

_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt|up)?|underline|bm|boldsymbol|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname\*?)\s*\{([^{}]*)\}"
)
# A letter after a number is a unit where it stands upright, a variable where it does not.
_UPRIGHT_UNITS = {
    "m": "metres", "g": "grams", "s": "seconds", "h": "hours", "l": "litres", "L": "litres", "N": "newtons",
    "J": "joules", "W": "watts", "V": "volts", "A": "amperes", "K": "kelvins", "C": "celsius", "F": "fahrenheit",
}  # fmt: skip
# A tie between two things is a space; "~5" is about 5.
_SPACING = re.compile(r"\\(?:[,;: ]|(?:quad|qquad|thinspace|enspace)(?![A-Za-z])|hspace\{[^{}]*\})|(?<=\S)~(?=\S)")
_NOTHING = re.compile(
    r"\\(?:!|(?:left|right|displaystyle|textstyle|[bB]ig[lr]?|limits)(?![A-Za-z])|(?:text)?color\{[A-Za-z]*\})|\\\\\Z"
)
_COMMANDS = {
    r"\times": "*", r"\cdot": "*", r"\ast": "*", r"\ldots": "...", r"\dots": "...", r"\cdots": "...",
    r"\degree": "°", r"\textdegree": "°", r"\euro": "€", r"\texteuro": "€", r"\pounds": "£", r"\textsterling": "£",
    r"\textdollar": "$", r"\dollar": "$", r"\yen": "¥", r"\textyen": "¥", r"\percent": "%",
}  # fmt: skip
_COMMAND = re.compile("(?:" + "|".join(re.escape(command) for command in _COMMANDS) + r")(?![A-Za-z])")
_DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")
_DECIMAL = r"[0-9]+(?:\.[0-9]+)?"
_FRACTION = re.compile(
    rf"\\[dtc]?frac\s*(?:\{{\s*(?P<sign>-?)\s*(?P<a>{_DECIMAL})\s*\}}|(?P<b>[0-9]))"
    rf"\s*(?:\{{\s*(?P<c>{_DECIMAL})\s*\}}|(?P<d>[0-9]))"
)
_BAR = re.compile(r"\\(?:overline|bar|dot)\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_DOTS = re.compile(r"\\dot\s*\{?([0-9])\}?([0-9]*)\\dot\s*\{?([0-9])\}?")
_COMBINING_BAR = re.compile("((?:[0-9][\u0304\u0305\u0307])+)")
# Emphasis, where it is no power of Python's.
_BOLD = re.compile(r"(?<![0-9])\*\*|\*\*(?![0-9])|__")
_HALF = re.compile(r" and (?:(?:a|one) )?(half|quarter|third)\b", re.IGNORECASE)
_PARTS = {"half": "1/2", "quarter": "1/4", "third": "1/3"}


def _text(match: re.Match[str]) -> str:
    content = match[1]
    before = match.string[: match.start()].rstrip(" {}~").rstrip("\\,;: ")
    if content.strip() in _UPRIGHT_UNITS and before[-1:].isdigit():
        content = _UPRIGHT_UNITS[content.strip()]
    return f" {content} "


def _fraction(match: re.Match[str]) -> str:
    # Spaces: 2\frac12 is no 21/2, and \frac{1}{2}3 no 1/23.
    return f" {match['sign'] or ''}{match['a'] or match['b']}/{match['c'] or match['d']} "


def unicode_as_ascii(text: str) -> str:
    """Returns minus signs, spaces, superscripts, vulgar fractions and barred digits in their ASCII spelling."""
    if text.isascii():
        return text
    text = _COMBINING_BAR.sub(lambda match: f"({re.sub('[^0-9]', '', match[1])})", text)
    text = _SUPERSCRIPT_RUN.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _VULGAR.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0])} ", text)
    return text.translate(_CHARACTERS)


def plain(text: str) -> str:
    r"""Returns the text with the LaTeX of numbers and words written plainly.

    `\$5\,000\text{ per day}` becomes `$5 000 per day`, `2\frac12` becomes `2 1/2`, `0.\overline{3}` becomes
    `0.(3)`; what it does not know stays as it is.
    """
    text = _BOLD.sub(" ", unicode_as_ascii(text))
    if "\\" in text or "{" in text or "~" in text:
        text = _DOTS.sub(lambda match: f"({match[1]}{match[2]}{match[3]})", text)
        text = _BAR.sub(lambda match: f"({match[1] or match[2]})", text)
        text = text.replace("{,}", ",").replace(r"\$", "$").replace(r"\%", "%")
        text = _FRACTION.sub(_fraction, _TEXT.sub(_text, _NOTHING.sub("", _DEGREE.sub("°", text))))
        text = _SPACING.sub(" ", _COMMAND.sub(lambda match: _COMMANDS[match[0]], text))
    return _HALF.sub(lambda match: " " + _PARTS[match[1].lower()], " ".join(text.split()))


_PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("*", "*"), ("__", "__"),
          ("`", "`"), ("_", "_"), ('"', '"'))  # fmt: skip


def _is_closed(text: str) -> bool:
    """Whether the bracket that opens the text closes at its end, and not before."""
    opening, closing = text[0], {"(": ")", "{": "}", "[": "]"}[text[0]]
    depth = 0
    for index, character in enumerate(text):
        depth += (character == opening) - (character == closing)
        if depth == 0:
            return index == len(text) - 1
    return False


def unwrapped(text: str) -> str:
    """Returns the text without what only surrounds it: delimiters, emphasis, brackets, a last full stop."""
    # A few layers: nobody nests more, and each costs a pass over the text.
    for _ in range(8):
        before = text
        text = text.strip()
        if not text.endswith("..."):
            text = text.rstrip(".,;:?")
        for opening, closing in _PAIRS:
            inner = text[len(opening) : -len(closing)]
            if (
                text.startswith(opening)
                and text.endswith(closing)
                and inner
                and opening not in inner.replace(r"\$", "")
            ):
                text = inner
        # Not (1, 2): brackets around several things mean something.
        if text[:1] in ("(", "{", "[") and len(text) > 2 and "," not in text and _is_closed(text):
            text = text[1:-1]
        if text == before:
            break
    return text
