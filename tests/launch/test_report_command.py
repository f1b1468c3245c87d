"""`jaxrl-llm report`: the page of a run, of several, and of folders that are none; defaults of settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxrl_llm.algorithms.policy_gradient.presets import gspo
from jaxrl_llm.config import DistillationExperiment, Experiment, OfflineExperiment, StarExperiment, flatten
from jaxrl_llm.launch.defaults import default_settings
from jaxrl_llm.launch.report_command import run_report
from jaxrl_llm.launch.stages import DPO
from jaxrl_llm.training.run.metrics import MetricsWriter


def begin_run(folder: Path) -> Path:
    with MetricsWriter(folder, tensorboard=False) as writer:
        writer.write(1, {"loss": 0.5})
    return folder


def test_pages_of_one_run_and_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [str(begin_run(tmp_path / name)) for name in ("a", "b")]
    assert run_report(runs[:1]) == tmp_path / "a" / "report.html"
    assert run_report(runs) == Path("comparison.html")
    assert run_report([*runs, "--output=both.html"]).read_text().count('"folder":') == 2
    assert capsys.readouterr().out.splitlines()[1] == "comparison.html shows 2 runs: open it in a browser"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "no run given: jaxrl-llm report RUN [RUN …]"),
        (["none"], "none is no run: it does not exist; give the folder that a run left"),
        (["empty"], "empty is no run: it has no metrics.jsonl; give the folder"),
        (["runs"], "runs is no run, but holds 1: jaxrl-llm report runs/a"),
        (["runs/a", "--output=empty"], "output=empty is a folder: give a file, as --output=empty/report.html"),
        (["runs/a", "--outptu=x"], "there is no setting --outptu; did you mean --output"),
    ],
)
def test_what_is_no_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    begin_run(tmp_path / "runs" / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        run_report(line)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("kind", [Experiment, OfflineExperiment, StarExperiment, DistillationExperiment])
def test_what_nobody_has_set_is_its_default(kind: type) -> None:
    settings = flatten(kind(name="x", seed=3))
    defaults = default_settings(settings)
    assert {name for name in settings if settings[name] != defaults.get(name, "none")} == {"name", "seed"}


def test_settings_of_another_part_have_its_defaults() -> None:
    other = dataclasses.replace(Experiment(name="x"), algorithm=gspo())
    for config, part in ((other, "algorithm.surrogate."), (DPO, "objective.")):
        settings = flatten(config)
        defaults = default_settings(settings)
        assert defaults[f"{part}part"] != settings[f"{part}part"]
        assert all(name in defaults for name in settings if name.startswith(part))
