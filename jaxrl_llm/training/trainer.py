"""The trainer of on-policy algorithms: what a run is made of, checked and compiled once.

An iteration is two XLA programs with the reward functions between them; `jaxrl_llm.training.loop` runs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient import PolicyGradient
from jaxrl_llm.algorithms.update import UpdateConfig, abstract_train_state, make_train_state, make_update_step
from jaxrl_llm.data.loader import PromptLoader
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.models.transformer import Params, Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import replicated, row_shards
from jaxrl_llm.training.checkpoint import Checkpointer
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.distributed import is_main_process
from jaxrl_llm.training.evaluate import EvaluationConfig, Evaluator
from jaxrl_llm.training.loop import Loop
from jaxrl_llm.training.metrics import MetricsWriter, WandbConfig
from jaxrl_llm.training.report import Report
from jaxrl_llm.training.resume import CHECKPOINTS, find_run
from jaxrl_llm.training.scoring import RewardSum
from jaxrl_llm.training.signals import GracefulStop
from jaxrl_llm.types import TrainState


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The length of a run and the size of a step: prompts × samples = rows of an update."""

    steps: int = 100
    """Iterations: one batch of rollouts each."""
    prompts_per_step: int = 8
    """P."""
    samples_per_prompt: int = 8
    """G."""
    checkpoint_every: int = 50
    """Steps between checkpoints; one more comes at the end. 0: none at all."""
    keep_checkpoints: int = 3
    """Latest checkpoints that are kept, beside the best one."""
    samples_every: int = 10
    """Steps between printed completions where there is no terminal; 0: never."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant."""
        for field in ("steps", "prompts_per_step", "samples_per_prompt", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise ValueError(f"training.{field}={getattr(self, field)} must be at least 1")
        for field in ("checkpoint_every", "samples_every"):
            if getattr(self, field) < 0:
                raise ValueError(f"training.{field}={getattr(self, field)} must not be negative")


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run leaves behind."""

    params: Params
    """The policy's parameters after the last step."""
    step: int
    """Steps done."""
    first_evaluation: dict[str, float]
    """Metrics of the evaluation before the first step; empty without evaluation."""
    last_evaluation: dict[str, float]
    """Metrics of the last evaluation."""
    stopped: str | None
    """Why it ended early, or `None`."""


class Trainer:
    """Trains a policy on rewards of its own samples.

    Args:
        model: the policy.
        params: its parameters at the start, also the reference's where the algorithm has one.
        tokenizer: decodes completions.
        stop_tokens: ids that end a completion.
        dataset: prompts to train on.
        eval_dataset: held-out prompts, or `None`.
        rewards: reward functions and weights.
        algorithm: the objective.
        run_dir: folder of metrics and checkpoints.
        mesh: the device mesh.
        training, update, optimizer, sampling, evaluation: see the records.
        seed: of samples, order of prompts and minibatches.
        resume: go on from the latest checkpoint in `run_dir` if there is one.
        description: flat JSON-able record of all settings that a resumed run must share.
        title: name of the run in the report.
        wandb: also log to Weights & Biases.

    Raises:
        ValueError: settings, data and mesh do not fit together, or `run_dir` holds another run; names what is
            wrong, before anything is compiled.
    """

    def __init__(
        self,
        *,
        model: Transformer,
        params: Params,
        tokenizer: Any,
        stop_tokens: tuple[int, ...],
        dataset: PromptDataset,
        rewards: RewardSum,
        algorithm: PolicyGradient,
        run_dir: str | Path,
        mesh: jax.sharding.Mesh,
        eval_dataset: PromptDataset | None = None,
        training: TrainingConfig | None = None,
        update: UpdateConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        sampling: SamplingConfig | None = None,
        evaluation: EvaluationConfig | None = None,
        seed: int = 0,
        resume: bool = False,
        description: dict[str, Any] | None = None,
        title: str = "",
        wandb: WandbConfig | None = None,
    ):
        self.config = training or TrainingConfig()
        plan, sampling = update or UpdateConfig(), sampling or SamplingConfig()
        self.evaluation, optimizer = evaluation or EvaluationConfig(), optimizer or OptimizerConfig()
        prompts, group = self.config.prompts_per_step, self.config.samples_per_prompt
        self.model, self.mesh, self.tokenizer, self.rewards = model, mesh, tokenizer, rewards
        self.run_dir, self.title = Path(run_dir), title
        self.description, self.wandb = description or {}, wandb

        # All that can be wrong is found before anything is compiled.
        if group == 1:  # whatever the scale and the baseline, a group of equal rewards has advantages of 0
            raise ValueError(
                "training.samples_per_prompt=1 cannot learn: an advantage compares a sample with the others of its "
                "prompt; pass --training.samples-per-prompt=2 or more"
            )
        self.saved = find_run(run_dir, self.description, resume=resume)
        rewards.check_columns(dataset.column_names)
        plan.group_split(prompts, group, row_shards(mesh), whole_groups=algorithm.needs_whole_groups)
        self.loader = PromptLoader(dataset, batch_size=prompts, seed=seed)
        if self.saved:
            self.loader.set_state(self.saved.data)
        self.sampler = Sampler(model, sampling, group=group, stop_tokens=stop_tokens, mesh=mesh)
        self.sampler.check_length(dataset.longest)
        self.evaluator = None
        if self.evaluation.every:
            if eval_dataset is None:
                raise ValueError(f"evaluation.every={self.evaluation.every}, but there are no held-out prompts")
            self.evaluator = Evaluator(
                model,
                eval_dataset,
                tokenizer,
                rewards,
                self.evaluation,
                sampling=sampling,
                stop_tokens=stop_tokens,
                mesh=mesh,
                rows=prompts * group,
            )
        self._optimizer_steps = plan.optimizer_steps
        self._what_a_step_is = (
            f"{_count(dataset)} to train on, {_count(eval_dataset) if eval_dataset else 'none'} held out. A step: "
            f"{prompts} prompts × {group} samples = {prompts * group} rows, {plan.optimizer_steps} optimizer step(s), "
            f"on {mesh.size} device(s)."
        )
        self._prepare_updates(params, algorithm, plan, optimizer, sampling, seed)
        self.compilations = CompilationCounter()

    def _prepare_updates(
        self,
        params: Params,
        algorithm: PolicyGradient,
        plan: UpdateConfig,
        config: OptimizerConfig,
        sampling: SamplingConfig,
        seed: int,
    ) -> None:
        """The update step, still to be compiled, and what it works on: the state, and the reference if it has one."""
        schedule = make_schedule(config, self.config.steps * plan.optimizer_steps)
        optimizer = make_optimizer(config, schedule)
        step = make_update_step(
            self.model, optimizer, algorithm, plan, temperature=sampling.temperature, truncated=sampling.truncates
        )
        self.abstract_state = abstract_train_state(self.model, optimizer, self.mesh)
        placed: TrainState = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self.update = jax.jit(step, donate_argnums=0, out_shardings=(placed, replicated(self.mesh)))
        with jax.set_mesh(self.mesh):
            start = jax.jit(lambda p: make_train_state(p, optimizer, seed), out_shardings=placed)
            self.state: TrainState = start(params)  # a copy of them: updates overwrite it
            self.reference = jax.device_put(params, placed.params) if algorithm.needs_reference else None
        every_step = np.arange(self.config.steps * plan.optimizer_steps)
        self._learning_rates = np.asarray(jax.jit(jax.vmap(schedule))(every_step))

    def learning_rate(self, step: int) -> float:
        """The rate of the last optimizer step of an iteration."""
        return float(self._learning_rates[step * self._optimizer_steps - 1])

    def run(self) -> TrainingResult:
        """Trains to the last step, or until SIGTERM or Ctrl-C; then saves and returns.

        Raises:
            RewardError: a reward function failed; the steps before are saved.
        """
        start = self.saved.step if self.saved else None
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(GracefulStop())  # outermost, so that it also guards the last write
            stack.enter_context(self.compilations)
            checkpoints = None
            if self.config.checkpoint_every or start:
                best = "eval/accuracy" if self.evaluator else None
                keep = self.config.keep_checkpoints
                checkpoints = stack.enter_context(Checkpointer(self.run_dir / CHECKPOINTS, keep=keep, best_metric=best))
                if start:
                    jax.tree.map(lambda leaf: leaf.delete(), self.state)  # room for what is restored
                    self.state, _ = checkpoints.restore(self.abstract_state, start)
            writer = stack.enter_context(
                MetricsWriter(
                    self.run_dir,
                    resume_step=start,
                    wandb=self.wandb,
                    run_config=self.description,
                    is_main_process=is_main_process(),
                )
            )
            report = stack.enter_context(
                Report(
                    self.config.steps,
                    start_step=start or 0,
                    title=self.title,
                    samples_every=self.config.samples_every,
                    enabled=is_main_process(),
                )
            )
            report.message(self._what_a_step_is)
            loop = Loop(self, checkpoints if self.config.checkpoint_every else None, writer, report, stop)
            loop.train()
        return TrainingResult(
            params=self.state.params,
            step=loop.step,
            first_evaluation=loop.evaluations[0] if loop.evaluations else {},
            last_evaluation=loop.evaluations[-1] if loop.evaluations else {},
            stopped=stop.reason if loop.step < self.config.steps else None,
        )


def _count(dataset: PromptDataset) -> str:
    dropped = f" ({dataset.dropped} too long were dropped)" if dataset.dropped else ""
    return f"{len(dataset)} prompts{dropped}"
