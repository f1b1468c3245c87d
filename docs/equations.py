r"""Equations as docstrings write them, in plain unicode, translated to LaTeX.

    >>> print(latex("Σₜ log ρₜ / n  if A > 0"))
    \frac{\sum_{t} \log \rho_{t}}{n}\ \text{if}\ A > 0

What is understood: subscripts (xₜ, x_w, Σ_{t ≤ n}), superscripts (x², e⁻ᵈ, x^(1/n)), functions, brackets, argument
names, words among the formulas, several formulas in a line (four spaces apart) and several lines. In `a b / (c d)` a
fraction has products above and below, in `a (b) / (c)` the two groups, in `a/b` the two neighbours. A sign with no
space behind it belongs to what follows. Only plain commands come out, which MathJax, KaTeX and matplotlib read.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

COLUMNS = re.compile(r" {4,}")
"""What separates the formulas of one line."""

_GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "η": "eta", "θ": "theta"}
_GREEK |= {"κ": "kappa", "λ": "lambda", "μ": "mu", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi"}
_GREEK |= {
    "ω": "omega",
    "Δ": "Delta",
    "∇": "nabla",
    "∞": "infty",
    "…": "ldots",
    "∂": "partial",
    "Σ": "sum",
    "Π": "prod",
}
_ARGUMENTS = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "eps": "ε", "eta": "η", "lam": "λ"}
_ARGUMENTS |= {"lambda": "λ", "tau": "τ"}
"""Arguments that are Greek letters."""
_LARGE, _PREFIXES = {"Σ", "Π"}, {"∂", "∇", "Δ"}

_RELATIONS = {"=": "=", "≤": "\\leq", "≥": "\\geq", "<": "<", ">": ">", "≠": "\\neq", "≈": "\\approx", "∈": "\\in"}
_RELATIONS |= {"←": "\\leftarrow", "→": "\\rightarrow", "↦": "\\mapsto", "~": "\\sim", "≻": "\\succ"}
_SIGNS = {"+": "+", "-": "-", "−": "-", "±": "\\pm"}
_PRODUCTS = {"·": "\\cdot", "⊗": "\\otimes"}
_BARS = {"‖": "\\;\\Vert\\;", "|": "\\mid"}
_SEPARATORS = {",": ",", ";": ";", ":": "\\text{:}", ".": ".", "%": "\\%"}
_BRACKETS = {"(": ")", "[": "]", "{": "}", "|": "|", "⌊": "⌋", "⌈": "⌉", "⟨": "⟩"}
_DELIMITERS = {"{": "\\{", "}": "\\}", "⌊": "\\lfloor", "⌋": "\\rfloor", "⌈": "\\lceil", "⌉": "\\rceil"}
_DELIMITERS |= {"⟨": "\\langle", "⟩": "\\rangle"}

_COMMANDS = {"exp", "log", "max", "min"}
_FUNCTIONS = _COMMANDS | {"Agg", "KL", "argmax", "argmin", "clip", "mean", "quantile", "rank", "sech", "sg", "sign"}
_FUNCTIONS |= {"softmax", "softplus", "sort", "std", "tanh", "var", "whiten"}
_GLUE = {"and", "or", "if", "else", "of", "over", "in", "with", "without", "where", "for", "not", "is", "the", "to"}
_GLUE |= {"against", "at", "by", "elsewhere", "from", "otherwise", "under"}
"""Words that are never the name of anything."""

_HIGH = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ᵀᴳᴷ", "0123456789+-()TGK", strict=True))
_HIGH |= dict(zip("ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ", "abcdefghijklmnoprstuvwxyz", strict=True))
_LOW = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ", "0123456789+-=aehijklmnoprstuvx", strict=True))
_ACCENTS = {"\N{COMBINING MACRON}": "bar", "\N{COMBINING TILDE}": "tilde", "\N{COMBINING CIRCUMFLEX ACCENT}": "hat"}

_TOKEN = re.compile(
    rf"""(?P<space>\ +)
    | (?P<quote>"[^"]*"|`[^`]*`)
    | (?P<number>\d+(?:\.\d+)?)
    | (?P<word>[A-Za-z]\w*(?:-[A-Za-z]+)+ | [A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*(?:'(?:s\b|(?=\ )))?)
    | (?P<low>[{"".join(_LOW)}]+(?:[≤≥≠][{"".join(_LOW)}]+)?)
    | (?P<high>[{"".join(_HIGH)}]+(?:\ [{"".join(_HIGH)}]+)*)
    | (?P<accent>[{"".join(_ACCENTS)}])
    | (?P<other>.)""",
    re.VERBOSE,
)


class _Token(NamedTuple):
    kind: str
    text: str


_END = _Token("end", "")


class _Item(NamedTuple):
    """A translated piece."""

    latex: str
    kind: str = "atom"
    """atom, function, large, relation, sign, unary, product, tight or loose (division), separator, text or space."""
    inner: str | None = None
    """What is between the brackets of a group."""


def latex(equation: str, *, letters: str = "", arguments: Collection[str] = ()) -> str:
    """Translates one formula.

    Args:
        equation: on one line, without columns.
        letters: Greek letters of the formulas around it: an argument of the same name then stays a word.
        arguments: names of arguments, of which only those that begin with a letter have a subscript.

    Raises:
        ValueError: a character is not known, brackets do not match, or a division lacks a side.
    """
    found = [_Token(str(match.lastgroup), match.group()) for match in _TOKEN.finditer(equation.strip())]
    try:
        return _join(_fractions(_Reader(found, equation + letters, arguments).items(None)))
    except ValueError as error:
        raise ValueError(f"{error} in the equation {equation!r}; docs/equations.py says what is understood") from None


def latex_block(equation: str, *, arguments: Collection[str] = ()) -> str:
    """Translates lines and columns; several lines become an `aligned` environment."""
    rows = [
        [latex(cell, letters=equation, arguments=arguments) for cell in COLUMNS.split(line.strip())]
        for line in equation.splitlines()
        if line.strip()
    ]
    if len(rows) == 1:
        return " \\qquad ".join(rows[0])
    columns = len({len(row) for row in rows}) == 1  # else a short row's remark would stand far from it
    body = " \\\\\n".join("& " + (" && \\qquad " if columns else " \\qquad ").join(row) for row in rows)
    return f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"


# ---- Reading -------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, found: list[_Token], letters: str, arguments: Collection[str]):
        self._tokens, self._at = found, 0
        self._letters, self._arguments = letters, arguments

    def _token(self, ahead: int = 0) -> _Token:
        at = self._at + ahead
        return self._tokens[at] if 0 <= at < len(self._tokens) else _END

    def items(self, closing: str | None) -> list[_Item]:
        """Everything up to the closing bracket, which is read, or to the end."""
        found: list[_Item] = []
        while (token := self._token()) is not _END and not (token.text == closing and found):
            if token.kind == "space":
                found += [_Item("\\ ", "space")] * (len(token.text) > 1 and bool(found))
                self._at += 1
            else:
                found.append(self._prose() or self._operator(closing) or self._operand())
        if closing is not None and self._token() is _END:
            raise ValueError(f"no closing {closing}")
        self._at += 1
        return found

    def _operator(self, closing: str | None) -> _Item | None:
        text = self._token().text
        spaces = (self._token(-1).kind in ("space", "end"), self._token(1).kind == "space")
        found = None
        if text in _RELATIONS:
            found = _Item(_RELATIONS[text], "relation")
        elif text in _SIGNS:
            found = _Item(_SIGNS[text], "sign" if spaces[1] else "unary")
        elif text in _PRODUCTS:
            found = _Item(_PRODUCTS[text], "product")
        elif text == "/":
            found = _Item("/", "loose" if all(spaces) else "tight")
        elif text in _SEPARATORS:
            found = _Item(_SEPARATORS[text], "separator")
        elif text in _BARS and all(spaces) and closing != text:
            found = _Item(_BARS[text], "relation")
        self._at += found is not None
        return found

    def _prose(self) -> _Item | None:
        """A run of words, or one that joins formulas or labels them ("if", "soft:")."""
        words, ahead = [], 0
        while self._is_prose(ahead):
            words.append(self._token(ahead).text)
            ahead += 2 if self._token(ahead + 1).text == " " and self._is_prose(ahead + 2) else 1
        colon = self._token(ahead).text == ":"
        if not words or (len(words) == 1 and not colon and words[0] not in _GLUE):
            return None
        self._at += ahead + colon
        if colon and "_" in words[-1]:  # not every renderer knows an underscore within text
            return _Item(f"{_upright(words[-1])}\\text{{:}}", "text")
        return _Item(f"\\text{{{' '.join(words)}{':' * colon}}}", "text")

    def _is_prose(self, ahead: int) -> bool:
        """Whether a token is a word of a sentence, and not a name in a formula."""
        kind, word = self._token(ahead)
        after, later = self._token(ahead + 1), self._token(ahead + 2)
        if kind != "word":
            return False
        if word == "a":  # the article, and not "answers a of"
            return after.text == " " and len(later.text) > 1 and self._is_prose(ahead + 2) and later.text not in _GLUE
        if len(word) == 1 or (word in _ARGUMENTS and after.text != ":"):
            return False
        if after.text == ":":
            return True
        if word in _FUNCTIONS:  # "mean over pairs", "mean reward of the group"
            return after.text == " " and (
                later.text in _GLUE - {"if", "else", "is"}
                or (self._is_prose(ahead + 2) and self._token(ahead + 3).text == " " and self._is_prose(ahead + 4))
            )
        return "_" not in word and not re.search(r"\d", word) and after.text not in ("(", "[")

    def _operand(self) -> _Item:
        kind, text = self._token()
        self._at += 1
        if kind == "number":
            return self._scripts(_Item(text))
        if kind == "word":
            return self._scripts(_Item(self._name(text), "function" if text in _FUNCTIONS else "atom"))
        if kind == "quote":
            return _Item(f"\\mathtt{{{text[1:-1]}}}".replace("_", "\\_"), "text")
        if text in _PREFIXES and self._token().kind not in ("space", "end"):
            return _Item(f"\\{_GREEK[text]} {self._operand().latex}")
        if text in _GREEK:
            return self._scripts(_Item(f"\\{_GREEK[text]}", "large" if text in _LARGE else "atom"))
        if text == "½":
            return _Item("\\frac{1}{2}")
        if text == "√":
            under = self._operand()
            return _Item(f"\\sqrt{{{under.latex if under.inner is None else under.inner}}}")
        if text in _BRACKETS:
            return self._scripts(self._group(text))
        raise ValueError(f"unexpected {text!r}")

    def _group(self, opening: str) -> _Item:
        inner = _join(_fractions(self.items(_BRACKETS[opening])))
        left, right = (_DELIMITERS.get(bracket, bracket) for bracket in (opening, _BRACKETS[opening]))
        tall = any(command in inner for command in ("\\frac", "\\sum", "\\prod"))
        tall |= len(left) > 2  # a command, which must not run into what follows
        whole = f"\\left{left} {inner} \\right{right}" if tall else f"{left}{inner}{right}"
        return _Item(whole, "atom", inner if opening in "([" else None)

    def _scripts(self, base: _Item) -> _Item:
        """Adds the subscripts, superscripts, accents, primes and arguments that follow without a space."""
        core, scripts = base.latex, {"_": "", "^": ""}
        while True:
            kind, text = self._token()
            if kind == "low":
                scripts["_"] += "".join(_LOW.get(c, f"{_RELATIONS.get(c)} ") for c in text)
            elif kind == "high":
                high = "".join(_HIGH[c] for c in text if c != " ")
                high = high[1:-1] if high[0] == "(" and high[-1] == ")" else high
                scripts["^"] += re.sub(r"[a-z]{4,}", lambda word: _upright(word[0]), high)
            elif kind == "accent":
                core = f"\\{_ACCENTS[text]}{{{core}}}"
            elif text == "′":
                core, scripts["_"] = (core, scripts["_"] + "'") if scripts["_"] else (core + "'", "")
            elif text in scripts:
                self._at += 1
                scripts[text] += self._script()
                continue
            else:
                break
            self._at += 1
        scripted = core + "".join(f"{mark}{{{script}}}" for mark, script in scripts.items() if script)
        opening = self._token().text
        if opening in ("(", "[") and base.inner is None and base.kind in ("atom", "function") and not core.isdigit():
            self._at += 1
            return self._scripts(_Item(scripted + self._group(opening).latex, base.kind))._replace(kind="atom")
        return _Item(scripted, base.kind, base.inner if scripted == base.latex else None)

    def _script(self) -> str:
        """What follows ^ or _: a bracket's content, in one line, or one piece; `_<` is all that is before."""
        kind, text = self._token()
        self._at += 1
        if text in ("(", "{"):
            return _join(self.items(_BRACKETS[text]))
        if kind == "word":
            return self._name(text)
        if text in _GREEK:
            return f"\\{_GREEK[text]}"
        if kind == "number" or text == "<":
            return text
        raise ValueError(f"{text!r} cannot be a script")

    def _name(self, word: str) -> str:
        """Commands, Greek letters, letters with a subscript; all else upright."""
        if word in _COMMANDS:
            return f"\\{word}"
        if word in _ARGUMENTS and _ARGUMENTS[word] not in self._letters:
            return f"\\{_GREEK[_ARGUMENTS[word]]}"
        head, _, rest = word.partition("_")
        statistic = head in ("mean", "std") and word not in self._arguments
        if rest and "_" not in rest and (len(head) == 1 or head in _ARGUMENTS or statistic):
            letter = f"\\{_GREEK[_ARGUMENTS[head]]}" if head in _ARGUMENTS else self._name(head)
            return f"{letter}_{{{self._name(rest)}}}"
        if re.fullmatch(r"[A-Za-z]\d", word):
            return f"{word[0]}_{{{word[1]}}}"
        return word if len(word) == 1 else _upright(word)


def _upright(word: str) -> str:
    return f"\\mathrm{{{word}}}".replace("_", "\\_")


# ---- Writing -------------------------------------------------------------------------------------

_STOPS = ("relation", "sign", "separator", "text")
"""What neither a numerator nor a denominator reaches beyond."""


def _fractions(items: list[_Item]) -> list[_Item]:
    """Makes fractions of divisions, of those without spaces first."""
    for kind in ("tight", "loose"):
        while (at := next((i for i, item in enumerate(items) if item.kind == kind), None)) is not None:
            begin, end = (at - 1, at + 2) if kind == "tight" else _reach(items, at)
            over, under = items[max(begin, 0) : at], items[at + 1 : end]
            if not over or not under:
                raise ValueError("a division lacks a side")
            items = [*items[:begin], _Item(f"\\frac{{{_bare(over)}}}{{{_bare(under)}}}"), *items[end:]]
    return items


def _reach(items: list[_Item], at: int) -> tuple[int, int]:
    """Where the numerator of a division begins and its denominator ends."""
    groups = [0 <= i < len(items) and items[i].inner is not None for i in (at - 1, at + 1)]
    if all(groups):
        return at - 1, at + 2
    begin, end = at, at + 1
    while begin > 0 and items[begin - 1].kind not in _STOPS:
        begin -= 1
    while begin < at and items[begin].kind in ("space", "unary"):  # a sign before all stays before the fraction
        begin += 1
    if end < len(items) and items[end].kind == "text":
        return begin, end + 1
    while end < len(items) and items[end].kind not in (*_STOPS, "loose", "space"):
        end += 1
    return begin, end


def _bare(items: list[_Item]) -> str:
    """A numerator or denominator; one group without its brackets."""
    items = [item for item in items if item.kind != "space"]
    return _join(items) if len(items) != 1 or items[0].inner is None else items[0].inner


def _join(items: list[_Item]) -> str:
    pieces: list[str] = []
    last = ""  # kind of what is before, spaces apart
    for before, item in zip([None, *items], items, strict=False):
        bare = item.kind == "unary" and last == "text"  # which would be spaced as a difference
        pieces.append(_gap(before, item) + (f"{{{item.latex}}}" if bare else item.latex))
        last = last if item.kind == "space" else item.kind
    return "".join(pieces).strip()


def _gap(before: _Item | None, item: _Item) -> str:
    """What stands between two pieces."""
    kinds = {item.kind} if before is None else {before.kind, item.kind}
    if before is None or item.kind == "separator" or before.kind == "unary" or kinds & {"space", "tight"}:
        return ""
    if "text" in kinds:
        return "\\ "
    if before.kind == "separator":
        return "\\; "
    if kinds & {"relation", "sign", "product"} or before.kind == "large":
        return " "
    if before.kind == "function" and before.latex.startswith("\\") and not before.latex.startswith("\\mathrm"):
        return " "
    return "\\, "
