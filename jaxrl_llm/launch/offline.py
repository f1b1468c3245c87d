"""Running an experiment on given rows: supervised fine-tuning, reward models, preference optimisation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jaxrl_llm.config import OfflineExperiment
from jaxrl_llm.data.rows import RowDataset
from jaxrl_llm.launch.errors import plain_errors, train
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.launch.folder import run_setup, start, write_config
from jaxrl_llm.launch.loading import Policy, load_policy, load_rows, load_tokenizer_of
from jaxrl_llm.launch.summary import Panels, finish
from jaxrl_llm.launch.words import Presets
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.offline import OfflineTrainer
from jaxrl_llm.training.stage import TrainingResult

OfflineConfigT = TypeVar("OfflineConfigT", bound=OfflineExperiment)

OFFLINE_PANELS: Panels = (
    ("loss", "eval/loss"),
    ("rewards/accuracies", "eval/rewards/accuracies"),
    ("rewards/margins", "eval/rewards/margins"),
    ("accuracy", "eval/accuracy"),
    ("grad_norm",),
)
"""What the picture of a run shows, where it was recorded."""


def parse_offline(
    config: OfflineConfigT, args: list[str] | None = None, *, description: str = "", presets: Presets | None = None
) -> OfflineConfigT:
    """`config` with the command line's changes: `--objective.kind=dft --mesh.fsdp=-1`.

    `--config=FILE` begins with the settings of a file, `--resume=RUN` with those of a run, and `--preset` with what
    `presets` has under its name. An unknown flag ends the program at once and names the nearest one.
    """
    return read_flags(config, args, description, presets=presets)


def make_offline_trainer(
    config: OfflineExperiment,
    policy: Policy,
    mesh: jax.sharding.Mesh,
    *,
    model: Any = None,
    rows: tuple[RowDataset, RowDataset | None],
) -> OfflineTrainer:
    """The trainer that `config` describes; once all fits together, `config` is written to `run_dir/config.json`.

    Args:
        config: settings, started with `start`.
        policy: the model with its parameters.
        mesh: the device mesh.
        model: what the objective computes with, where that is not the policy's transformer: a `ScoreModel` of it,
            of which the policy then has the parameters.
        rows: what `load_rows` returned.
    """
    trainer = OfflineTrainer(
        model=policy.model if model is None else model,
        params=policy.params,
        objective=config.objective,
        dataset=rows[0],
        eval_dataset=rows[1],
        setup=run_setup(config, mesh),
        training=config.training,
        update=config.update,
        optimizer=config.optimizer,
        evaluation=config.evaluation,
    )
    write_config(config, trainer.setup.folder)
    return trainer


def run_offline(
    config: OfflineExperiment,
    args: list[str] | None = None,
    *,
    description: str = "",
    presets: Presets | None = None,
    prepare: Callable[[Policy], Policy] | None = None,
    next_steps: tuple[str, ...] = (),
) -> TrainingResult:
    """Runs an experiment on a checkpoint: what the last line of an experiment file calls.

    Errors in the settings, the data or the checkpoint end the program with one line that says what is wrong.

    Args:
        config: the experiment's settings.
        args: the command line; by default the program's own.
        description: of the experiment, for `--help`.
        presets: what `--preset` may name.
        prepare: changes the policy once it is loaded, before it is trained.
        next_steps: what to try next, one line each.
    """
    config = start(parse_offline(config, args, description=description, presets=presets))
    began = time.perf_counter()
    with plain_errors():
        mesh = make_mesh(config.mesh)
        tokenizer = load_tokenizer_of(config.model)
        rows = load_rows(config, tokenizer)  # before the model, which may take minutes
        policy = load_policy(config, mesh, tokenizer)
        policy = policy if prepare is None else prepare(policy)
        trainer = make_offline_trainer(config, policy, mesh, rows=rows)
    policy = dataclasses.replace(policy, params=None)  # the trainer has its own copy
    result = train(trainer)
    finish(config, policy, result, seconds=time.perf_counter() - began, next_steps=next_steps, panels=OFFLINE_PANELS)
    return result
