"""Running an on-policy experiment: the command line over its configuration, set-up, training, summary."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax

from jaxrl_llm.algorithms.distillation.presets import PRESETS as DISTILLATIONS
from jaxrl_llm.algorithms.interfaces import Algorithm
from jaxrl_llm.algorithms.iteration import DeviceReward
from jaxrl_llm.algorithms.policy_gradient.presets import OF_ROLES, PRESETS
from jaxrl_llm.config import DistillationExperiment, Experiment, StarExperiment
from jaxrl_llm.data.interfaces import RowSource
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.launch.errors import plain_errors, train
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.launch.folder import run_setup, start, write_config
from jaxrl_llm.launch.loading import Policy, load_policy, load_prompts, load_tokenizer_of, reward_sum
from jaxrl_llm.launch.summary import finish
from jaxrl_llm.launch.teachers import find_teachers
from jaxrl_llm.launch.words import Presets
from jaxrl_llm.models.config import Params
from jaxrl_llm.sampling.stop_texts import check_stop_texts
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.episodes.hints import check_texts, self_teacher_of
from jaxrl_llm.training.episodes.judging import Judge
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.learner import CriticSource
from jaxrl_llm.training.on_policy import Trainer, TrainingResult
from jaxrl_llm.training.teachers import Teacher

ConfigT = TypeVar("ConfigT", bound=Experiment)


def parse(config: ConfigT, args: list[str] | None = None, *, description: str = "") -> ConfigT:
    """`config` with the command line's changes: `--algorithm.surrogate.clip-high=0.28 --mesh.fsdp=-1`.

    `--preset=gspo` puts that published algorithm in place of `config.algorithm`, whose flags may change it further.
    `--config=FILE` begins with the settings of a file, `--resume=RUN` with those of a run. An unknown flag or preset
    ends the program at once and names the nearest one.
    """
    return read_flags(config, args, description, presets=presets_of(config))


def presets_of(config: Experiment) -> Presets:
    """What `--preset` may name in an experiment of this kind."""
    match config:
        case StarExperiment():
            return {}
        case DistillationExperiment():
            return DISTILLATIONS_BY_NAME
        case _:
            return PRESETS_BY_NAME


def _with_algorithm(preset: Callable[[], Algorithm], config: ConfigT) -> ConfigT:
    """`config` with a published algorithm, and without the critic of one that had it."""
    algorithm = preset()
    critic = config.critic if algorithm.needs_critic else CriticSource()
    return dataclasses.replace(config, algorithm=algorithm, critic=critic)


PRESETS_BY_NAME = {preset.__name__: functools.partial(_with_algorithm, preset) for preset in (*PRESETS, *OF_ROLES)}
"""What `--preset` may name."""

DISTILLATIONS_BY_NAME = {preset.__name__: functools.partial(_with_algorithm, preset) for preset in DISTILLATIONS}
"""The same where the policy learns from teachers."""


def make_trainer(
    config: Experiment,
    policy: Policy,
    mesh: jax.sharding.Mesh,
    *,
    train_rows: RowSource | None = None,
    eval_rows: RowSource | None = None,
    prompts: tuple[PromptDataset, PromptDataset | None] | None = None,
    device_rewards: Sequence[DeviceReward] = (),
    eval_rewards: RewardSum | None = None,
    judge: Judge | None = None,
    critic_params: Params | None = None,
    teachers: Sequence[Teacher] = (),
) -> Trainer:
    """The trainer that `config` describes; once all fits together, `config` is written to `run_dir/config.json`.

    Args:
        config: settings, started with `start`.
        policy: the model to train.
        mesh: the device mesh.
        train_rows: prompts, in place of `config.data.train`.
        eval_rows: held-out prompts, in place of `config.data.eval`.
        prompts: what `load_prompts` returned, if it was called before.
        device_rewards: as `Trainer`; with them, `config.rewards` may be empty.
        eval_rewards: as `Trainer`.
        judge: as `Trainer`.
        critic_params: as `Trainer`.
        teachers: as `Trainer`.
    """
    train, held_out = prompts or load_prompts(config, policy.tokenizer, train_rows=train_rows, eval_rows=eval_rows)
    trainer = Trainer(
        model=policy.model,
        params=policy.params,
        tokenizer=policy.tokenizer,
        stop_tokens=policy.stop_tokens,
        dataset=train,
        eval_dataset=held_out,
        rewards=reward_sum(config),
        device_rewards=device_rewards,
        eval_rewards=eval_rewards,
        judge=judge,
        critic_params=critic_params,
        trust_region=config.trust_region,
        teachers=teachers,
        algorithm=config.algorithm,
        critic=config.critic,
        setup=run_setup(config, mesh),
        training=config.training,
        update=config.update,
        optimizer=config.optimizer,
        sampling=config.sampling,
        evaluation=config.evaluation,
        completions=config.completions,
    )
    write_config(config, trainer.setup.folder)
    return trainer


def run(config: Experiment, args: list[str] | None = None, *, description: str = "") -> TrainingResult:
    """Runs an experiment on a checkpoint: what the last line of an experiment file calls.

    Errors in the settings, the data, the checkpoint or a reward function end the program with one line that says
    what is wrong.
    """
    config = parse(config, args, description=description)
    with plain_errors():
        check_rewarded(config)
    config = start(config)
    began = time.perf_counter()
    with plain_errors():
        mesh = make_mesh(config.mesh)
        tokenizer = load_tokenizer_of(config.model)
        check_stop_texts(config.sampling.stop, tokenizer)
        prompts = load_prompts(config, tokenizer)  # before the model, which may take minutes
        sources = find_teachers(config, tokenizer)
        policy = load_policy(config, mesh, tokenizer)
        teachers = [source.load(mesh) for source in sources]
        trainer = make_trainer(config, policy, mesh, prompts=prompts, teachers=teachers)
    policy = dataclasses.replace(policy, params=None)  # the trainer has its own copy
    result = train(trainer)
    finish(config, policy, result, seconds=time.perf_counter() - began)
    return result


def check_rewarded(config: Experiment) -> None:
    """Refuses a run that nothing rewards, before anything is loaded.

    Raises:
        ValueError: there is no reward function, or one is named that there is not, or hints cannot be filled.
    """
    rewarded = reward_sum(config) is not None
    if (itself := self_teacher_of(config.algorithm)) is not None:
        check_texts(itself, rewarded=rewarded)
    if not rewarded and not isinstance(config, DistillationExperiment):
        raise ValueError("no reward function given: pass --rewards with names of some, or file.py:function")
