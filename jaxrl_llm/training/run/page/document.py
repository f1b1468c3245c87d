"""The page itself: template, style, script and data in one file."""

from __future__ import annotations

import importlib.resources
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxrl_llm.training.run.page as page_room

PAGE_FILE = "report.html"
"""In a run's folder."""

_SCRIPTS = ("dom.js", "chart.js", "curves.js", "samples.js", "tallies.js", "settings.js", "page.js")


def write_page(path: str | os.PathLike[str], runs: Sequence[dict[str, Any]]) -> None:
    """Writes the page of a run, or of several beside each other; the file appears whole.

    Args:
        path: of the page.
        runs: what `Digest.data` gives of each.

    Raises:
        OSError: it cannot be written; names the file.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.tmp")
    try:
        unfinished.write_text(page(runs), encoding="utf-8")
        os.replace(unfinished, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The text of the page."""
    data = {"written": time.strftime("%Y-%m-%d %H:%M:%S"), "runs": list(runs)}
    # Text of models can hold anything: "<" would end the script, and halves of characters are no text.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "{{title}}": _escaped(" · ".join(run["name"] for run in runs)),
        "{{style}}": _template("page.css"),
        "{{script}}": "\n".join(map(_template, _SCRIPTS)),
        "{{data}}": text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
    }
    document = _template("page.html")
    for place, part in parts.items():  # data last, since nothing in it is a place
        document = document.replace(place, part)
    return document


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _template(name: str) -> str:
    return (importlib.resources.files(page_room) / "template" / name).read_text(encoding="utf-8")
