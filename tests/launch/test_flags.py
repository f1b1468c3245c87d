"""Flags that change nothing, as the other settings are, are refused; what the configuration itself holds never is."""

from __future__ import annotations

import dataclasses
import json
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.objective import Correction, OverlongPenalty, PolicyGradient, ValueObjective
from jaxrl_llm.algorithms.policy_gradient.sequence_surrogates import SequenceClipped
from jaxrl_llm.algorithms.preference.presets import PAIRED, UNPAIRED, dpo, f_dpo, kto, one_sided_dpo
from jaxrl_llm.algorithms.score_models.process_reward import ProcessRewardObjective
from jaxrl_llm.algorithms.score_models.reward_model import RewardModelObjective
from jaxrl_llm.checks import check_idle
from jaxrl_llm.cli import parse
from jaxrl_llm.config import Experiment, OfflineExperiment, flatten
from jaxrl_llm.launch.configure import configure
from jaxrl_llm.launch.folder import write_config
from jaxrl_llm.launch.help_page import doc_of
from jaxrl_llm.launch.offline import parse_offline
from jaxrl_llm.launch.short_names import setting_paths
from jaxrl_llm.launch.words import as_flag
from jaxrl_llm.training.learner import CriticSource


def no_reward(**columns: Any) -> list[None]:
    """It is never called."""
    return []


CONFIG = Experiment(name="run", rewards=(no_reward,))
PPO = dataclasses.replace(
    CONFIG, algorithm=presets.ppo(), critic=CriticSource(optimizer=OptimizerConfig(learning_rate=5e-4))
)


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (CONFIG, "--critic.shares-trunk", "critic.shares_trunk=True would have no effect: GroupAdvantage has no"),
        (CONFIG, "--critic.stop-gradient --preset=rloo", "critic.stop_gradient=True would have no effect: RLOOAdv"),
        (CONFIG, "--critic.optimizer.learning-rate=5", "critic.optimizer.learning_rate=5.0 would have no effect"),
        (CONFIG, "--critic.optimizer.b1=0.5 --preset=online-dpo", "critic.optimizer.b1=0.5 would have no effect"),
        (CONFIG, "--algorithm.kl-estimator=k2", "algorithm.kl_estimator='k2' would have no effect: the loss has no KL"),
        (CONFIG, "--algorithm.kl-clip=1", "algorithm.kl_clip=1.0 would have no effect"),
        (CONFIG, "--algorithm.max-length=7", "algorithm.max_length=7 would have no effect: only algorithm.aggregation"),
        (CONFIG, "--preset=dr-grpo --algorithm.advantage.eps=1", "advantage.eps=1.0 would have no effect"),
        (CONFIG, "--preset=remax --algorithm.advantage.kl-estimator=k3", "kl_estimator='k3' would have no effect"),
        (CONFIG, "--preset=ppo --algorithm.advantage.kl-horizon=5", "kl_horizon=5.0 would have no effect"),
        (CONFIG, "--preset=ppo --algorithm.value.coef=1", "value.coef=1.0 would have no effect: a critic of its own"),
        (PPO, "--critic.stop-gradient", "critic.stop_gradient=True would have no effect: a critic of its own"),
        (PPO, "--critic.shares-trunk --critic.optimizer.b2=0.9", "critic.optimizer.b2=0.9 would have no effect"),
        (
            CONFIG,
            "--preset=ha-dw --algorithm.advantage.anchor=moving_average --algorithm.advantage.eta=2",
            "algorithm.advantage.eta=2.0 would have no effect",
        ),
    ],
)
def test_a_flag_without_effect_is_refused(config, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(config, flags.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer.learning-rate=nan", "optimizer.learning_rate=nan must not be negative"),
        ("--training.steps=x", "--training.steps=x must be a whole number"),
        ("--training.steps 3 4", "--training.steps=3 4 must be a whole number"),
        ("--training.steps", "--training.steps needs a value: a whole number"),
        ("--training=3", "--training has settings of its own, and takes no value: --training.steps, "),
        ("--algorithm=grpo", "--algorithm has settings of its own, and takes no value: --algorithm.advantage, "),
        (
            "--training.steps=1 --steps=2",
            "--training.steps and --steps are one setting, and one value would be lost: give one",
        ),
        ("--model.dtype=f", "--model.dtype=f must be one of float32, bfloat16"),
        ("--distributed=maybe", "--distributed=maybe must be true or false"),
        ("--model.template-arguments=[1]", "--model.template-arguments=[1] must be a JSON object"),
        ("grpo --seed=1", "'grpo' belongs to no flag"),
        ("--learning_rat=1", "there is no setting --learning-rat; did you mean --learning-rate?"),
        ("--optimzer.learning-rate=1", "there is no setting --optimzer.learning-rate; did you mean --optimizer.learn"),
        ("--critic.optimzer.b1=1", "there is no setting --critic.optimzer.b1; did you mean --critic.optimizer.b1?"),
        ("--algorithm.clip-high=1", "there is no setting --algorithm.clip-high; did you mean --algorithm.surrogate.cl"),
        ("--per-device-train-batch-size=8", "there is no setting --per-device-train-batch-size; a step has --training"),
        (
            "--training.batch-size=8",
            "there is no setting --training.batch-size; a step has --training.prompts-per-step",
        ),
        ("--epochs=2", "there is no setting --epochs; --training.steps is the length of a run"),
        ("--model.qq=2", "there is no setting --model.qq; --help-all lists those of model"),
        ("--bf16", "there is no setting --bf16; --model.dtype=bfloat16"),
        (
            "--algorithm.surrogate.part=Cliped",
            "--algorithm.surrogate.part='Cliped' is no Surrogate; did you mean 'Clip",
        ),
        ("--preset", "--preset needs a value"),
        ("--preset=gsppo", "no preset is named 'gsppo'; did you mean 'gspo'?"),
        ("--config=nope.yaml", "--config=nope.yaml: there is no such file"),
        ("--config=nope.toml", "--config=nope.toml: settings are read from files whose names end in .yaml, .yml or .j"),
        ("--optimizer.lr=1", "there is no setting --optimizer.lr; did you mean --optimizer.learning-rate?"),
        ("--objective.beta=1 --beta=1", "there is no setting --objective.beta; did you mean --algorithm.kl-coef?"),
        ("--rows-per-step=8", "there is no setting --rows-per-step; other commands have it"),
        ("--reward-weights=1,2", "--reward-weights=1,2 must be a list, each a number or None; its words stand apart"),
        ("—seed=1", "'—seed=1' begins with a dash of print, as texts that are copied do: write --seed=1"),
        ("--sampling.stop ---", "'---' names no setting: a value of dashes is given as --name=---"),
        ("--resume=", "--resume needs the folder of a run"),
        ("--resume=a --resume=b", "--resume is given twice"),
        ("--resume=nowhere", "--resume finds nothing to go on with: nowhere does not exist"),
    ],
)
def test_a_slip_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(CONFIG, flags.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("flags", "path", "value"),
    [
        ("--learning-rate=1e-5", "optimizer.learning_rate", 1e-5),
        ("--seed=1 --seed=2", "seed", 2),
        ("--num_generations 4", "training.samples_per_prompt", 4),
        ("--max-completion-length=32", "sampling.max_tokens", 32),
        ("--beta=0.04", "algorithm.kl_coef", 0.04),
        ("--epsilon=0.3", "algorithm.surrogate.clip_low", 0.3),
        ("--epsilon=0.3", "algorithm.surrogate.clip_high", 0.3),
        ("--epsilon=0.3 --epsilon-high=0.4", "algorithm.surrogate.clip_low", 0.3),
        ("--epsilon-high=0.4 --epsilon=0.3", "algorithm.surrogate.clip_high", 0.4),
        ("--output-dir=out", "run_dir", "out"),
        ("--model-name-or-path=m", "model.path", "m"),
        ("--distributed", "distributed", True),
        ("--distributed true", "distributed", True),
        ("--model.no-scan-layers", "model.scan_layers", False),
        ("--model.scan-layers=False", "model.scan_layers", False),
        ("--sampling.slots=None", "sampling.slots", None),
        ("--sampling.slots=auto", "sampling.slots", "auto"),
        ("--sampling.slots 8", "sampling.slots", 8),
        ("--sampling.stop a b", "sampling.stop", ("a", "b")),
        ('--model.template-arguments={"a":1}', "model.template_arguments", {"a": 1}),
        ("--algorithm.correction.rule=mis", "algorithm.correction", Correction("mis")),
        ("--algorithm.correction=None", "algorithm.correction", None),
        ("--algorithm.surrogate.part=SequenceClipped", "algorithm.surrogate", SequenceClipped()),
    ],
)
def test_a_flag_sets_what_it_names(flags, path, value):
    assert attrgetter(path)(parse(CONFIG, flags.split())) == value


@pytest.mark.parametrize("preset", presets.PRESETS, ids=lambda preset: preset.__name__)
def test_what_a_run_wrote_of_its_settings_is_read_back(preset):
    algorithm = preset()
    critic = CriticSource() if algorithm.needs_critic else CONFIG.critic
    config = dataclasses.replace(CONFIG, algorithm=algorithm, critic=critic, reward_weights=(2.0,))
    assert configure(CONFIG, json.loads(json.dumps(flatten(config)))) == config


@pytest.mark.parametrize("method", [*PAIRED, *UNPAIRED])
def test_so_it_is_of_runs_on_given_rows(method):
    config = OfflineExperiment(name="run", objective={**PAIRED, **UNPAIRED}[method]())
    written = json.loads(json.dumps(flatten(config)))
    assert configure(OfflineExperiment(name="other"), written) == config


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_of_settings_is_nested_or_flat_and_flags_go_before_it(suffix, tmp_path):
    settings = {"preset": "dr-grpo", "learning-rate": "1e-5", "training": {"steps": 7, "prompts_per_step": 2}}
    settings |= {"sampling.max_tokens": 9, "run_dir": "that of another run"}
    file = tmp_path / f"settings.{suffix}"
    file.write_text(json.dumps(settings))  # which is YAML, too
    config = parse(CONFIG, [f"--config={file}", "--steps=8"])
    assert (config.optimizer.learning_rate, config.training.steps, config.training.prompts_per_step) == (1e-5, 8, 2)
    assert config.sampling.max_tokens == 9 and config.run_dir is None and config.algorithm == presets.dr_grpo()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {stps: 3}", "there is no setting training.stps; did you mean training.steps?"),
        ("training: {steps: many}", "training.steps='many' must be a whole number"),
        ("- training", "must hold settings by their names, not list"),
        ("a: [", "cannot be read: while parsing"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(text, message, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse(CONFIG, [f"--config={file}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line and message in line


def test_a_run_goes_on_by_its_own_settings(tmp_path):
    config = dataclasses.replace(CONFIG, algorithm=presets.gspo(), seed=5, run_dir=str(tmp_path))
    write_config(config, tmp_path)
    for flags in ([f"--resume={tmp_path}"], ["--resume", str(tmp_path)]):
        assert parse(CONFIG, flags) == dataclasses.replace(config, resume=True)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("run/checkpoints", "--resume=run/checkpoints is a part of a run: give --resume=run"),
        (".", "--resume=. is a folder of runs: give one, as --resume=run"),
        ("model", "--resume=model: its config.json is no run's; to start from this model, give --model=model"),
        ("rows", "rows/config.json cannot be gone on with: there is no setting objective.part; is it a run of another"),
    ],
)
def test_what_is_no_run_to_go_on_with_says_what_is(place, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("run/checkpoints", "model", "rows") if place != "." else ("run",):
        Path(folder).mkdir(parents=True)
    write_config(CONFIG, Path("run"))
    if place != ".":
        Path("model/config.json").write_text('{"model_type": "qwen3"}')
        write_config(OfflineExperiment(name="rows", objective=dpo()), Path("rows"))
    with pytest.raises(SystemExit):
        parse(CONFIG, [f"--resume={place}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_run_on_other_rows_is_of_another_command(tmp_path, capsys):
    write_config(OfflineExperiment(name="scores", objective=RewardModelObjective()), tmp_path)
    config = OfflineExperiment(name="sft")
    with pytest.raises(SystemExit):
        parse_offline(config, [f"--resume={tmp_path}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "is a run of another command: its objective is RewardModelObjective, and here SupervisedObjective" in line
    presets = {"scores": lambda own: dataclasses.replace(own, objective=RewardModelObjective())}
    assert parse_offline(config, [f"--resume={tmp_path}"], presets=presets).objective == RewardModelObjective()


def test_help_is_a_page_and_all_of_it_names_every_setting(capsys):
    pages = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            parse(CONFIG, [flag], description="What it is about.")
        assert stop.value.code == 0
        pages.append(capsys.readouterr().out)
    assert all("What it is about." in page and "--preset NAME" in page for page in pages)
    assert "--learning-rate (optimizer.learning_rate): a number = 1e-06" in pages[0]
    assert len(pages[0].splitlines()) < 100
    assert all(as_flag(path) in pages[1] for path in setting_paths(CONFIG))


@pytest.mark.parametrize("objective", [None, *{**PAIRED, **UNPAIRED}.values()])
def test_every_setting_says_what_it_is(objective):
    config: Any = CONFIG if objective is None else OfflineExperiment(name="run", objective=objective())
    for path in setting_paths(config):
        folders, _, name = path.rpartition(".")
        record = attrgetter(folders)(config) if folders else config
        assert len(doc_of(type(record), name)) > 12, path


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (CONFIG, ""),
        (CONFIG, "--algorithm.kl-coef=0.1 --algorithm.kl-estimator=k2"),
        (CONFIG, "--critic.optimizer.learning-rate=1e-5"),  # as it is
        (CONFIG, "--preset=reinforce_plus_plus_baseline --algorithm.kl-coef=0"),  # k2 is the preset's
        (CONFIG, "--preset=ppo --critic.shares-trunk --algorithm.value.coef=1 --critic.stop-gradient"),
        (CONFIG, "--preset=ha-dw --algorithm.advantage.anchor=moving_average"),
        (PPO, "--critic.shares-trunk"),  # the optimizer of the other critic is the configuration's
        (PPO, "--critic.optimizer.learning-rate=1e-3"),
    ],
)
def test_what_has_an_effect_or_was_there_is_not(config, flags):
    parse(config, flags.split())


@pytest.mark.parametrize("rule", ["icepop", "geometric"])
def test_a_record_that_was_not_there_is_compared_with_one_of_its_kind(rule):
    def with_level(level: Any) -> Experiment:
        return dataclasses.replace(CONFIG, algorithm=PolicyGradient(correction=Correction(rule, level=level)))

    check_idle(with_level("token"), CONFIG)
    with pytest.raises(ValueError, match=r"algorithm\.correction\.level='sequence' would have no effect"):
        check_idle(with_level("sequence"), CONFIG)
    check_idle(dataclasses.replace(CONFIG, algorithm=PolicyGradient(correction=Correction("tis", "sequence"))), CONFIG)


def test_a_preset_without_a_critic_takes_its_settings_away():
    assert parse(PPO, ["--preset=grpo"]).critic == CriticSource()
    assert parse(PPO, ["--preset=ppo"]).critic == PPO.critic


@pytest.mark.parametrize(
    ("objective", "flags", "message"),
    [
        (dpo(), "--objective.pair-loss.f-alpha=0.3", "objective.pair_loss.f_alpha=0.3 would have no effect"),
        (f_dpo(), "--objective.pair-loss.f-alpha=0.3", "objective.pair_loss.f_alpha=0.3 would have no effect"),
        (one_sided_dpo(), "--objective.baseline=other_side", "objective.baseline='other_side' would have no effect"),
        (ProcessRewardObjective(), "--objective.neutral=ignore", "objective.neutral='ignore' would have no effect"),
    ],
)
def test_so_it_is_on_given_rows(objective, flags, message, capsys):
    config = OfflineExperiment(name="run", objective=objective)
    with pytest.raises(SystemExit) as stop:
        parse_offline(config, flags.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err
    parse_offline(dataclasses.replace(config, objective=kto()), ["--objective.baseline=other_side"])


@pytest.mark.parametrize("value", [{"coef": 0.5}, {"clip": None}, {"kind": "mse"}])
def test_settings_of_values_are_refused_where_there_are_none(value):
    ((name, given),) = value.items()
    with pytest.raises(ValueError, match=re.escape(f"algorithm.value.{name}={given!r} would have no effect")):
        PolicyGradient(value=ValueObjective(**value))
    dataclasses.replace(presets.ppo(), value=ValueObjective(**value))


@pytest.mark.parametrize("preset", [presets.gdpo, presets.brpo])
def test_a_penalty_for_length_is_refused_where_no_one_reads_the_reward(preset):
    with pytest.raises(ValueError, match=r"algorithm.overlong=.* would have no effect: \w+ does not read the reward"):
        dataclasses.replace(preset(), overlong=OverlongPenalty(cache=4))
