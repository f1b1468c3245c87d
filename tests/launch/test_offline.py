from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jaxrl_llm import cli
from jaxrl_llm.algorithms.supervised import SupervisedObjective
from jaxrl_llm.config import ModelSource, OfflineDataConfig, OfflineExperiment, flatten
from jaxrl_llm.data.demonstrations import DemonstrationFormat
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained
from jaxrl_llm.training.offline import OfflineEvaluationConfig, OfflineTrainingConfig
from jaxrl_llm.training.run.metrics import read_metrics


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def config(checkpoint: Path) -> OfflineExperiment:
    rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(12)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    form = DemonstrationFormat(PromptFormat(prompt_column="question", conversational=True), "answer")
    return OfflineExperiment(
        name="test",
        model=ModelSource(path=str(checkpoint), remat="none"),
        data=OfflineDataConfig(
            train="rows.jsonl", eval="rows.jsonl", max_prompt_length=48, max_completion_length=8, format=form
        ),
        training=OfflineTrainingConfig(steps=2, rows_per_step=8, checkpoint_every=0),
        evaluation=OfflineEvaluationConfig(every=2),
    )


def test_flags_change_what_they_name(config: OfflineExperiment) -> None:
    args = "--objective.kind=dft --data.format.train-on=assistant_only --data.format.prompt.system=s --mesh.fsdp=-1"
    args += " --training.rows-per-step=4 --update.reference=ahead --evaluation.best-mode=max --optimizer.b1=0.5"
    parsed = cli.parse_offline(config, args.split())
    assert parsed.objective == SupervisedObjective(kind="dft")
    form = parsed.data.format
    assert isinstance(form, DemonstrationFormat)
    assert (form.train_on, form.prompt.system, form.completion_column) == ("assistant_only", "s", "answer")
    assert (parsed.training.rows_per_step, parsed.update.reference, parsed.mesh.fsdp) == (4, "ahead", -1)
    assert cli.parse_offline(config, []) == config


def test_an_unknown_flag_ends_at_once(config: OfflineExperiment, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run_offline(config, ["--objective.knd=dft"])
    assert ended.value.code == 2
    assert "there is no setting --objective.knd; did you mean --objective.kind?" in capsys.readouterr().err


def test_a_run_leaves_a_model_that_can_be_loaded(config: OfflineExperiment, capsys: pytest.CaptureFixture[str]) -> None:
    prepared: list[Any] = []
    result = cli.run_offline(
        config, ["--run-dir=mine"], prepare=lambda policy: prepared.append(policy) or policy, next_steps=("rest",)
    )
    assert result.step == 2 and len(prepared) == 1
    assert [line["step"] for line in read_metrics("mine/metrics.jsonl")] == [0, 1, 2, 2]
    assert json.loads(Path("mine/config.json").read_text()) == flatten(dataclasses.replace(config, run_dir="mine"))
    from_pretrained("mine/model")
    assert Path("mine/curves.png").exists()
    out = capsys.readouterr().out
    assert "12 rows to train on, 12 rows held out. A step: 8 rows of 1 completion(s), on 8 device(s)" in out
    assert "eval/loss" in out and "mine/curves.png" in out and out.endswith("Next:\n  rest\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.path=None"], "no model given: pass --model.path="),
        (["--data.train=None"], "no rows given: pass --data.train="),
        (["--data.train=gone.jsonl"], "gone.jsonl"),
        (["--data.eval=None"], "evaluation.every=2 needs held-out rows: pass --data.eval="),
        (["--evaluation.every=0"], "data.eval=rows.jsonl would never be used, since evaluation.every=0"),
        (["--data.format.completion-column=answr"], "training rows: row 0: no column 'answr'; did you mean 'answer'"),
        (["--data.max-prompt-length=4"], "training rows: row 0: the prompt has"),
        (["--training.rows-per-step=4"], "4 prompts × 1 samples"),
        (["--model.dtype=float32", "--resume"], "--resume needs --run-dir"),
        (["--model.dtype=float32", "--run-dir=gs://bucket/run"], "is no folder: mount the bucket"),
        (["--grace-period=-1"], "--grace-period=-1.0 must be seconds, or 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(
    config: OfflineExperiment, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run_offline(config, flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_what_a_resumed_run_must_share(config: OfflineExperiment) -> None:
    def names(**changes: Any) -> set[str]:
        before, after = config.settings(), dataclasses.replace(config, **changes).settings()
        return {name for name in before | after if before.get(name) != after.get(name)}

    assert names(objective=SupervisedObjective(kind="dft")) == {"objective.kind"}
    assert names(seed=3, run_dir="x", name="y", evaluation=OfflineEvaluationConfig()) == {"seed"}
    assert names(training=dataclasses.replace(config.training, steps=9, checkpoint_every=3)) == set()
    assert names(training=dataclasses.replace(config.training, rows_per_step=4)) == {"training.rows_per_step"}


@pytest.mark.parametrize("name", ["max_prompt_length", "max_completion_length"])
def test_lengths_beyond_the_model(config: OfflineExperiment, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run_offline(config, [f"--data.{name.replace('_', '-')}=513"])
    assert ended.value.code == 2
    assert f"error: data.{name}=513 is more than the model's 512 positions; lower it" in capsys.readouterr().err
