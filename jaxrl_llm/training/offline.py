"""The trainer of everything that samples nothing: supervised fine-tuning, reward models, preference optimisation.

A step is one XLA program on rows of a data set; `jaxrl_llm.training.loop` runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.offline import Objective, make_offline_evaluation, make_offline_step, make_reference_pass
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, Rates, make_optimizer, make_schedule
from jaxrl_llm.algorithms.router import check_has_experts
from jaxrl_llm.algorithms.state import abstract_train_state, make_train_state
from jaxrl_llm.algorithms.supervised import SupervisedObjective
from jaxrl_llm.checks import check_fields, count
from jaxrl_llm.data.encoded_rows import counted
from jaxrl_llm.data.rows import RowDataset, RowLoader, ServedRows, batches_in_order
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import start_reference
from jaxrl_llm.models.unrolling import compiler_options
from jaxrl_llm.records import Metrics
from jaxrl_llm.sharding import replicated, row_shards
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.loop import run_stage
from jaxrl_llm.training.run.frozen import check_frozen
from jaxrl_llm.training.run.memory import bytes_of, check_memory
from jaxrl_llm.training.run.setup import RunSetup
from jaxrl_llm.training.stage import Outcome, Phase, RunLength, TrainingResult
from jaxrl_llm.training.texts import how_texts_are_read
from jaxrl_llm.types import TrainState


@dataclasses.dataclass(frozen=True)
class OfflineTrainingConfig:
    """The length of a run and the size of a step."""

    steps: int = 100
    """Optimizer steps: one batch of rows each."""
    rows_per_step: int = 32
    """Prompts of a batch, each with its completions."""
    checkpoint_every: int = 50
    """Steps between checkpoints; one more comes at the end. 0: none at all."""
    keep_checkpoints: int = 3
    """Latest checkpoints that are kept, beside the best one."""
    max_skipped_steps: int = 10
    """Steps in a row without a finite gradient that end the run: it diverged. 0: any number may have none."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant."""
        least = {"steps": 1, "rows_per_step": 1, "keep_checkpoints": 1, "checkpoint_every": 0, "max_skipped_steps": 0}
        check_fields("training", self, **{name: count(getattr(self, name), least=n) for name, n in least.items()})


@dataclasses.dataclass(frozen=True)
class OfflineUpdateConfig(MicroBatches):
    """How a step is computed; changes memory and time, not the result."""

    reference: Literal["in_step", "ahead"] = "in_step"
    """Where an objective's reference is computed: in each step, with its parameters kept on the devices, or once for
    all rows ahead of training, with its log-probs kept in the host's memory and its parameters freed."""

    def __post_init__(self) -> None:
        """Rejects what there is not."""
        super().__post_init__()
        if self.reference not in ("in_step", "ahead"):
            raise ValueError(f"update.reference={self.reference!r} is neither 'in_step' nor 'ahead'")


@dataclasses.dataclass(frozen=True)
class OfflineEvaluationConfig:
    """When held-out rows are evaluated, and what the best checkpoint is."""

    every: int = 0
    """Steps between evaluations; one more comes before the first step and one after the last. 0: none."""
    max_rows: int | None = None
    """Use the first rows only."""
    batch_size: int | None = None
    """Rows computed at a time, with their padding; `None`: as many as in a step's micro-batch."""
    best_metric: str = "eval/loss"
    """The metric by which the best checkpoint is kept."""
    best_mode: Literal["min", "max"] = "min"
    """Whether its least or its greatest value is best."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant."""
        least = {"every": 0, "max_rows": 1, "batch_size": 1}
        check_fields("evaluation", self, **{name: count(getattr(self, name), least=n) for name, n in least.items()})
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"evaluation.best_mode={self.best_mode!r} is neither 'min' nor 'max'")


class OfflineTrainer:
    """Trains a model on rows of a data set; a `Stage` of `jaxrl_llm.training.loop`.

    `training`, `update`, `optimizer` and `evaluation` are records that describe themselves.

    Args:
        model: what the objective computes with: a `Transformer`, a `ScoreModel`.
        params: its parameters at the start, also the reference's where the objective has one.
        objective: what it is trained towards.
        dataset: rows to train on.
        eval_dataset: held-out rows, or `None`.
        setup: mesh, folder, seed (of the order of rows) and name of the run.

    Raises:
        ValueError: settings, data, model and mesh do not fit together, or the folder holds another run; names what is
            wrong, before anything is compiled.
    """

    def __init__(
        self,
        *,
        model: Any,
        params: Params,
        objective: Objective,
        dataset: RowDataset,
        setup: RunSetup,
        eval_dataset: RowDataset | None = None,
        training: OfflineTrainingConfig | None = None,
        update: OfflineUpdateConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        evaluation: OfflineEvaluationConfig | None = None,
    ):
        self.config, self.evaluation = training or OfflineTrainingConfig(), evaluation or OfflineEvaluationConfig()
        self.plan, optimizer = update or OfflineUpdateConfig(), optimizer or OptimizerConfig()
        self.model, self.objective, self.setup = model, objective, setup
        self.dataset, self.eval_dataset = dataset, eval_dataset if self.evaluation.every else None

        # All that can be wrong is found before anything is compiled.
        if isinstance(objective, SupervisedObjective) and objective.router is not None:
            check_has_experts(model, f"objective.router={objective.router}")
        self.saved = setup.find()
        if self.evaluation.every and eval_dataset is None:
            raise ValueError(f"evaluation.every={self.evaluation.every}, but there are no held-out rows")
        self._check(dataset, "training rows")
        if self.eval_dataset is not None:
            self._check(self.eval_dataset, "held-out rows")
        first = dataset.batch([0])
        rows, shape = self.config.rows_per_step, first.mask.shape
        self.plan.check_unpacked(first)
        self.plan.group_split(rows, shape[1], row_shards(setup.mesh), whole_groups=objective.whole_groups)
        self.loader = RowLoader(dataset, batch_size=rows, seed=setup.seed)
        if self.saved:
            self.loader.set_state(self.saved.data)
        self.what_a_step_is = (
            f"{counted(dataset, 'rows')} to train on, {counted(eval_dataset, 'rows')} held out. A step: "
            f"{rows} rows of {shape[1]} completion(s), on {setup.mesh.size} device(s); {self.config.steps} steps are "
            f"{self.config.steps * rows / len(dataset):.3g} epochs."
        ) + how_texts_are_read(model.config, self.plan, first.prompt.shape[1], shape[2])
        self.phases = ("data", "update")
        self._prepare(params, optimizer)
        self.compilations = CompilationCounter()

    def _check(self, dataset: RowDataset, what: str) -> None:
        """Checks every row against the model.

        Raises:
            ValueError: a token or a position that the model does not have, or fields that the objective misses.
        """
        vocabulary, positions = self.model.config.vocab_size, self.model.config.longest_text
        way = self.model.config.way_to_longer
        for served in batches_in_order(dataset, batch_size=min(1024, len(dataset))):
            rows = served.rows
            if self.objective.needs_reference and not hasattr(rows, "ref_logprobs"):
                fields = ", ".join(rows._fields)
                raise ValueError(f"{what}: the objective reads ref_logprobs, but rows have {fields}")
            used, lengths = _used(rows.mask), _completion_lengths(rows.mask)
            prompts = np.arange(rows.prompt.shape[1]) < rows.prompt_lengths[:, None]
            ends = rows.prompt_lengths + lengths.max(axis=1)
            for wrong, problem in (
                (ends > positions, f"has {ends.max()} tokens, more than the model's {positions} positions{way}"),
                (
                    np.any(_outside(rows.prompt, vocabulary) & prompts, axis=1)
                    | np.any(_outside(rows.completion, vocabulary) & used, axis=(1, 2)),
                    f"has a token outside the model's vocabulary of {vocabulary}; is the tokenizer the model's?",
                ),
            ):
                if wrong.any():
                    raise ValueError(f"{what}: item {served.items[wrong.argmax()]} {problem}")

    def _prepare(self, params: Params, config: OptimizerConfig) -> None:
        """The programs, still to be compiled, and what they work on: the state, and the reference if there is one."""
        schedule = make_schedule(config, self.config.steps)
        optimizer = make_optimizer(config, schedule)
        step = make_offline_step(self.model, optimizer, self.objective, plan=self.plan)
        rounding, seed = config.rounding, self.setup.seed
        self.abstract_state = abstract_train_state(
            self.model, optimizer, self.setup.mesh, rounding=rounding, offload=config.offload
        )
        needs = {"parameters and optimizer": bytes_of(self.abstract_state)}
        check_memory(self.setup.mesh, needs, "the model's size, or train adapters: --model.lora.rank=16")
        placed: TrainState = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        whole = replicated(self.setup.mesh)
        options = compiler_options(self.model.config, self.setup.mesh)
        self.update = jax.jit(step, donate_argnums=0, out_shardings=(placed, whole), compiler_options=options)
        self._evaluate = jax.jit(make_offline_evaluation(self.model, self.objective), out_shardings=whole)
        self._normalizer = jax.jit(self.objective.normalizer, out_shardings=whole)
        self._merged = jax.jit(_merged, out_shardings=whole)
        self._reference_pass = jax.jit(make_reference_pass(self.model), out_shardings=whole)
        self._tables: dict[int, np.ndarray] = {}
        self._normalizers: Any = None
        with jax.set_mesh(self.setup.mesh):
            start = jax.jit(lambda p: make_train_state(p, optimizer, seed, rounding=rounding), out_shardings=placed)
            self.state: TrainState = start(params)  # a copy of them: updates overwrite it
            self.reference: Params | None = None
            if self.objective.needs_reference:
                with_adapters, whole = not self.setup.bare_reference, self.plan.reference == "ahead"
                self.reference, said = start_reference(
                    params, placed.params, self.model.config.dtype, with_adapters=with_adapters, whole=whole
                )
                self.what_a_step_is += said
        check_frozen(self.saved, self.state, self.reference)
        self._rates = Rates(schedule)

    @property
    def length(self) -> RunLength:
        """How long the run is."""
        return RunLength(
            self.config.steps,
            checkpoint_every=self.config.checkpoint_every,
            keep_checkpoints=self.config.keep_checkpoints,
            evaluate_every=self.evaluation.every,
            best_metric=self.evaluation.best_metric if self.evaluation.every else None,
            best_mode=self.evaluation.best_mode,
            max_skipped_steps=self.config.max_skipped_steps,
        )

    def learning_rate(self, step: int) -> float:
        """The rate of a step."""
        return self._rates[step - 1]

    def run(self) -> TrainingResult:
        """Trains to the last step, or until SIGTERM or Ctrl-C; then saves and returns."""
        return run_stage(self)

    def iterate(self, step: int, phase: Phase) -> Outcome:
        """One optimizer step on the next rows."""
        self._refer_ahead(phase)
        with phase("data"):
            rows = self._with_reference(next(self.loader), self.dataset)
        with phase("update"), jax.set_mesh(self.setup.mesh):
            self.state, metrics = self.update(self.state, rows, self.reference)
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        tokens = int(rows.prompt_lengths.sum() + _completion_lengths(rows.mask).sum())
        epoch = step * self.config.rows_per_step / len(self.dataset)
        return Outcome(metrics | {"num_tokens": tokens, "epoch": epoch})

    def evaluate(self, phase: Phase) -> Outcome:
        """The objective's metrics and loss over all held-out rows, as if they were one batch."""
        self._refer_ahead(phase)
        with phase("evaluate"), jax.set_mesh(self.setup.mesh):
            if self._normalizers is None:
                each = jax.device_get([self._normalizer(rows) for rows in self._held_out()])
                self._normalizers = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *each)
            state, normalizers = self.state, self._normalizers
            found = [
                jax.device_get(self._evaluate(state.params, rows, self.reference, normalizers))
                for rows in self._held_out()
            ]
            merged = jax.device_get(self._merged(jax.tree.map(lambda *parts: np.stack(parts), *found)))
        metrics = {f"eval/{name}": float(value) for name, value in merged.items()}
        if (best := self.evaluation.best_metric) not in metrics:
            raise ValueError(f"evaluation.best_metric={best!r} is no metric; there are {', '.join(sorted(metrics))}")
        return Outcome(metrics)

    def _held_out(self) -> Iterator[Any]:
        assert self.eval_dataset is not None  # evaluation.every says when, and is 0 without
        return (self._with_reference(served, self.eval_dataset) for served in self._batches(self.eval_dataset))

    def _batches(self, dataset: RowDataset) -> Iterator[ServedRows]:
        """All rows of a data set in batches that fill the mesh."""
        shards = row_shards(self.setup.mesh)
        wanted, tokens = self.config.rows_per_step // self.plan.micro_batches, self.plan.tokens_per_micro_batch
        if tokens is not None:  # these rows come with their padding
            first = dataset.batch([0])
            wanted = min(wanted, shards * (tokens // (first.prompt.shape[1] + first.mask[0].size)))
        wanted = max(1, self.evaluation.batch_size or wanted)
        size = -(-min(wanted, len(dataset)) // shards) * shards
        return batches_in_order(dataset, batch_size=size)

    # ---- The reference, ahead of training ----------------------------------------------------------

    def _refer_ahead(self, phase: Phase) -> None:
        """Computes the reference's log-probs of all rows and lets its parameters go, if that is still to be done."""
        if self.reference is None or self.plan.reference == "in_step":
            return
        with phase("reference"), jax.set_mesh(self.setup.mesh):
            for dataset in (self.dataset, self.eval_dataset):
                if dataset is not None:
                    parts = [
                        np.asarray(self._reference_pass(self.reference, served.rows))[served.valid]
                        for served in self._batches(dataset)
                    ]
                    self._tables[id(dataset)] = np.concatenate(parts)
        self.reference = None

    def _with_reference(self, served: ServedRows, dataset: RowDataset) -> Any:
        table = self._tables.get(id(dataset))
        return served.rows if table is None else served.rows._replace(ref_logprobs=table[served.items])


def _merged(stacked: tuple[jax.Array, Metrics]) -> dict[str, jax.Array]:
    """One evaluation of the losses and records of several batches, stacked."""
    losses, records = stacked
    return {"loss": jnp.sum(losses)} | {name: record.reduce().value() for name, record in records.items()}


def _used(mask: np.ndarray) -> np.ndarray:
    """Which tokens of completions can have an effect: those up to the last masked one."""
    return np.flip(np.logical_or.accumulate(np.flip(mask, -1), -1), -1)


def _completion_lengths(mask: np.ndarray) -> np.ndarray:
    """`[P, G]`: tokens of completions up to the last masked one."""
    return _used(mask).sum(axis=-1)


def _outside(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    return (tokens < 0) | (tokens >= vocabulary)
