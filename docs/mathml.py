"""Equations as MathML, which browsers set by themselves: the site needs no script and no font from elsewhere."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from equations import latex_block
from latex2mathml.converter import convert

SECTION = re.compile(r"^[A-Z]\w+:(?: |$)", re.MULTILINE)
SIGN = re.compile(r"(<mrow>|<mo[^>]*>&#x000(?:28|5B|2C|3D);</mo>(?:<mspace[^>]*/>)*)<mo>(&#x02212;)")
"""A sign that is no difference: at the beginning, behind "(", "[", "," or "="."""
INDENTED = re.compile(r"^ {4}.*(?:\n+ {4}.*)*\n?", re.MULTILINE)


def equation(source: str, *_: Any, **__: Any) -> str:
    """LaTeX as MathML; a fence of pymdownx.superfences."""
    return f'<div class="equation">{SIGN.sub(_as_sign, convert(source, display="block"))}</div>'


def _as_sign(found: re.Match[str]) -> str:
    return f'{found[1]}<mo form="prefix">{found[2]}'


class Equations(griffe.Extension):
    """What a docstring indents before its sections is an equation, unless it is Python."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = with_equations(obj.docstring.value)


def with_equations(docstring: str) -> str:
    """A docstring whose equations are blocks of LaTeX; what `equations.py` does not understand stays code."""
    found = SECTION.search(docstring)
    end = found.start() if found else len(docstring)
    return INDENTED.sub(_block, docstring[:end]) + docstring[end:]


def _block(found: re.Match[str]) -> str:
    try:
        return f"```math\n{latex_block(textwrap.dedent(found[0]))}\n```\n"
    except ValueError:
        return found[0]
