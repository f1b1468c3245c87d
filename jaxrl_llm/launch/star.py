"""A run of STaR: the trainer that its configuration describes."""

from __future__ import annotations

import jax

from jaxrl_llm.config import StarExperiment
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.launch.folder import run_setup, write_config
from jaxrl_llm.launch.loading import Policy, reward_sum
from jaxrl_llm.training.star.trainer import StarTrainer


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
