"""The iterations of a run: sample, score, update; log, evaluate, checkpoint."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxrl_llm.training.checkpoint import Checkpointer
from jaxrl_llm.training.distributed import any_process
from jaxrl_llm.training.episodes import Episodes, RewardError, score_rollout
from jaxrl_llm.training.metrics import MetricsWriter
from jaxrl_llm.training.report import Report
from jaxrl_llm.training.resume import SavedRun
from jaxrl_llm.training.signals import GracefulStop

if TYPE_CHECKING:
    from jaxrl_llm.training.trainer import Trainer

EVALUATION_KEY = np.uint32(0x5EED)
"""Keeps the noise of evaluations apart from that of training."""


class RecompilationWarning(UserWarning):
    """A program was compiled again after the first iteration."""


class Loop:
    """What exists between the start of a process and its end.

    Each phase ends when the device has done its work, so that its seconds are true; what the host does in
    between (logging) takes milliseconds.

    Args:
        trainer: programs, data and state; the state is replaced step by step.
        checkpoints: where to save, or `None`.
        writer: of metrics.
        report: of progress.
        stop: asks for an early end.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpointer | None,
        writer: MetricsWriter,
        report: Report,
        stop: GracefulStop,
    ):
        self.trainer, self.checkpoints, self.writer = trainer, checkpoints, writer
        self.report, self.stop = report, stop
        self.step = trainer.saved.step if trainer.saved else 0
        self.evaluations = trainer.saved.evaluations if trainer.saved else []
        self._key = np.asarray(trainer.state.key)
        self._data_state = trainer.loader.get_state()
        self._seconds: dict[str, float] = {}

    def train(self) -> None:
        """Iterates until the last step or until `stop`; then all is saved.

        Raises:
            RewardError: a reward function failed; the steps before are saved.
        """
        try:
            stopped = self._iterations()
        except RewardError:
            if self.step > 0:
                self._save(None)
                self._say_how_to_resume(f"Failed after step {self.step}")
            raise
        if stopped:
            self._say_how_to_resume(f"Stopped after step {self.step} ({self.stop.reason})")

    def _iterations(self) -> bool:
        """Whether it was stopped before the last step."""
        last = self.trainer.config.steps
        if self.step == 0:
            self._evaluate()
        start, stopping, began = self.step, False, time.perf_counter()
        while self.step < last and not stopping:
            metrics, episodes = self._iterate()
            ended = time.perf_counter()
            self._log(metrics, episodes, ended - began, first=self.step == start + 1)
            logged = time.perf_counter()
            evaluation = self._evaluate() if self._due(self.trainer.evaluation.every) else None
            stopping = self.step < last and any_process(self.stop.requested)
            if stopping:
                self.stop.request("another process was stopped")  # kept where this one was not
            if stopping or self._due(self.trainer.config.checkpoint_every):
                self._save(evaluation)
            began = ended + time.perf_counter() - logged  # evaluations and checkpoints are no part of a step
        return stopping

    def _iterate(self) -> tuple[dict[str, float], Episodes]:
        """One step; the state, the position in the data and `step` change together, at its end."""
        trainer = self.trainer
        with self._phase("sample"):
            batch, state = next(trainer.loader), trainer.state
            rollout = trainer.sampler(state.params, batch.tokens, batch.lengths, state.key, self.step + 1)
            jax.block_until_ready(rollout)
        with self._phase("reward"):
            episodes = score_rollout(rollout, batch, trainer.rewards, trainer.tokenizer)
        with self._phase("update"), jax.set_mesh(trainer.mesh):
            trainer.state, metrics = trainer.update(state, rollout, episodes.rewards, trainer.reference)
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.step, self._data_state = self.step + 1, trainer.loader.get_state()
        return metrics, episodes

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Times a phase, and warns of programs that it compiles when it is not its first time."""
        self.report.phase(name)
        counter = self.trainer.compilations
        began, mark = time.perf_counter(), counter.mark()
        yield
        first = name not in self._seconds
        self._seconds[name] = time.perf_counter() - began
        if (again := counter.since(mark)) and not first:
            programs = ", ".join(f"{program} ({count}×)" for program, count in again.items())
            text = f"compiled again after step {self.step} ({name}): {programs}; a shape or a static argument changed"
            warnings.warn(text, RecompilationWarning, stacklevel=3)

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.trainer.config.steps)

    def _log(self, metrics: dict[str, float], episodes: Episodes, seconds: float, *, first: bool) -> None:
        metrics |= episodes.reward_metrics()
        metrics["learning_rate"] = self.trainer.learning_rate(self.step)
        metrics["step_time"] = seconds
        metrics["perf/tokens_per_second"] = metrics["num_tokens"] / seconds
        metrics |= {f"perf/{name}_seconds": self._seconds[name] for name in ("sample", "reward", "update")}
        self.writer.write(self.step, metrics)
        self.report.log(self.step, metrics)
        if first:
            for name in episodes.without_effect():
                self.report.message(
                    f"step {self.step}: the reward function {name!r} returned None for all {episodes.rewards.size} "
                    "samples, and has no part in their reward; can it read the gold answers in the data?"
                )
        if skipped := metrics["frac_steps_skipped"]:
            part = "its update was skipped" if skipped == 1 else f"{skipped:.0%} of its updates were skipped"
            self.report.message(f"step {self.step}: the gradient is not finite, {part}")
        if self.report.wants_samples(self.step):
            self.report.samples(self.step, episodes.samples(self.trainer.tokenizer, 4))

    def _evaluate(self) -> dict[str, float] | None:
        if self.trainer.evaluator is None:
            return None
        with self._phase("evaluate"):
            metrics, episodes = self.trainer.evaluator(self.trainer.state.params, self._key ^ EVALUATION_KEY)
        self.evaluations = [*self.evaluations[:1], metrics]
        metrics = metrics | {"perf/evaluate_seconds": self._seconds["evaluate"]}
        self.writer.write(self.step, metrics)
        self.report.log(self.step, metrics)
        if self.report.wants_samples(self.step):
            self.report.samples(self.step, episodes.samples(self.trainer.tokenizer, 3))
        return metrics

    def _save(self, evaluation: dict[str, float] | None) -> None:
        if self.checkpoints is None:
            return
        run = SavedRun(self.step, self._data_state, self.evaluations, self.trainer.description)
        with self._phase("checkpoint"):
            self.writer.flush()
            self.checkpoints.save(self.step, self.trainer.state, run.extra(), evaluation)

    def _say_how_to_resume(self, what: str) -> None:
        if self.checkpoints is None:
            self.report.message(f"{what}; nothing was saved, since training.checkpoint_every is 0.")
            return
        self.checkpoints.wait()
        folder = self.trainer.run_dir
        self.report.message(f"{what} and saved. Go on with the same command and --resume --run-dir={folder}")
