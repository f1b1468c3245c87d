"""The training loop of on-policy algorithms: sample, score, update; evaluate, log, checkpoint.

An iteration is two XLA programs with the reward functions between them. The next batch is sampled as soon as
the update is under way, and metrics are read while the device works, so that it waits for nothing but rewards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient import PolicyGradient
from jaxrl_llm.algorithms.update import UpdateConfig, make_train_state, make_update_step
from jaxrl_llm.data.loader import PromptLoader
from jaxrl_llm.data.prompts import PromptBatch, PromptDataset
from jaxrl_llm.models.transformer import Params, Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import parameter_shardings, replicated, row_shards, state_shardings
from jaxrl_llm.training.checkpoint import Checkpointer
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.distributed import any_process, is_main_process
from jaxrl_llm.training.episodes import Episodes, score_rollout
from jaxrl_llm.training.evaluate import EvaluationConfig, Evaluator
from jaxrl_llm.training.metrics import MetricsWriter, WandbConfig
from jaxrl_llm.training.report import Report
from jaxrl_llm.training.scoring import RewardSum
from jaxrl_llm.training.signals import GracefulStop
from jaxrl_llm.types import Rollout, TrainState

EVALUATION_KEY = np.uint32(0x5EED)
"""Keeps the noise of evaluations apart from that of training."""


class RecompilationWarning(UserWarning):
    """A program was compiled again after the first iteration."""


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
    """Metrics of the evaluation before the first step of this process; empty without evaluation."""
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
        description: JSON-able record of all settings that a resumed run must share.
        title: name of the run in the report.
        wandb: also log to Weights & Biases.

    Raises:
        ValueError: settings, data and mesh do not fit together; names what does not.
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
        evaluation, optimizer = evaluation or EvaluationConfig(), optimizer or OptimizerConfig()
        prompts, group = self.config.prompts_per_step, self.config.samples_per_prompt
        rewards.check_columns(dataset.column_names)
        whole = algorithm.needs_whole_groups
        plan.group_split(prompts, group, row_shards(mesh), whole_groups=whole)

        self.model, self.mesh, self.tokenizer, self.rewards = model, mesh, tokenizer, rewards
        self.run_dir, self.resume, self.title = Path(run_dir), resume, title
        self.description, self.wandb = description or {}, wandb
        self._optimizer_steps = plan.optimizer_steps
        self._schedule = make_schedule(optimizer, self.config.steps * plan.optimizer_steps)
        transformation = make_optimizer(optimizer, self._schedule)

        shardings = parameter_shardings(mesh, model.logical_axes(), model.abstract_params())
        abstract = jax.eval_shape(lambda p: make_train_state(p, transformation, seed), model.abstract_params())
        self._state_shardings = state_shardings(mesh, abstract, shardings)
        self.abstract_state: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self._state_shardings,
        )
        with jax.set_mesh(mesh):
            start = jax.jit(lambda p: make_train_state(p, transformation, seed), out_shardings=self._state_shardings)
            self.state: TrainState = start(params)
            copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)
            self.reference = copy(params) if algorithm.needs_reference else None

        self.sampler = Sampler(model, sampling, group=group, stop_tokens=stop_tokens, mesh=mesh)
        step = make_update_step(
            model, transformation, algorithm, plan, temperature=sampling.temperature, row_shards=row_shards(mesh)
        )
        self.update = jax.jit(step, donate_argnums=0, out_shardings=(self._state_shardings, replicated(mesh)))
        self.loader = PromptLoader(dataset, batch_size=prompts, seed=seed)
        self.evaluation = evaluation
        self.evaluator = None
        if evaluation.every and eval_dataset is None:
            raise ValueError(f"evaluation.every={evaluation.every}, but there is no held-out data")
        if evaluation.every and eval_dataset is not None:
            self.evaluator = Evaluator(
                model,
                eval_dataset,
                tokenizer,
                rewards,
                evaluation,
                sampling=sampling,
                stop_tokens=stop_tokens,
                mesh=mesh,
                rows=prompts * group,
            )
        self.compilations = CompilationCounter()

    # ---------------------------------------------------------------- the loop

    def run(self) -> TrainingResult:
        """Trains to the last step, or until SIGTERM or Ctrl-C, then saves and returns."""
        best = "eval/accuracy" if self.evaluator else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.compilations)
            checkpoints = None
            if self.config.checkpoint_every:
                checkpoints = stack.enter_context(
                    Checkpointer(self.run_dir / "checkpoints", keep=self.config.keep_checkpoints, best_metric=best)
                )
            start = self._restore(checkpoints)
            writer = stack.enter_context(
                MetricsWriter(
                    self.run_dir,
                    resume_step=start or None,
                    wandb=self.wandb,
                    run_config=self.description,
                    is_main_process=is_main_process(),
                )
            )
            report = stack.enter_context(
                Report(
                    self.config.steps,
                    start_step=start,
                    title=self.title,
                    samples_every=self.config.samples_every,
                    enabled=is_main_process(),
                )
            )
            stop = stack.enter_context(GracefulStop())
            return _Run(self, checkpoints, writer, report, stop, start).train()

    def _restore(self, checkpoints: Checkpointer | None) -> int:
        """Takes up the latest checkpoint where asked to; the number of steps done."""
        latest = None if checkpoints is None else checkpoints.latest_step()
        if checkpoints is None or latest is None:
            return 0
        if not self.resume:
            raise ValueError(
                f"{self.run_dir} holds a run with a checkpoint of step {latest}; "
                "resume it with --resume, or give another --run-dir"
            )
        extra = checkpoints.read_extra(latest)
        differing = sorted(
            f"{name} was {extra['settings'].get(name)!r} and is {self.description.get(name)!r}"
            for name in extra["settings"].keys() | self.description.keys()
            if extra["settings"].get(name) != self.description.get(name)
        )
        if differing:
            raise ValueError(f"cannot resume {self.run_dir} with other settings: " + "; ".join(differing))
        self.state, extra = checkpoints.restore(self.abstract_state, latest)
        self.loader.set_state(extra["data"])
        return latest


class _Run:
    """One pass of the loop: what exists between the start of a process and its end."""

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpointer | None,
        writer: MetricsWriter,
        report: Report,
        stop: GracefulStop,
        start: int,
    ):
        self.trainer, self.checkpoints, self.writer = trainer, checkpoints, writer
        self.report, self.stop, self.start, self.step = report, stop, start, start
        self.key = np.asarray(trainer.state.key)
        self.data_state = trainer.loader.get_state()
        self.evaluations: list[dict[str, float]] = []
        self.seconds: dict[str, float] = {}

    def train(self) -> TrainingResult:
        trainer, last = self.trainer, self.trainer.config.steps
        if self.start == 0:
            self._evaluate(0)
        flight = self._sample(self.start + 1) if self.start < last else None
        mark = None
        began = time.perf_counter()
        while flight is not None and self.step < last:
            number = self.step + 1
            batch, rollout = flight
            with self._phase("sample"):
                jax.block_until_ready(rollout)
            with self._phase("reward"):
                episodes = score_rollout(rollout, batch, trainer.rewards, trainer.tokenizer)
            with self._phase("update"):
                trainer.state, metrics = self._update(rollout, episodes)
                self.step, self.data_state = number, trainer.loader.get_state()
                flight = self._sample(number + 1) if number < last else None
                metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            now = time.perf_counter()
            self._log(number, metrics, episodes, now - began)
            began = now
            stopping = any_process(self.stop.requested)
            evaluated = self._evaluate(number) if self._due(number, trainer.evaluation.every) else None
            if stopping or self._due(number, trainer.config.checkpoint_every):
                self._save(evaluated)
            if mark is not None:
                self._warn_of_recompilation(number, mark)
            mark = trainer.compilations.mark()
            if stopping:
                self.report.message(f"Stopped after step {number}: {self.stop.reason}.")
                break
            began += time.perf_counter() - now  # evaluations and checkpoints are no part of a step's time
        return TrainingResult(
            params=trainer.state.params,
            step=self.step,
            first_evaluation=self.evaluations[0] if self.evaluations else {},
            last_evaluation=self.evaluations[-1] if self.evaluations else {},
            stopped=self.stop.reason if self.step < last else None,
        )

    def _due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.trainer.config.steps)

    def _sample(self, number: int) -> tuple[PromptBatch, Rollout]:
        """Starts to sample the batch of a step."""
        batch = next(self.trainer.loader)
        state = self.trainer.state
        return batch, self.trainer.sampler(state.params, batch.tokens, batch.lengths, state.key, number)

    def _update(self, rollout: Rollout, episodes: Episodes) -> tuple[TrainState, dict[str, jax.Array]]:
        trainer = self.trainer
        with jax.set_mesh(trainer.mesh):
            return trainer.update(trainer.state, rollout, episodes.rewards, trainer.reference)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.report.phase(name)
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def _log(self, step: int, metrics: dict[str, float], episodes: Episodes, seconds: float) -> None:
        metrics |= episodes.reward_metrics()
        metrics["learning_rate"] = float(self.trainer._schedule(step * self.trainer._optimizer_steps - 1))
        metrics["step_time"] = seconds
        metrics["perf/tokens_per_second"] = metrics["num_tokens"] / seconds
        metrics |= {f"perf/{name}_seconds": spent for name, spent in self.seconds.items()}
        self.writer.write(step, metrics)
        self.report.log(step, metrics)
        if self.report.wants_samples(step):
            self.report.samples(step, episodes.samples(self.trainer.tokenizer, 4))

    def _evaluate(self, step: int) -> dict[str, float] | None:
        if self.trainer.evaluator is None:
            return None
        self.report.phase("evaluate")
        metrics, shown = self.trainer.evaluator(self.trainer.state.params, self.key ^ EVALUATION_KEY)
        self.evaluations.append(metrics)
        self.writer.write(step, metrics)
        self.report.log(step, metrics)
        if self.report.wants_samples(step):
            self.report.samples(step, shown)
        return metrics

    def _save(self, evaluated: dict[str, float] | None) -> None:
        if self.checkpoints is None:
            return
        self.report.phase("checkpoint")
        self.writer.flush()
        extra = {"data": self.data_state, "settings": self.trainer.description}
        self.checkpoints.save(self.step, self.trainer.state, extra, evaluated)

    def _warn_of_recompilation(self, step: int, mark: int) -> None:
        again = self.trainer.compilations.since(mark)
        if again:
            names = ", ".join(f"{name} ({count}×)" for name, count in again.items())
            text = f"compiled again in step {step}: {names}; a shape or a static argument changed"
            self.report.message(f"Warning: {text}.")
            warnings.warn(text, RecompilationWarning, stacklevel=2)
