"""Templates of prompts: Python format strings over the columns of a row, filled with text and whole numbers."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from numbers import Integral
from typing import Any

LONGEST = 100_000
"""Characters that one field may be padded to, or be given digits: more is no prompt."""

_FORMATTER = string.Formatter()


def template_columns(template: str) -> list[str]:
    """The columns that a template reads.

    Raises:
        ValueError: it is no format string over named columns, or pads beyond all measure.
    """
    try:
        parts = list(_FORMATTER.parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error} (write a brace itself as {{{{ or }}}})") from error
    columns = []
    for _, field, spec, _ in parts:
        if field is None:
            continue
        column = re.split(r"[.\[]", field, maxsplit=1)[0]
        if column == "" or column.isdigit():
            raise ValueError(f"template {template!r}: name a column in each pair of braces, as in {{question}}")
        if "{" in (spec or ""):
            raise ValueError(f"template {template!r}: write the width in {{{field}:{spec}}} as a number")
        if any(int(number) > LONGEST for number in re.findall(r"\d+", spec or "")):
            raise ValueError(
                f"template {template!r}: {{{field}:{spec}}} pads beyond {LONGEST} characters; take a smaller width"
            )
        columns.append(column)
    if not columns:
        raise ValueError(f"template {template!r} uses no column of the row; write one as {{question}}")
    return columns


def fill_template(template: str, columns: Mapping[str, Any]) -> str:
    """The text of a template.

    A field is text or a whole number. Others would stand there as Python writes them (`b'Hi'`, `5.0`, `['a']`), and
    are taken where the template says so: with a conversion (`{score!s}`) or a format (`{score:.1f}`).

    Raises:
        ValueError: a value is something else, or cannot be had or written as the template says.
    """
    texts = []
    for literal, field, spec, conversion in _FORMATTER.parse(template):
        texts.append(literal)
        if field is None:
            continue
        try:
            value, _ = _FORMATTER.get_field(field, (), columns)
            plain = isinstance(value, str | Integral) and not isinstance(value, bool)
            if not plain and not spec and not conversion:
                raise ValueError(
                    f"{value!r:.80} is a {type(value).__name__}, and would stand in the prompt as Python writes it; "
                    f"make it text, or write {{{field}!s}} to have it so"
                )
            texts.append(_FORMATTER.format_field(_FORMATTER.convert_field(value, conversion), spec or ""))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{{{field}}} of template {template!r}: {error}") from error
    return "".join(texts)
