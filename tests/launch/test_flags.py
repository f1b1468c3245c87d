"""Flags that change nothing, as the other settings are, are refused; what the configuration itself holds never is."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

import pytest

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.objective import Correction, OverlongPenalty, PolicyGradient, ValueObjective
from jaxrl_llm.algorithms.preference.presets import dpo, f_dpo, kto, one_sided_dpo
from jaxrl_llm.algorithms.score_models.process_reward import ProcessRewardObjective
from jaxrl_llm.checks import check_idle
from jaxrl_llm.cli import parse
from jaxrl_llm.config import Experiment, OfflineExperiment
from jaxrl_llm.launch.offline import parse_offline
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


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--optimizer.learning-rate=nan", "optimizer.learning_rate=nan must not be negative"),
        ("--training.steps=x", "Error parsing --training.steps: invalid literal for int() with base 10: 'x'"),
        (
            "--model.dtype=f",
            "invalid choice 'f' for argument '--model.dtype'. Expected one of ('float32', 'bfloat16').",
        ),
    ],
)
def test_a_bad_value_is_one_line_in_any_terminal(flag, message, encoding, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))  # by it tyro draws its frames
    with pytest.raises(SystemExit) as stop:
        parse(CONFIG, [flag])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


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
