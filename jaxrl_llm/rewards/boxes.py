r"""The boxes of a text: `\boxed{…}` and `\fbox{…}`, nested, side by side, unfinished."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BOX_PART = re.compile(
    r"\\(?:boxed|fbox|framebox)\s*(?P<brace>\{)|\\(?:boxed|fbox)\s*(?P<bare>[0-9A-Za-z.,/-]+)|\\.|[{}]", re.DOTALL
)
_BOX_COMMAND = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{)")
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;&]|\\[,;()\[\]\s]|\\quad|\b(?:and|or)\b|\\text\{\s*(?:and|or)\s*\})*")


@dataclass(frozen=True)
class _Box:
    start: int
    end: int
    content: str


def _boxes(text: str) -> list[_Box]:
    """Returns the outermost finished boxes in order; none if the last one is unfinished."""
    done: list[_Box] = []
    open_braces: list[tuple[int, int] | None] = []
    for part in _BOX_PART.finditer(text):
        if part["bare"]:
            done.append(_Box(part.start(), part.end(), part["bare"]))
        elif part["brace"]:
            open_braces.append((part.start(), part.end()))
        elif part[0] == "{":
            open_braces.append(None)
        elif part[0] == "}" and open_braces:
            box = open_braces.pop()
            if box is not None:
                while done and done[-1].start > box[0]:
                    done.pop()
                done.append(_Box(box[0], part.end(), _BOX_COMMAND.sub("", text[box[1] : part.start()])))
    unfinished = [box for box in open_braces if box is not None]
    if unfinished and (not done or "\n" not in text[unfinished[-1][0] : done[-1].start]):
        return []
    return done


def has_box(text: str) -> bool:
    r"""Whether there is a `\boxed`, finished or not."""
    return re.search(r"\\(?:boxed|fbox|framebox)\b", text) is not None


def boxed(text: str) -> tuple[str, str]:
    """Returns the content of the last box, and that of all boxes as a list; both empty if it is unfinished.

    Boxes with nothing but commas and `and` between them are one answer.
    """
    boxes = _boxes(text)
    if not boxes:
        return "", ""
    last = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if not _BETWEEN_BOXES.fullmatch(text, box.end, last[0].start):
            break
        last.insert(0, box)
    return ", ".join(dict.fromkeys(box.content.strip() for box in last)), ", ".join(
        dict.fromkeys(box.content.strip() for box in boxes)
    )
