"""Runs the notebooks from top to bottom and writes them with their outputs.

    pip install -e '.[docs,train]' && python docs/run_notebooks.py           # all of them; or give their names

Outputs are kept, so that GitHub and the site show them; what differs from run to run and says nothing (execution
counts, times of cells, lines that others have replaced, standard error) is not, so that differences stay small.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def run(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of a kernel of this Python."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    kernel = {"kernel_name": "python3", "resources": {"metadata": {"path": str(path.parent)}}}
    NotebookClient(notebook, timeout=None, **kernel).execute()
    return tidy(json.loads(nbformat.writes(notebook)))


def tidy(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook without what says nothing."""
    cells = []
    for number, cell in enumerate(notebook["cells"]):
        cell = {"cell_type": cell["cell_type"], "id": f"cell-{number}", "metadata": {}, "source": cell["source"]} | (
            {"execution_count": None, "outputs": outputs(cell["outputs"])} if cell["cell_type"] == "code" else {}
        )
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def outputs(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outputs of a cell: what was printed as a terminal would show it at the end, and values and pictures."""
    found: list[dict[str, Any]] = []
    for output in given:
        if output["output_type"] == "stream":
            if output["name"] != "stdout":
                continue
            if not found or found[-1]["output_type"] != "stream":
                found.append({"name": "stdout", "output_type": "stream", "text": ""})
            found[-1]["text"] += "".join(output["text"])
        else:
            found.append({name: value for name, value in output.items() if name != "execution_count"})
            found[-1]["metadata"] = {}
            if output["output_type"] == "execute_result":
                found[-1]["execution_count"] = None
    for output in found:
        if output["output_type"] == "stream":
            lines = [line.rpartition("\r")[2].rstrip() for line in output["text"].rstrip("\n").split("\n")]
            output["text"] = [f"{line}\n" for line in lines]
    return found


def write(notebook: dict[str, Any]) -> str:
    """The text of its file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(names: list[str]) -> None:
    """Runs those of these names, or all."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not names or path.stem in names:
            print(path.name, flush=True)
            path.write_text(write(run(path)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
