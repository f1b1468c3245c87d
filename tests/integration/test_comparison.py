"""The comparison of algorithms at debug size: runs, table, figure, and going on after a stop."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.whole_run

FLAGS = (
    *(
        "--presets",
        "grpo",
        "brpo",
        "--seeds=1",
        "--training.steps=2",
        "--evaluation.every=2",
        "--evaluation.max-prompts=8",
    ),
    *("--training.prompts-per-step=8", "--training.samples-per-prompt=2", "--optimizer.warmup-steps=0"),
    *("--warm-start.steps=2", "--warm-start.demonstrations=16", "--held-out=16", "--update.minibatches=1"),
)


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments")
    return importlib.import_module("compare_algorithms")


def test_every_preset_is_in_one_family(comparison: ModuleType) -> None:
    members = [name for family in comparison.FAMILIES.values() for name in family]
    assert sorted(members) == sorted(comparison.NAMES)


def test_runs_a_table_and_a_figure_and_goes_on(
    comparison: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "comparison"
    first = comparison.main([*FLAGS, f"--run-dir={folder}"])
    assert [result["preset"] for result in first] == ["grpo", "brpo"]
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[0].startswith("| preset | accuracy |") and len(lines) == 4
    assert {line.split("`")[1] for line in lines[2:]} == {"grpo", "brpo"}
    assert (folder / "figure.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):  # not over another comparison by mistake
        comparison.main([*FLAGS, f"--run-dir={folder}"])
    assert "holds another comparison" in capsys.readouterr().err
    kept = (folder / "grpo-0" / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "brpo-0")
    again = comparison.main([*FLAGS, f"--run-dir={folder}", "--resume"])
    assert (folder / "grpo-0" / "metrics.jsonl").read_bytes() == kept
    assert again[0] == first[0] and again[1]["accuracy"] == first[1]["accuracy"]


def test_unknown_presets_are_told_at_once(comparison: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        comparison.main(["--presets", "grpo", "gropo"])
    assert "presets=['gropo'] must be some of reinforce" in " ".join(capsys.readouterr().err.split())


def test_results_are_ordered_by_accuracy(comparison: ModuleType) -> None:
    def result(name: str, accuracy: float) -> dict[str, object]:
        rest = {"reward": 0.5, "entropy": 0.25, "length": 3.0, "seconds a step": 0.1}
        return json.loads(json.dumps({"preset": name, "accuracy": accuracy, **rest}))

    text = comparison.table([result("a", 0.5), result("b", 0.8), result("a", 0.7)])
    assert text.splitlines()[2:] == [
        "| `b` | 0.800 (0.800–0.800) | 0.5 | 0.25 | 3 | 0.1 |",
        "| `a` | 0.600 (0.500–0.700) | 0.5 | 0.25 | 3 | 0.1 |",
    ]
