"""The iterations of a run, whatever it trains on: step; log, evaluate, checkpoint; stop and go on."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator

import jax

from jaxrl_llm.training.run.checkpoint import Checkpointer, Prepared
from jaxrl_llm.training.run.compiling import CompilationNews
from jaxrl_llm.training.run.completions import CompletionsWriter
from jaxrl_llm.training.run.distributed import any_processes, at, ending_with_the_others, is_main_process, notices
from jaxrl_llm.training.run.divergence import FEW, DivergedError, SkippedSteps
from jaxrl_llm.training.run.errors import RunError
from jaxrl_llm.training.run.frozen import fingerprint, join_state, split_state, unsaved
from jaxrl_llm.training.run.machine import machine_remark
from jaxrl_llm.training.run.memory import naming_phase
from jaxrl_llm.training.run.metrics import MetricsWriter
from jaxrl_llm.training.run.page.live import LivePage
from jaxrl_llm.training.run.report import Report
from jaxrl_llm.training.run.rescue import ANOTHER, Rescue
from jaxrl_llm.training.run.resume import CHECKPOINTS, SavedRun, restore_run
from jaxrl_llm.training.run.stop import GracefulStop
from jaxrl_llm.training.stage import Outcome, Stage, TrainingResult


class RecompilationWarning(UserWarning):
    """A program was compiled again after the first iteration."""


class _StopNow(Exception):
    """A step is left undone, between two of its phases."""


def run_stage(stage: Stage) -> TrainingResult:
    """Trains to the last step, or until the end of the phase in which SIGTERM or Ctrl-C comes; then saves and returns.

    Raises:
        RunError: it cannot go on, a reward function failed for instance; the steps before are saved.
    """
    setup, length, start = stage.setup, stage.length, stage.saved.step if stage.saved else None
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(GracefulStop())  # outermost, so that it also guards the last write
        stack.enter_context(stage.compilations)
        checkpoints, remarks = None, []
        if length.checkpoint_every or start:
            checkpoints = Checkpointer(
                setup.folder / CHECKPOINTS,
                keep=length.keep_checkpoints,
                best_metric=length.best_metric,
                best_mode=length.best_mode,
            )
            stack.enter_context(checkpoints)
            if start and stage.saved:
                begun, frozen = split_state(stage.state)
                for leaf in jax.tree.leaves(begun):  # room for what is restored
                    leaf.delete()
                found, restored, remarks = restore_run(checkpoints, stage.saved, split_state(stage.abstract_state)[0])
                if found.step != start:
                    start, stage.saved = found.step, found
                    stage.loader.set_state(found.data)
                stage.state = join_state(restored, frozen)
        page = stack.enter_context(
            LivePage(setup.folder, setup.defaults, lambda text: report.message(text), enabled=is_main_process())
        )
        writer = stack.enter_context(
            MetricsWriter(
                setup.folder,
                resume_step=start,
                wandb=setup.wandb,
                run_config=setup.settings,
                is_main_process=is_main_process(),
            )
        )
        completions = stack.enter_context(
            CompletionsWriter(setup.folder, length.completions, resume_step=start, is_main_process=is_main_process())
        )
        report = stack.enter_context(
            Report(
                length.steps,
                start_step=start or 0,
                title=setup.title,
                samples_every=length.samples_every,
                enabled=is_main_process(),
            )
        )
        page.begin()
        for remark in remarks:
            report.message(remark)
        report.message(stage.what_a_step_is)
        if (remark := machine_remark(setup.mesh)) is not None:
            report.message(remark)
        news = stack.enter_context(CompilationNews(report, stage.compilations, setup.settings))
        loop = Loop(stage, checkpoints if length.checkpoint_every else None, (writer, completions), report, news, stop)
        with ending_with_the_others():
            loop.train()
    return TrainingResult(
        params=stage.state.params,
        step=loop.step,
        first_evaluation=loop.evaluations[0] if loop.evaluations else {},
        last_evaluation=loop.evaluations[-1] if loop.evaluations else {},
        stopped=stop.reason if loop.step < length.steps else None,
    )


class Loop:
    """What exists between the start of a process and its end.

    What the host does between phases (logging) takes milliseconds.

    Args:
        stage: programs, data and state.
        checkpoints: where to save, or `None`.
        writers: of metrics and of completions.
        report: of progress.
        news: of compilations.
        stop: asks for an early end.
    """

    def __init__(
        self,
        stage: Stage,
        checkpoints: Checkpointer | None,
        writers: tuple[MetricsWriter, CompletionsWriter],
        report: Report,
        news: CompilationNews,
        stop: GracefulStop,
    ):
        self.stage, self.length, self.checkpoints = stage, stage.length, checkpoints
        (self.writer, self.completions), self.report, self.news, self.stop = writers, report, news, stop
        self.step = stage.saved.step if stage.saved else 0
        self.evaluations = stage.saved.evaluations if stage.saved else []
        self._data_state = stage.loader.get_state()
        self._place, self._seconds = "the start", dict[str, float]()
        self._skipped, self._unsaved = SkippedSteps(stage.length.max_skipped_steps), False
        self._rescue = Rescue(stop, stage.setup.grace_period, self._save_kept, notices(), report.close)
        self._kept: tuple[int, Prepared | None] = (self.step, None)
        self._evaluated: tuple[int, dict[str, float] | None] = (self.step, None)
        self._frozen = stage.saved.frozen if stage.saved else fingerprint(unsaved(stage.state, stage.reference))

    def train(self) -> None:
        """Iterates until the last step or until `stop`; then all is saved.

        Raises:
            RunError: it cannot go on, a reward function failed for instance; the steps before are saved.
            DivergedError: it must not go on; they are not.
        """
        try:
            with self._rescue:
                stopped = self._iterations()
            if stopped and self._skipped.suspicious:
                raise DivergedError(str(self._skipped))
        except DivergedError as error:
            raise DivergedError(f"after step {self.step} {error}: {self._after_divergence()}") from error
        except RunError:
            gone = any(
                leaf.is_deleted() for leaf in jax.tree.leaves(self.stage.state)
            )  # given to an update that failed
            if self.step > 0 and not gone:
                self._save()
                self._say_how_to_resume("Failed", self.step)
            raise
        if stopped:
            self._say_how_to_resume("Stopped", self.step, self.stop.reason)

    def _iterations(self) -> bool:
        """Whether it was stopped before the last step."""
        last, self._rescue.ready = self.length.steps, self.checkpoints is not None
        if self.step == 0 and self.length.evaluate_every:
            self._evaluate()
        stopping, began = self.step < last and self._agree()[0], time.perf_counter()
        while self.step < last and not stopping:
            try:
                outcome = self._iterate()
            except _StopNow:
                self._save()  # the state is still that of the step before
                return True
            ended = time.perf_counter()
            self._log(outcome, ended - began)
            logged = time.perf_counter()
            if self._due(self.length.evaluate_every):
                self._evaluate()
            stopping, slow = self._agree() if self.step < last else (False, False)
            self._unsaved |= stopping or self._due(self.length.checkpoint_every)
            # What may be good waits for a step that shows it: a checkpoint too many displaces one that is.
            if self._unsaved and (not self._skipped.in_a_row or stopping or self.step == last):
                self._save()
            self._keep_for_a_cut(slow)
            began = ended + time.perf_counter() - logged  # evaluations and checkpoints are no part of a step
        return stopping

    def _agree(self) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether phases may have to be cut; equal on all."""
        slow = max(self._seconds.values(), default=0.0) > self._rescue.patience
        with self._rescue.agreement():
            asked, slow = any_processes([self.stop.requested, slow], f"the decision after {self._place}")
        if asked:
            self.stop.request(ANOTHER)  # kept where this one was not
        return asked, slow

    def _iterate(self) -> Outcome:
        """One step; the state, the position in the data and `step` change together, at its end."""
        outcome = self.stage.iterate(self.step + 1, self._phase)
        self.step, self._data_state = self.step + 1, self.stage.loader.get_state()
        return outcome

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Times a phase, and warns of programs that it compiles when it is not its first time.

        Raises:
            _StopNow: the run is to stop, and the step has further phases.
        """
        self.report.phase(name)
        self.news.place = name
        counter = self.stage.compilations
        began, mark = time.perf_counter(), counter.mark()
        self._place = f"{name} of step {self.step + (name in self.stage.phases)}"
        cut = self._rescue.phase() if name != "checkpoint" else contextlib.nullcontext()
        with naming_phase(name), at(self._place), cut:
            yield
        first = name not in self._seconds
        self._seconds[name] = time.perf_counter() - began
        if (again := counter.since(mark)) and not first:
            programs = ", ".join(f"{program} ({count}×)" for program, count in again.items())
            text = f"compiled again after step {self.step} ({name}): {programs}; a shape or a static argument changed"
            warnings.warn(text, RecompilationWarning, stacklevel=3)
        if name in self.stage.phases[:-1] and self._agree()[0]:
            raise _StopNow

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.length.steps)

    def _log(self, outcome: Outcome, seconds: float) -> None:
        metrics = outcome.metrics
        metrics["learning_rate"] = self.stage.learning_rate(self.step)
        metrics["step_time"] = seconds
        metrics["perf/tokens_per_second"] = metrics["num_tokens"] / seconds
        metrics |= {f"perf/{name}_seconds": self._seconds[name] for name in self.stage.phases}
        self.writer.write(self.step, metrics)
        self.report.log(self.step, metrics)
        for remark in outcome.remarks:
            self.report.message(f"step {self.step}: {remark}")
        if skipped := metrics["frac_steps_skipped"]:
            part = "its update was skipped" if skipped == 1 else f"{skipped:.0%} of its updates were skipped"
            self.report.message(f"step {self.step}: the gradient is not finite, {part}")
        self._show(outcome, 4)
        self._keep(outcome)
        self._check_skipped(skipped)

    def _check_skipped(self, share: float) -> None:
        """Says after a few skipped steps, and raises after many, that the run diverges."""
        self._skipped.count(share)
        if self._skipped.diverged(ending=self.step == self.length.steps):
            raise DivergedError(str(self._skipped))
        if self._skipped.in_a_row == FEW:
            end = f"training.max_skipped_steps={self.length.max_skipped_steps} ends the run"
            self.report.message(f"step {self.step}: {self._skipped}; {end}. Or {self._after_divergence()}")

    def _after_divergence(self) -> str:
        saved = self.checkpoints.all_steps() if self.checkpoints is not None else []
        good = self._skipped.good_checkpoint(self.step, saved)
        return f"lower optimizer.learning_rate; {good}"

    def _evaluate(self) -> None:
        outcome = self.stage.evaluate(self._phase)
        self.evaluations = [*self.evaluations[:1], outcome.metrics]
        metrics = outcome.metrics | {"perf/evaluate_seconds": self._seconds["evaluate"]}
        self.writer.write(self.step, metrics)
        self.report.log(self.step, metrics)
        self._show(outcome, 3)
        self._keep(outcome)
        self._evaluated = self.step, metrics

    def _evaluation(self, step: int) -> dict[str, float] | None:
        """Of the state after this step, if it is the latest."""
        return self._evaluated[1] if self._evaluated[0] == step else None

    def _show(self, outcome: Outcome, count: int) -> None:
        if outcome.samples is not None and self.report.wants_samples(self.step):
            self.report.samples(self.step, outcome.samples(count))

    def _keep(self, outcome: Outcome) -> None:
        """Completions are written in the background; some of them are shown beside the metrics, too."""
        if outcome.completions is None:
            return
        self.completions.write(self.step, outcome.completions)
        if self._due(self.length.samples_every):
            self.writer.show(self.step, list(outcome.completions()))

    def _save(self) -> None:
        self._unsaved = False
        if self.checkpoints is None or self._skipped.suspicious or self.step == 0:
            return
        with self._phase("checkpoint"):
            self.checkpoints.write(self._prepared(self.checkpoints), self._evaluation(self.step))

    def _prepared(self, checkpoints: Checkpointer, *, aside: bool = False) -> Prepared:
        run = SavedRun(self.step, self._data_state, self.evaluations, self.stage.setup.settings, self._frozen)
        self.writer.flush()
        self.completions.flush()
        return checkpoints.prepare(self.step, split_state(self.stage.state)[0], run.extra(), aside=aside)

    def _keep_for_a_cut(self, slow: bool) -> None:
        """Makes ready what is saved if the next step is cut: what is on disk, or, where phases are slow, a copy."""
        self._kept = (0, None)  # the one before, first
        if self.checkpoints is None:
            return
        if self.checkpoints.current_step == self.step:
            self._kept, self._rescue.ready = (self.step, None), True
        elif slow and not self._skipped.suspicious:
            self._kept, self._rescue.ready = (self.step, self._prepared(self.checkpoints, aside=True)), True
        else:
            self._rescue.ready = False

    def _save_kept(self) -> None:
        """In another thread, while this one is held in a phase."""
        step, prepared = self._kept
        assert self.checkpoints is not None
        if prepared is not None:
            self.checkpoints.write(prepared, self._evaluation(step))
        self.checkpoints.wait()
        why = f"{self.stop.reason}, in the middle of the phase {self.news.place!r}"
        # All is saved: what else goes wrong, of any kind, no longer counts.
        with contextlib.suppress(Exception):
            self._say_how_to_resume("Stopped", step, why)
            self.report.close()
        with contextlib.suppress(Exception):
            self.writer.close()  # so that Weights & Biases does not take the run for crashed

    def _say_how_to_resume(self, what: str, step: int, why: str | None = None) -> None:
        what = f"{what} after step {step}" + (f" ({why})" if why else "")
        if self.checkpoints is None:
            self.report.message(f"{what}; nothing was saved, since training.checkpoint_every is 0.")
            return
        folder = self.stage.setup.folder
        if step == 0:
            self.report.message(
                f"Stopped before the first step, with nothing to save. Begin again with --resume --run-dir={folder}"
            )
            return
        self.checkpoints.wait()
        self.report.message(f"{what} and saved. Go on with the same command and --resume --run-dir={folder}")
