"""The stages of post-training as commands: what each begins with, and what it runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.estimators import GroupAdvantage
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.surrogates import Clipped
from jaxrl_llm.algorithms.preference.presets import PAIRED, UNPAIRED, dpo, kto
from jaxrl_llm.algorithms.score_models.process_reward import ProcessRewardObjective
from jaxrl_llm.algorithms.score_models.reward_model import RewardModelObjective
from jaxrl_llm.algorithms.supervised import SupervisedObjective
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig
from jaxrl_llm.config import DistillationExperiment, Experiment, OfflineDataConfig, OfflineExperiment, StarExperiment
from jaxrl_llm.data.demonstrations import DemonstrationFormat
from jaxrl_llm.data.preferences import PreferenceFormat
from jaxrl_llm.data.rows import RowFormat
from jaxrl_llm.data.steps import StepFormat
from jaxrl_llm.data.unpaired import UnpairedFormat
from jaxrl_llm.launch.demo import run_demo
from jaxrl_llm.launch.evaluation_command import run_evaluation
from jaxrl_llm.launch.export_command import run_export
from jaxrl_llm.launch.generation_command import run_generation
from jaxrl_llm.launch.loading import Policy
from jaxrl_llm.launch.offline import run_offline
from jaxrl_llm.launch.on_policy import run
from jaxrl_llm.launch.plan.command import run_plan
from jaxrl_llm.launch.report_command import run_report
from jaxrl_llm.launch.star import run_star
from jaxrl_llm.models.heads import ScoreModel

# ---- On given rows -------------------------------------------------------------------------------


def _given_rows(name: str, objective: Any, row_format: RowFormat, learning_rate: float) -> OfflineExperiment:
    return OfflineExperiment(
        name=name,
        objective=objective,
        data=OfflineDataConfig(max_prompt_length=512, max_completion_length=512, format=row_format),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
    )


SFT = _given_rows("sft", SupervisedObjective(), DemonstrationFormat(), 2e-5)
REWARD_MODEL = _given_rows("reward-model", RewardModelObjective(), PreferenceFormat(), 1e-5)
PRM = _given_rows("prm", ProcessRewardObjective(), StepFormat(), 1e-5)
DPO = _given_rows("dpo", dpo(), PreferenceFormat(), 1e-6)
KTO = _given_rows("kto", kto(), UnpairedFormat(), 1e-6)


def _with_method(preset: str, config: OfflineExperiment) -> OfflineExperiment:
    """`config` with a published method of preferences, on pairs or on single completions as it needs."""
    row_format: RowFormat = UnpairedFormat() if preset in UNPAIRED else PreferenceFormat()
    if type(config.data.format) is not type(row_format):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, format=row_format))
    return dataclasses.replace(config, objective={**PAIRED, **UNPAIRED}[preset]())


METHODS = {name: functools.partial(_with_method, name) for name in (*PAIRED, *UNPAIRED)}
"""What `--preset` may name where preferences are trained on."""

UNPAIRED_METHODS = {name: METHODS[name] for name in UNPAIRED}
"""Those of single completions."""


def with_reward_head(policy: Policy, *, bias: bool = False) -> Policy:
    """The checkpoint with a new scalar head in place of its LM head."""
    model = ScoreModel(policy.model, bias=bias)
    return dataclasses.replace(policy, model=model, params=model.from_trunk(policy.params, jax.random.key(0)))


def with_step_head(policy: Policy) -> Policy:
    """The same for steps, whose head has a bias."""
    return with_reward_head(policy, bias=True)


# ---- On samples ----------------------------------------------------------------------------------

GRPO = Experiment(name="grpo")
PPO = Experiment(name="ppo", algorithm=presets.ppo())
TRPO = Experiment(
    name="trpo",
    algorithm=PolicyGradient(
        advantage=GroupAdvantage(scale="batch"),
        surrogate=Clipped(clip_low=None, clip_high=None),
        aggregation="token-mean",
    ),
    trust_region=TrustRegionConfig(),
)
DISTILL = DistillationExperiment(name="distill")
STAR = StarExperiment(name="star")

# ---- The table -----------------------------------------------------------------------------------

RUN: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {
        "demo": lambda text: run_demo(description=text),
        "sft": lambda text: run_offline(SFT, description=text),
        "reward-model": lambda text: run_offline(REWARD_MODEL, description=text, prepare=with_reward_head),
        "prm": lambda text: run_offline(PRM, description=text, prepare=with_step_head),
        "dpo": lambda text: run_offline(DPO, description=text, presets=METHODS),
        "kto": lambda text: run_offline(KTO, description=text, presets=UNPAIRED_METHODS),
        "grpo": lambda text: run(GRPO, description=text),
        "ppo": lambda text: run(PPO, description=text),
        "trpo": lambda text: run(TRPO, description=text),
        "distill": lambda text: run(DISTILL, description=text),
        "star": lambda text: run_star(STAR, description=text),
        "generate": lambda text: run_generation(description=text),
        "evaluate": lambda text: run_evaluation(description=text),
        "export": lambda text: run_export(description=text),
        "plan": lambda text: run_plan(description=text),
        "report": lambda text: run_report(description=text),
    }
)
"""What each subcommand of `jaxrl_llm.__main__` runs, given its description, on the process's command line."""
