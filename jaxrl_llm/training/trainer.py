"""The trainer of on-policy algorithms: what a run is made of, checked and compiled once.

An iteration is two XLA programs with the reward functions between them; `jaxrl_llm.training.loop` runs them.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient import PolicyGradient
from jaxrl_llm.algorithms.update import UpdateConfig, abstract_train_state, make_train_state, make_update_step
from jaxrl_llm.data.loader import PromptLoader
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.models.lora import has_adapters
from jaxrl_llm.models.transformer import Params, Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import replicated, row_shards
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.episodes import score_rollout
from jaxrl_llm.training.evaluate import EvaluationConfig, Evaluator
from jaxrl_llm.training.frozen import check_frozen
from jaxrl_llm.training.loop import Outcome, Phase, RunLength, TrainingResult, run_stage
from jaxrl_llm.training.metrics import WandbConfig
from jaxrl_llm.training.resume import find_run
from jaxrl_llm.training.scoring import RewardSum
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


EVALUATION_KEY = np.uint32(0x5EED)
"""Keeps the noise of evaluations apart from that of training."""


class Trainer:
    """Trains a policy on rewards of its own samples; a `Stage` of `jaxrl_llm.training.loop`.

    Args:
        model: the policy.
        params: its parameters at the start, also the reference's where the algorithm has one (of parameters with
            adapters that is the base).
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
        self.what_a_step_is = (
            f"{_count(dataset)} to train on, {_count(eval_dataset) if eval_dataset else 'none'} held out. A step: "
            f"{prompts} prompts × {group} samples = {prompts * group} rows, {plan.optimizer_steps} optimizer step(s), "
            f"on {mesh.size} device(s)."
        )
        self._prepare_updates(params, algorithm, plan, optimizer, sampling, seed)
        self.compilations = CompilationCounter()
        self.phases = ("sample", "reward", "update")

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
            needed = algorithm.needs_reference and not has_adapters(params)  # without them, the policy is the base
            self.reference = jax.device_put(params, placed.params) if needed else None
        check_frozen(self.saved, self.state)
        every_step = np.arange(self.config.steps * plan.optimizer_steps)
        self._learning_rates = np.asarray(jax.jit(jax.vmap(schedule))(every_step))

    def learning_rate(self, step: int) -> float:
        """The rate of the last optimizer step of an iteration."""
        return float(self._learning_rates[step * self._optimizer_steps - 1])

    @property
    def length(self) -> RunLength:
        """How long the run is."""
        config = self.config
        return RunLength(
            config.steps,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            evaluate_every=self.evaluation.every,
            best_metric="eval/accuracy" if self.evaluator else None,
            samples_every=config.samples_every,
        )

    def run(self) -> TrainingResult:
        """Trains to the last step, or until SIGTERM or Ctrl-C; then saves and returns.

        Raises:
            RewardError: a reward function failed; the steps before are saved.
        """
        return run_stage(self)

    def iterate(self, step: int, phase: Phase) -> Outcome:
        """Samples, scores and updates."""
        with phase("sample"):
            batch, state = next(self.loader), self.state
            rollout = self.sampler(state.params, batch.tokens, batch.lengths, state.key, step)
            jax.block_until_ready(rollout)
        with phase("reward"):
            episodes = score_rollout(rollout, batch, self.rewards, self.tokenizer)
        with phase("update"), jax.set_mesh(self.mesh):
            self.state, metrics = self.update(state, rollout, episodes.rewards, self.reference)
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        remarks = [
            f"the reward function {name!r} returned None for all {episodes.rewards.size} samples, and has no part in "
            "their reward; can it read the gold answers in the data?"
            for name in episodes.without_effect()
        ]
        return Outcome(metrics | episodes.reward_metrics(), partial(episodes.samples, self.tokenizer), remarks)

    def evaluate(self, phase: Phase) -> Outcome:
        """Decodes the held-out prompts and scores them."""
        assert self.evaluator is not None  # evaluation.every says when, and is 0 without
        with phase("evaluate"):
            metrics, episodes = self.evaluator(self.state.params, np.asarray(self.state.key) ^ EVALUATION_KEY)
        return Outcome(metrics, partial(episodes.samples, self.tokenizer))


def _count(dataset: PromptDataset) -> str:
    dropped = f" ({dataset.dropped} too long were dropped)" if dataset.dropped else ""
    return f"{len(dataset)} prompts{dropped}"
