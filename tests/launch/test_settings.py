from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxrl_llm import cli
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.surrogates import Clipped
from jaxrl_llm.config import DataConfig, Experiment, ModelSource, OfflineExperiment, RunConfig, StarExperiment
from jaxrl_llm.launch.settings import check_effects
from jaxrl_llm.launch.words import take_flag
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.training.on_policy import TrainingConfig


def right(completions: list[str], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


CONFIG = Experiment(name="test", rewards=(right,), training=TrainingConfig(steps=4))
OFFLINE = OfflineExperiment(name="test")
STAR = StarExperiment(name="test", rewards=(right,))
ADAPTERS = dataclasses.replace(CONFIG, model=ModelSource(lora=LoraConfig(rank=4, alpha=32.0)))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line in which a call ends the program."""

    def refused(call: Callable[..., Any], *args: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            call(*args)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error.removeprefix("error: ").rstrip()

    return refused


def parsed(config: RunConfig, *flags: str) -> RunConfig:
    if isinstance(config, Experiment):
        return cli.parse(config, list(flags))
    assert isinstance(config, OfflineExperiment)
    return cli.parse_offline(config, list(flags))


# ---- Flags in vain ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (CONFIG, ["--model.lora.alpha=32"], "model.lora.alpha=32.0 would have no effect: give --model.lora.rank"),
        (OFFLINE, ["--model.lora.use-rslora"], "model.lora.use_rslora=True would have no effect: give --model.lora"),
        (CONFIG, ["--model.lora.targets", "query"], "model.lora.targets=['query'] would have no effect"),
        (CONFIG, ["--model.lora.alpha=8", "--model.adapters=a"], "those of model.adapters have their own"),
        (CONFIG, ["--evaluation.samples=4"], "evaluation.samples=4 would have no effect: give --evaluation.every"),
        (OFFLINE, ["--evaluation.max-rows=4"], "evaluation.max_rows=4 would have no effect"),
        (CONFIG, ["--wandb.entity=me"], "wandb.entity='me' would have no effect: give --wandb.project"),
        (CONFIG, ["--sampling.temperature=0", "--sampling.top-p=0.9"], "sampling.top_p=0.9 would have no effect"),
        (
            OFFLINE,
            ["--training.checkpoint-every=0", "--training.keep-checkpoints=9"],
            "training.keep_checkpoints=9 would have no effect: give --training.checkpoint-every",
        ),
        (STAR, ["--training.steps=3"], "training.steps=3 would have no effect: what an iteration of STaR does"),
        (STAR, ["--update.epochs=3"], "update.epochs=3 would have no effect"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_without_effect_is_refused(config, flags, message, refused) -> None:
    error = refused(parsed, config, *flags)
    assert message in error and error.endswith("or leave it out")


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (CONFIG, ["--model.lora.rank=4", "--model.lora.alpha=32"]),
        (ADAPTERS, ["--model.lora.rank=0"]),  # what the experiment itself says of them is no flag
        (CONFIG, ["--evaluation.every=2", "--evaluation.samples=4"]),
        (CONFIG, ["--wandb.project=p", "--wandb.entity=me"]),
        (STAR, ["--star.iterations=3", "--update.micro-batches=2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_with_effect_is_not(config, flags) -> None:
    assert parsed(config, *flags) != config


def test_an_algorithm_of_star_is_refused_in_a_record_too() -> None:
    other = dataclasses.replace(STAR, algorithm=PolicyGradient(surrogate=Clipped(clip_high=0.3)))
    with pytest.raises(ValueError, match=r"algorithm\.surrogate\.clip_high=0\.3 would have no effect"):
        check_effects(STAR, other)


@pytest.mark.parametrize("flags", [("--preset=gspo", "--preset=dapo"), ("--preset", "gspo", "--preset", "gspo")])
def test_two_presets_are_refused(flags) -> None:
    with pytest.raises(ValueError, match=r"--preset is given 2 times \(gspo, (dapo|gspo)\)"):
        take_flag(flags, "--preset")


# ---- The run and its folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../escape", "a/b", "/tmp/x", "..", ".", "", "a\\b"])
def test_a_name_that_leaves_the_folder_of_runs_is_refused(name, refused) -> None:
    error = refused(cli.start, dataclasses.replace(CONFIG, name=name))
    assert error.startswith(f"name={name!r} must be the name of a folder in runs/") and not list(Path().iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_dir": ""}, "run_dir='' names nothing: give --run-dir a value"),
        ({"run_dir": "", "resume": True}, "run_dir='' names nothing"),
        ({"run_dir": " "}, "run_dir=' ' names nothing"),
        ({"model": ModelSource(path="")}, "model.path='' names nothing"),
        ({"data": DataConfig(train="")}, "data.train='' names nothing"),
        ({"run_dir": "file"}, "run_dir=file cannot be a folder: file is a file; choose another --run-dir"),
        ({"run_dir": "file/below"}, "run_dir=file/below cannot be a folder: file is a file"),
    ],
    ids=str,
)
def test_a_place_that_is_none_is_refused(changes, message, refused) -> None:
    Path("file").touch()
    assert message in refused(cli.start, dataclasses.replace(CONFIG, **changes))
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_a_home_is_written_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = ModelSource(path="~/model", adapters="~/adapters")
    config = cli.start(dataclasses.replace(CONFIG, run_dir="~/run", model=source))
    assert (config.run_dir, config.model.path, config.model.adapters) == (
        str(tmp_path / "run"),
        str(tmp_path / "model"),
        str(tmp_path / "adapters"),
    )
    assert (tmp_path / "run").is_dir()


def begun(folder: str, **changes: Any) -> None:
    """Makes a folder what a run leaves that has no checkpoint yet."""
    Path(folder).mkdir(parents=True)
    cli.write_config(dataclasses.replace(CONFIG, **changes), Path(folder))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("runs/misspellt", "runs/misspellt does not exist; did you mean --run-dir=runs/misspelt?"),
        ("runs/empty", "runs/empty holds no run; to start anew, leave --resume out"),
        ("other", "other holds no run; to start anew, leave --resume out"),
        ("gone", "gone does not exist; to start anew, leave --resume out"),
    ],
)
def test_resuming_where_there_is_nothing_is_refused(folder, message, refused) -> None:
    begun("runs/misspelt")
    Path("runs/empty").mkdir()
    Path("other").mkdir()
    Path("other/notes.txt").touch()
    assert message in refused(cli.start, dataclasses.replace(CONFIG, run_dir=folder, resume=True))
    assert not Path("gone").exists()


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    begun("run")
    cli.start(dataclasses.replace(CONFIG, run_dir="run", resume=True))
    assert capsys.readouterr().out == "run has no checkpoint yet: the run begins anew\n"


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--update.micro-batches=2", "update.micro_batches was 1 and is 2: the same run but for the last bits"),
        ("--mesh.data=2", "mesh.data was 1 and is 2"),
        ("--model.remat=none", "model.remat was 'full' and is 'none'"),
        ("--seed=0", None),
    ],
)
def test_what_changes_last_bits_is_said(flag, said, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(CONFIG, training=TrainingConfig(prompts_per_step=16))
    begun("run", training=config.training)
    cli.start(cli.parse(config, [flag, "--run-dir=run", "--resume"]))
    out = capsys.readouterr().out
    assert (said or "the run begins anew") in out and ("last bits" in out) == (said is not None)


# ---- Settings of a step -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (
            CONFIG,
            ["--training.prompts-per-step=3", "--training.samples-per-prompt=3"],
            "cannot be cut into update.micro_batches",
        ),
        (CONFIG, ["--update.minibatches=5"], "not divisible by update.minibatches=5"),
        (CONFIG, ["--training.samples-per-prompt=1"], "training.samples_per_prompt=1 cannot learn"),
        (CONFIG, ["--optimizer.schedule=linear", "--optimizer.warmup-steps=9"], "optimizer.warmup_steps=9 leaves"),
        (OFFLINE, ["--optimizer.schedule=cosine", "--optimizer.warmup-steps=100"], "optimizer.warmup_steps=100"),
        (CONFIG, ["--seed=-1"], "seed=-1 must be between 0 and 4294967295"),
        (CONFIG, ["--mesh.fsdp=3"], "devices"),
        (CONFIG, ["--training.steps=2147483647", "--update.epochs=2"], "training.steps=2147483647"),
        (STAR, ["--update.micro-batches=7"], "update.micro_batches=7"),
        (CONFIG, ["--training.prompts-per-step=1000000000"], "lower training.prompts_per_step"),
        (CONFIG, ["--data.max-prompt-length=2000000000"], "or data.max_prompt_length"),
        (CONFIG, ["--sampling.max-tokens=2000000000"], "sampling.max_tokens"),
        (OFFLINE, ["--training.rows-per-step=1000000000"], "lower training.rows_per_step"),
        (OFFLINE, ["--data.max-completion-length=9000000000"], "or data.max_completion_length"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_no_model_can_learn_is_refused_before_one_is_read(config, flags, message, refused) -> None:
    assert message in refused(cli.start, parsed(config, *flags))
    assert not list(Path().iterdir())


@pytest.mark.parametrize("value", ["99999999999999999999", "2147483648"])
@pytest.mark.parametrize("field", ["steps", "keep-checkpoints", "checkpoint-every"])
def test_a_count_that_no_counter_holds_is_refused(field, value, capsys: pytest.CaptureFixture[str]) -> None:
    for config in (CONFIG, OFFLINE):
        with pytest.raises(SystemExit) as ended:
            parsed(config, f"--training.{field}={value}")
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert f"training.{field.replace('-', '_')}={value} must be below 2147483648" in error
