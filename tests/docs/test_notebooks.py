"""The notebooks run from top to bottom: their code here with a few steps, as they are by a kernel of its own (slow)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["dpo_with_lora", "losses_in_your_code", "sums_by_grpo"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_its_outputs_and_its_code_runs(
    path: Path, notebooks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.stem == "losses_in_your_code":
        pytest.importorskip("equinox")
    notebook = json.loads(path.read_text())
    assert notebooks.write(notebooks.tidy(notebook)) == path.read_text(), "run python docs/run_notebooks.py"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any("image/png" in output.get("data", ()) for cell in cells for output in cell["outputs"])

    monkeypatch.chdir(path.parent)
    monkeypatch.syspath_prepend(str(path.parent))  # which a notebook may add to
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        code = re.sub(r"^steps = \d+$", "steps = 2", "".join(cell["source"]), flags=re.MULTILINE)
        exec(compile(code, path.name, "exec"), names)
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_kernel_runs_it(path: Path, notebooks: ModuleType) -> None:
    pytest.importorskip("nbclient")
    ran, kept = notebooks.run(path), json.loads(path.read_text())
    for now, before in zip(ran["cells"], kept["cells"], strict=True):
        kinds = [[output["output_type"] for output in cell.get("outputs", [])] for cell in (now, before)]
        assert kinds[0] == kinds[1]


def test_outputs_are_what_a_terminal_shows_at_the_end(notebooks: ModuleType) -> None:
    def stream(text: str, name: str = "stdout") -> dict[str, Any]:
        return {"output_type": "stream", "name": name, "text": text}

    picture = {"output_type": "display_data", "data": {"image/png": "x"}, "metadata": {"a": 1}}
    given = [stream("\rstep 1"), stream("a warning", "stderr"), stream("\rstep 2  \nend\n"), picture]
    found = notebooks.outputs(given)
    assert [output.get("text") for output in found] == [["step 2\n", "end\n"], None] and found[1]["metadata"] == {}
    assert notebooks.outputs(found) == found
