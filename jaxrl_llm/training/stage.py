"""What a run consists of, whatever it trains on: what a stage gives to the loop, and what is left at the end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from jaxrl_llm.models.config import Params
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.run.completions import CompletionsConfig, Rows
from jaxrl_llm.training.run.report import SampledCompletion
from jaxrl_llm.training.run.resume import SavedRun
from jaxrl_llm.training.run.setup import RunSetup
from jaxrl_llm.types import TrainState

Phase = Callable[[str], contextlib.AbstractContextManager[None]]
"""Names and times what is done inside a `with` block."""


@dataclasses.dataclass(frozen=True)
class RunLength:
    """How long a run is, and what it keeps."""

    steps: int
    """The last step."""
    checkpoint_every: int
    """Steps between checkpoints; 0: none at all."""
    keep_checkpoints: int
    """Latest checkpoints that are kept, beside the best one."""
    evaluate_every: int
    """Steps between evaluations; 0: none."""
    best_metric: str | None
    """Metric of an evaluation by which the best checkpoint is kept, too."""
    best_mode: str = "max"
    """Which of its values is best: "max" or "min"."""
    samples_every: int = 0
    """Steps between printed completions where there is no terminal; 0: never."""
    max_skipped_steps: int = 10
    """Steps in a row without a finite gradient that end the run; 0: any number may have none."""
    completions: CompletionsConfig = CompletionsConfig(every=0)
    """Which completions are written, and how."""


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run leaves behind."""

    params: Params
    """The model's parameters after the last step."""
    step: int
    """Steps done."""
    first_evaluation: dict[str, float]
    """Metrics of the evaluation before the first step; empty without evaluation."""
    last_evaluation: dict[str, float]
    """Metrics of the last evaluation."""
    stopped: str | None
    """Why it ended early, or `None`."""


class Outcome(NamedTuple):
    """What an iteration or an evaluation leaves to be written and shown."""

    metrics: dict[str, float]
    """By name."""
    samples: Callable[[int], Sequence[SampledCompletion]] | None = None
    """Some completions, at most so many, if any were sampled."""
    remarks: Sequence[str] = ()
    """What to say of it."""
    completions: Rows | None = None
    """Rows of those that are to be written, if any are."""


class Data(Protocol):
    """Batches in an order that can be saved."""

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position that `get_state` returned."""
        ...


class Stage(Protocol):
    """What a loop drives: programs, data, and a state that is replaced step by step.

    Each phase of `iterate` and `evaluate` ends when the device has done its work, so that its seconds are true.
    """

    setup: RunSetup
    saved: SavedRun | None
    abstract_state: TrainState
    state: TrainState
    reference: Params | None
    compilations: CompilationCounter

    @property
    def length(self) -> RunLength:
        """How long the run is."""
        ...

    @property
    def loader(self) -> Data:
        """Where it is in its data."""
        ...

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of an iteration."""
        ...

    @property
    def what_a_step_is(self) -> str:
        """A sentence for the start of the run."""
        ...

    def learning_rate(self, step: int) -> float:
        """The rate of the last optimizer step of an iteration."""
        ...

    def iterate(self, step: int, phase: Phase) -> Outcome:
        """Makes step number `step`, in `phases`; `num_tokens` and `frac_steps_skipped` are among its metrics."""
        ...

    def evaluate(self, phase: Phase) -> Outcome:
        """Metrics named `eval/…`, in the phase "evaluate"; called if `length.evaluate_every` is not 0."""
        ...
