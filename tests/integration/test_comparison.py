"""The comparisons at debug size: runs, tables, figures, and going on after a stop."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest

from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.run.metrics import read_metrics

pytestmark = pytest.mark.whole_run

SMALL = ("--seeds=1", "--training.steps=2", "--evaluation.every=2", "--optimizer.warmup-steps=0", "--held-out=16")
ALGORITHMS = (
    *("--presets", "grpo", "brpo", "--evaluation.max-prompts=8", "--update.minibatches=1"),
    *("--training.prompts-per-step=8", "--training.samples-per-prompt=2"),
    *("--warm-start.steps=2", "--warm-start.demonstrations=16"),
)
PREFERENCES = (
    *("--presets", "dpo", "bco", "--training.rows-per-step=8"),
    *("--warm-up-steps=2", "--demonstrations=16"),
)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., Any]) -> Callable[[str], ModuleType]:
    """Imports a comparison, to be run with one small layer on one device: compiling is most of its time."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments")

    def small_model(tokenizer: Any) -> Transformer:
        return Transformer(tiny_config(vocab_size=len(tokenizer), num_layers=1))

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        for part in ("jaxrl_llm.launch.demo", "preference_arithmetic"):
            monkeypatch.setattr(f"{part}.character_model", small_model)
        monkeypatch.setattr(module, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        return module

    return load


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments")
    return importlib.import_module("comparison")


@pytest.mark.parametrize("name", ["compare_algorithms", "compare_preferences"])
def test_every_preset_is_in_one_family(name: str, load: Callable[[str], ModuleType]) -> None:
    module = load(name)
    assert sorted(member for family in module.FAMILIES.values() for member in family) == sorted(module.NAMES)


def test_algorithms(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    results = load("compare_algorithms").main([*SMALL, *ALGORITHMS, f"--run-dir={folder}"])
    assert [result["preset"] for result in results] == ["grpo", "brpo"]
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[0].startswith("| preset | accuracy |") and len(lines) == 4
    assert {line.split("`")[1] for line in lines[2:]} == {"grpo", "brpo"}
    assert (folder / "figure.png").stat().st_size > 10_000
    assert json.loads((folder / "grpo-0" / "result.json").read_text()) == results[0]


@pytest.mark.slow
def test_preferences_beside_a_run_that_was_cut_off(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, comparison = tmp_path / "comparison", load("compare_preferences")
    cut_off = folder / "bco-0" / "metrics.jsonl"
    cut_off.parent.mkdir(parents=True)
    cut_off.write_text('{"loss": 0.5, "step": 1, "step_time": 0.1}\n')
    flags = [*SMALL, *PREFERENCES, f"--run-dir={folder}"]
    results = comparison.main([*flags, "--resume"])
    assert [result["preset"] for result in results] == ["dpo", "bco"]
    assert results[0]["logps/right"] != results[0]["logps/right before"] == results[1]["logps/right before"]
    assert [line["step"] for line in read_metrics(cut_off)] == [0, 1, 2, 2]
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[0].startswith("| preset | accuracy | likelier |")
    assert {line.split("`")[1] for line in lines[2:]} == {"dpo", "bco", "warm_start"}
    assert (folder / "figure.png").stat().st_size > 10_000
    for other in ([], ["--resume", "--training.steps=3"]):  # not over another comparison by mistake
        with pytest.raises(SystemExit):
            comparison.main([*flags, *other])
        assert "holds another comparison" in capsys.readouterr().err


def test_the_unpaired_see_the_same_pairs(load: Callable[[str], ModuleType]) -> None:
    comparison = load("compare_preferences")
    training, held_out = comparison.problems(comparison.CONFIG)
    form = comparison.UnpairedFormat(from_pairs=True)
    assert [sample[1:] for sample in form.samples(held_out[0])] == [
        (held_out[0]["chosen"], True),
        (held_out[0]["rejected"], False),
    ]
    kto = comparison.objective_of("kto")
    assert (kto.lambda_d, kto.lambda_u) == (1.0, 1.0)  # as many right ones as wrong ones
    assert len(training) + len(held_out) == 2500


def test_unknown_presets_are_told_at_once(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, first in (("compare_algorithms", "reinforce"), ("compare_preferences", "dpo")):
        with pytest.raises(SystemExit):
            load(name).main(["--presets", "grpo", "gropo"])
        said = " ".join(capsys.readouterr().err.split())
        assert "'gropo'" in said and f"must be some of {first}" in said


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("compare_algorithms", "--preset=grpo", "--preset=grpo: this has no presets"),
        ("compare_algorithms", "--algorithm.kl-coef=0.1", "algorithm.kl_coef=0.1 would have no effect: each preset"),
        ("compare_preferences", "--preset=dpo", "--preset=dpo: this has no presets"),
        ("compare_preferences", "--objective.nll-coef=1", "objective.nll_coef=1.0 would have no effect: each preset"),
    ],
)
def test_what_the_presets_decide_is_no_flag(
    name: str, flag: str, message: str, load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load(name).main([flag])
    assert message in capsys.readouterr().err


def test_results_are_ordered_by_the_first_column(shared: ModuleType) -> None:
    def result(name: str, accuracy: float, margin: float | None) -> dict[str, Any]:
        return {"preset": name, "accuracy": accuracy, "margin": margin, "seconds": 0.1}

    results = [result("a", 0.5, None), result("b", 0.8, None), result("a", 0.7, 2.0)]
    text = shared.results_table(results, ranged=("accuracy",), columns=("margin", "seconds"))
    assert text.splitlines() == [
        "| preset | accuracy | margin | seconds |",
        "|---|---|---|---|",
        "| `b` | 0.800 (0.800–0.800) | – | 0.1 |",
        "| `a` | 0.600 (0.500–0.700) | 2 | 0.1 |",
    ]


def test_a_comparison_that_goes_on_makes_what_is_missing(shared: ModuleType, tmp_path: Path) -> None:
    made: list[tuple[str, int]] = []

    class Runs:
        presets, seeds, run_dir = ("a", "b"), 2, str(tmp_path)

    def run_one(name: str, seed: int) -> dict[str, Any]:
        made.append((name, seed))
        shared.run_folder(Runs, name, seed).mkdir(exist_ok=True)
        stopped = "SIGTERM" if len(made) == 2 else None
        numbers = {"accuracy before": 0.0, "accuracy": 0.5, "seconds": 1.0}
        return {"preset": name, "seed": seed, "stopped": stopped, **numbers}

    def compare() -> list[dict[str, Any]]:
        return shared.compare(Runs, run_one, table=lambda results: f"{len(results)}", draw=lambda path: path.touch())

    assert compare()[-1]["stopped"] == "SIGTERM" and not (tmp_path / "table.md").exists()
    assert len(compare()) == 4
    assert made == [("a", 0), ("a", 1), ("a", 1), ("b", 0), ("b", 1)]
    assert (tmp_path / "table.md").read_text() == "4" and (tmp_path / "figure.png").exists()
