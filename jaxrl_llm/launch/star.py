"""A run of STaR: the trainer that its configuration describes, and the whole of it on a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxrl_llm.config import StarExperiment
from jaxrl_llm.data.interfaces import RowSource
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.sources import open_source
from jaxrl_llm.launch.errors import plain_errors, train
from jaxrl_llm.launch.folder import run_setup, start, write_config
from jaxrl_llm.launch.loading import SOURCES, Policy, load_policy, load_tokenizer_of, reward_sum
from jaxrl_llm.launch.on_policy import check_rewarded, parse
from jaxrl_llm.launch.summary import finish
from jaxrl_llm.sampling.stop_texts import check_stop_texts
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.stage import TrainingResult
from jaxrl_llm.training.star.trainer import StarTrainer

ReadRows = Callable[[str, int | None], RowSource]
"""Where data lie and how many rows of them are wanted → rows."""


def make_star_trainer(
    config: StarExperiment,
    policy: Policy,
    mesh: jax.sharding.Mesh,
    *,
    problems: PromptDataset,
    hinted: PromptDataset | None,
    held_out: PromptDataset | None,
) -> StarTrainer:
    """The trainer that `config` describes; once all fits together, `config` is written to `run_dir/config.json`.

    Args:
        config: settings, started with `start`.
        policy: the model that each iteration starts from.
        mesh: the device mesh.
        problems: as `StarTrainer`.
        hinted: as `StarTrainer`.
        held_out: prompts to evaluate on, if it is.

    Raises:
        ValueError: as `StarTrainer`, or there is no reward function.
    """
    rewards = reward_sum(config)
    if rewards is None:
        raise ValueError("there is no reward function, which would say what rationale is right")
    trainer = StarTrainer(
        model=policy.model,
        params=policy.params,
        tokenizer=policy.tokenizer,
        stop_tokens=policy.stop_tokens,
        problems=problems,
        hinted=hinted,
        eval_problems=held_out,
        rewards=rewards,
        setup=run_setup(config, mesh),
        star=config.star,
        sampling=config.sampling,
        optimizer=config.optimizer,
        evaluation=config.evaluation,
        plan=config.update,
    )
    write_config(config, trainer.setup.folder)
    return trainer


def run_star(
    config: StarExperiment,
    args: list[str] | None = None,
    *,
    description: str = "",
    rows: ReadRows | None = None,
) -> TrainingResult:
    """Runs STaR on a checkpoint: what the last line of an experiment file calls.

    Errors in the settings, the data or the checkpoint end the program with one line that says what is wrong.

    Args:
        config: the experiment's settings.
        args: the command line; by default the program's own.
        description: of the experiment, for `--help`.
        rows: reads the data, where rows are to have other columns than those there; `None`: as they are.
    """
    config = parse(config, args, description=description)
    with plain_errors():
        check_rewarded(config)
        _check_problems(config)
    config = start(config)
    began = time.perf_counter()
    with plain_errors():
        mesh = make_mesh(config.mesh)
        tokenizer = load_tokenizer_of(config.model)
        check_stop_texts(config.sampling.stop, tokenizer)
        problems, hinted, held_out = _load_problems(config, tokenizer, rows or _as_they_are)
        policy = load_policy(config, mesh, tokenizer)
        trainer = make_star_trainer(config, policy, mesh, problems=problems, hinted=hinted, held_out=held_out)
    policy = dataclasses.replace(policy, params=None)  # the trainer has its own copy
    result = train(trainer)
    finish(config, policy, result, seconds=time.perf_counter() - began)
    return result


def _as_they_are(source: str, limit: int | None) -> RowSource:
    return open_source(source, max_rows=limit)


def _check_problems(config: StarExperiment) -> None:
    """Refuses a run without problems, evaluations of nothing, and hints that say nothing."""
    if config.data.train is None:
        raise ValueError(f"no problems given: pass --data.train={SOURCES}")
    if config.evaluation.every and config.data.eval is None:
        raise ValueError(f"no held-out problems given: pass --data.eval={SOURCES}, or --evaluation.every=0")
    if config.star.rationalize and config.hint is None:
        raise ValueError(
            "star.rationalize shows the answers of problems that were not solved, and nothing says how: pass "
            "--hint='{question} (The answer is {answer}.)' over the columns of the data, or --star.no-rationalize"
        )


def _load_problems(
    config: StarExperiment, tokenizer: Any, rows: ReadRows
) -> tuple[PromptDataset, PromptDataset | None, PromptDataset | None]:
    """Problems, the same with hints, and held-out ones."""
    data, every = config.data, config.evaluation.every

    def prompts(source: RowSource, template: str | None) -> PromptDataset:
        form = data.format if template is None else dataclasses.replace(data.format, template=template)
        return PromptDataset(
            source,
            tokenizer,
            max_prompt_length=data.max_prompt_length,
            prompt_format=form,
            overlong=data.overlong,
        )

    assert data.train is not None  # checked before
    learned = rows(data.train, data.max_train_prompts)
    hinted = prompts(learned, config.hint) if config.star.rationalize else None
    held_out = None
    if every and data.eval is not None:
        held_out = prompts(rows(data.eval, config.evaluation.max_prompts), None)
    return prompts(learned, None), hinted, held_out
