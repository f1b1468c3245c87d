"""STaR: a model fine-tuned on those of its own rationales that led to right answers, again and again.

An iteration generates, keeps what is right, tries again with the answer as a hint where nothing was, and trains. Each
of these phases leaves a file in `iterations/<number>`, so that a run that was killed goes on after the last one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.offline import make_offline_step
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.star import training_steps
from jaxrl_llm.algorithms.state import abstract_train_state, make_train_state
from jaxrl_llm.algorithms.supervised import SupervisedObjective
from jaxrl_llm.checks import check_fields, count
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.rows import RowLoader
from jaxrl_llm.device_memory import bytes_per_device
from jaxrl_llm.models.checkpoints.tokenizers import known_tokens
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.unrolling import compiler_options
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.layout import sampling_mesh
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import replicated, row_shards
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.episodes.episodes import prompt_text, score_rollout
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig, make_evaluator
from jaxrl_llm.training.episodes.reading import completion_text
from jaxrl_llm.training.episodes.scorable import check_scorable
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.loop import run_stage
from jaxrl_llm.training.run.distributed import from_main_process
from jaxrl_llm.training.run.errors import RunError
from jaxrl_llm.training.run.frozen import check_frozen
from jaxrl_llm.training.run.memory import check_memory, rollout_bytes
from jaxrl_llm.training.run.report import SampledCompletion
from jaxrl_llm.training.run.setup import RunSetup
from jaxrl_llm.training.stage import Outcome, Phase, RunLength, TrainingResult
from jaxrl_llm.training.star.phase_files import check_settings, once, write_settings
from jaxrl_llm.training.star.rationales import Rationales, Record, kept_rationales
from jaxrl_llm.training.texts import how_texts_are_read
from jaxrl_llm.types import TrainState

ITERATIONS = "iterations"
"""Folder of what the phases left, in the run's own."""


@dataclasses.dataclass(frozen=True)
class StarConfig:
    """What an iteration does; defaults of Zelikman et al. 2022 (2203.14465) and of their code."""

    iterations: int = 5
    """Times that a model is trained."""
    start_steps: int = 40
    """Optimizer steps of the first iteration."""
    growth: float = 1.2
    """Factor of the number of steps from one iteration to the next."""
    rows_per_step: int = 32
    """Rationales in an optimizer step."""
    problems_per_batch: int = 64
    """Problems decoded at a time; changes memory and speed, and, where samples are drawn, the noise."""
    samples: int = 1
    """Rationales of each problem; more than one needs a temperature (rejection-sampling fine-tuning)."""
    restart_from_base: bool = True
    """Train the base model each time; False goes on with the last one."""
    rationalize: bool = True
    """Try again, with the answer as a hint, what was not solved."""
    hint_in_train: bool = False
    """Show the hint in training, too, where it was given."""
    dedup: bool = True
    """Train on equal rationales of a problem once."""
    keep_checkpoints: int = 2
    """Models of the latest iterations that are kept."""

    def __post_init__(self) -> None:
        """Rejects what cannot be meant."""
        counts = ("iterations", "start_steps", "rows_per_step", "problems_per_batch", "samples", "keep_checkpoints")
        check_fields("star", self, **{field: count(getattr(self, field)) for field in (*counts, "growth")})
        if self.hint_in_train and not self.rationalize:
            raise ValueError("star.hint_in_train has no hint to show without star.rationalize")


class StarTrainer:
    """Trains a model on its own right rationales; a `Stage` of `jaxrl_llm.training.loop`, a step of it an iteration.

    `star`, `sampling`, `optimizer` and `evaluation` are records that describe themselves; the learning rate must be
    constant after its warm-up.

    Args:
        model: the model.
        params: the base model's parameters, which each iteration starts from.
        tokenizer: decodes completions.
        stop_tokens: ids that end a completion.
        problems: prompts without hints.
        hinted: the same rows as prompts that tell the answer, of the same width; `None` without rationalisation.
        rewards: reward functions; a completion is right where `solved_by` gives 1 or more, and it has ended.
        setup: mesh, folder (also of the phases' files), seed (of samples and of the order of rationales) and name of
            the run; one that goes on does so after the last phase that the folder holds.
        eval_problems: held-out prompts, or `None`.
        plan: the pieces in which a gradient is accumulated.

    Raises:
        ValueError: settings and data do not fit together, or the folder holds another run.
    """

    def __init__(
        self,
        *,
        model: Transformer,
        params: Params,
        tokenizer: Any,
        stop_tokens: tuple[int, ...],
        problems: PromptDataset,
        hinted: PromptDataset | None,
        rewards: RewardSum,
        setup: RunSetup,
        eval_problems: PromptDataset | None = None,
        star: StarConfig | None = None,
        sampling: SamplingConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        evaluation: EvaluationConfig | None = None,
        plan: MicroBatches | None = None,
    ):
        self.star, self.sampling = star or StarConfig(), sampling or SamplingConfig(temperature=0)
        self.evaluation, self._optimizer = evaluation or EvaluationConfig(), optimizer or OptimizerConfig()
        self.model, self.tokenizer, self.rewards = model, tokenizer, rewards
        self.problems, self.hinted, self._base = problems, hinted, params
        self.setup, mesh, self._phase_files = setup, setup.mesh, setup.folder / ITERATIONS
        self._check(rewards)
        self.solved_by = self.evaluation.solving_reward(rewards)
        self._plan = plan or MicroBatches()
        self._plan.group_split(self.star.rows_per_step, 1, row_shards(mesh))
        self.saved = setup.find()
        self._settings = setup.settings | {"problems": problems.fingerprint}
        check_settings(self._phase_files, self._settings, resume=setup.resume)

        shards = row_shards(sampling_mesh(mesh, self.sampling.tensor))
        self._batch_size = -(-min(self.star.problems_per_batch, len(problems)) // shards) * shards
        sampled = model.with_known_tokens(known_tokens(tokenizer))
        resident = bytes_per_device([params, sampled.abstract_params_on(mesh)])  # the base, and what is trained of it
        self.sampler = Sampler(
            sampled,
            self.sampling,
            group=self.star.samples,
            stop_tokens=stop_tokens,
            mesh=mesh,
            tokenizer=tokenizer,
            resident=resident,
        )
        for prompts in (problems, hinted):
            if prompts is not None:
                self.sampler.check_length(prompts.longest, width=prompts.max_prompt_length)
        self.evaluator = make_evaluator(
            self.evaluation,
            sampled,
            eval_problems,
            tokenizer,
            rewards,
            sampling=self.sampling,
            stop_tokens=stop_tokens,
            mesh=mesh,
            rows=self._batch_size,
            resident=resident,
        )
        needs = rollout_bytes(self.sampler, prompts=self._batch_size, max_prompt_length=problems.max_prompt_length)
        check_memory(
            mesh, needs, "star.problems_per_batch, star.samples, sampling.max_tokens or data.max_prompt_length"
        )
        self._prepare()
        self.loader = _NoPosition()
        self.phases: tuple[str, ...] = ()
        self.what_a_step_is = (
            f"{len(problems)} problems. An iteration: {self.star.samples} rationale(s) of each, the right ones kept"
            f"{', the others tried again with hints' if self.star.rationalize else ''}; then {self.star.start_steps} "
            f"steps (more each time) of {self.star.rows_per_step} rows, on {mesh.size} device(s)."
        ) + how_texts_are_read(model.config, self._plan, problems.max_prompt_length, self.sampling.max_tokens)
        self.what_a_step_is += self.sampler.how_slots_are_chosen(self._batch_size, problems.max_prompt_length)
        self.compilations = CompilationCounter()

    def _check(self, rewards: RewardSum) -> None:
        star, problems, hinted = self.star, self.problems, self.hinted
        if star.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(f"star.samples={star.samples} would all be equal: give sampling.temperature above 0")
        self.sampling.check_no_epochs("STaR")
        if self._optimizer.schedule != "constant":
            raise ValueError(
                f"optimizer.schedule={self._optimizer.schedule}: iterations differ in length, so it must be constant"
            )
        if star.rationalize and hinted is None:
            raise ValueError("star.rationalize needs prompts with the answer as a hint: pass hinted, or turn it off")
        for prompts in (problems, hinted):
            if prompts is not None:
                check_scorable(rewards, prompts)
        if hinted is None:
            return
        if hinted.fingerprint != problems.fingerprint or hinted.max_prompt_length != problems.max_prompt_length:
            raise ValueError(
                f"the {len(hinted)} prompts with hints ({hinted.dropped} too long) and the {len(problems)} without "
                f"({problems.dropped} too long) must be of the same rows and width; is max_prompt_length too short?"
            )

    def _prepare(self) -> None:
        """The programs, still to be compiled, and the state: a model, without an optimizer between iterations.

        An iteration begins with a new optimizer, and so with a new float32 copy of parameters in bfloat16.
        """
        model, mesh, seed = self.model, self.setup.mesh, self.setup.seed
        rounding, resting = self._optimizer.rounding, optax.identity()
        self._schedule = make_schedule(self._optimizer, 1)
        trained = make_optimizer(self._optimizer, self._schedule)
        abstract = abstract_train_state(model, trained, mesh, rounding=rounding, offload=self._optimizer.offload)
        placed: TrainState = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self.abstract_state = abstract_train_state(model, resting, mesh, rounding="nearest")
        at_rest: TrainState = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        step = make_offline_step(model, trained, SupervisedObjective(), plan=self._plan)
        options = compiler_options(model.config, mesh)
        out = (placed, replicated(mesh))
        self._update = jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=options)
        self._begin = jax.jit(
            lambda params: make_train_state(params, trained, seed, rounding=rounding), out_shardings=placed
        )
        with jax.set_mesh(mesh):
            rest = jax.jit(
                lambda params: make_train_state(params, resting, seed, rounding="nearest"), out_shardings=at_rest
            )
            self.state: TrainState = rest(self._base)  # a copy of them
        self.reference: Params | None = None
        check_frozen(self.saved, self.state, self.reference)

    # ---- What the loop asks for --------------------------------------------------------------------

    @property
    def length(self) -> RunLength:
        """How long the run is."""
        return RunLength(
            self.star.iterations,
            checkpoint_every=1,
            keep_checkpoints=self.star.keep_checkpoints,
            evaluate_every=self.evaluation.every,
            best_metric="eval/accuracy" if self.evaluator else None,
            samples_every=1,
        )

    def learning_rate(self, step: int) -> float:
        """The rate of the last optimizer step of an iteration."""
        steps = training_steps(step, start=self.star.start_steps, growth=self.star.growth)
        return float(np.asarray(self._schedule(steps - 1)))

    def run(self) -> TrainingResult:
        """Iterates to the last one, or until SIGTERM or Ctrl-C; then saves and returns.

        Raises:
            RunError: a reward function failed, or no rationale was right; the iterations before are saved.
        """
        write_settings(self._phase_files, self._settings)
        return run_stage(self)

    def evaluate(self, phase: Phase) -> Outcome:
        """Decodes the held-out prompts and scores them."""
        assert self.evaluator is not None  # evaluation.every says when, and is 0 without
        with phase("evaluate"):
            metrics, _ = self.evaluator(self.state.params, np.asarray(self.state.key))
        return Outcome(metrics)

    def iterate(self, step: int, phase: Phase) -> Outcome:
        """One iteration: generate, rationalise, filter, train."""
        folder, items = self._phase_files / f"{step:03d}", range(len(self.problems))
        files = [folder / f"{name}.jsonl" for name in ("generated", "rationalized", "kept")]
        # A phase that was done before the run was killed is read, under another name: its programs are still to come.
        there = from_main_process([path.exists() for path in files])
        names = ("generate", "rationalize", "filter")
        self.phases = (*("read" if done else name for name, done in zip(names, there, strict=True)), "train")
        with phase(self.phases[0]):
            first = once(files[0], lambda: self._sample(self.problems, items, (step, 0)))
        with phase(self.phases[1]):
            solved = {record["item"] for record in first if record["correct"]}
            unsolved = [item for item in items if item not in solved]
            hinted = []
            if self.hinted is not None and self.star.rationalize and unsolved:
                again = self.hinted
                hinted = once(files[1], lambda: self._sample(again, unsolved, (step, 1)))
        with phase(self.phases[2]):
            kept = once(files[2], lambda: self._keep(first, hinted))
        if not kept:
            raise RunError(
                f"iteration {step}: none of {len(items)} problems was solved, and there is nothing to train on; give "
                "an example in the prompt, or take a stronger model"
            )
        with phase("train"), jax.set_mesh(self.setup.mesh):
            trained = self._train(kept, step)
        rationalized = sum(record["rationalized"] for record in kept)
        metrics = trained | {
            "accuracy": len(solved) / len(items),
            "reward": float(np.mean([record["reward"] for record in first])),
            "completions/mean_length": float(np.mean([len(record["ids"]) for record in first])),
            "star/kept": len(kept),
            "star/rationalized": rationalized,
            "star/unsolved": len(items) - len({record["item"] for record in kept}),
        }
        metrics["num_tokens"] += sum(len(record["ids"]) for record in (*first, *hinted))
        return Outcome(metrics, lambda count: self._shown(first, count))

    # ---- Phases ------------------------------------------------------------------------------------

    def _sample(self, prompts: PromptDataset, items: Sequence[int], noise: tuple[int, int]) -> list[Record]:
        """Rationales of some prompts, scored; in batches of one shape, the last one filled up."""
        key = jax.random.wrap_key_data(jnp.asarray(self.state.key))
        for number in noise:
            key = jax.random.fold_in(key, number)
        size, records = self._batch_size, []
        for number, start in enumerate(range(0, len(items), size)):
            block = items[start : start + size]
            batch = prompts.batch(np.resize(block, size), valid=np.arange(size) < len(block))
            rollout = self.sampler(self.state.params, batch.tokens, batch.lengths, jax.random.key_data(key), number)
            stops = self.sampler.stop_tokens
            episodes = score_rollout(rollout, batch, self.rewards, self.tokenizer, stop_tokens=stops)
            right = (episodes.by_name[self.solved_by] >= 1) & np.asarray(rollout.finished)
            for slot, sample in np.ndindex(len(block), self.star.samples):
                place = slot * self.star.samples + sample
                ids, finished = episodes.completion_ids[place], episodes.finished[place]
                records.append(
                    {
                        "item": int(block[slot]),
                        "ids": ids,
                        "completion": completion_text(ids, self.tokenizer, finished=finished),
                        "reward": float(episodes.rewards[slot, sample]),
                        "correct": bool(right[slot, sample]),
                    }
                )
        return records

    def _keep(self, first: list[Record], hinted: list[Record]) -> list[Record]:
        return kept_rationales(first, hinted, samples=self.star.samples, dedup=self.star.dedup)

    def _train(self, kept: list[Record], step: int) -> dict[str, float]:
        """Fine-tunes the base model, or the last one, on what was kept; the mean metrics of its steps."""
        prompts = self.hinted if self.star.hint_in_train else None
        rows = Rationales(kept, self.problems, prompts, self.sampling.max_tokens)
        loader = RowLoader(rows, batch_size=self.star.rows_per_step, seed=(self.setup.seed + step) % 2**32)
        steps = training_steps(step, start=self.star.start_steps, growth=self.star.growth)
        state, metrics, tokens = self._begin(self._base if self.star.restart_from_base else self.state.params), [], 0
        for _ in range(steps):
            batch = next(loader).rows
            tokens += int(batch.prompt_lengths.sum() + batch.mask.sum())
            state, found = self._update(state, batch)
            metrics.append(found)
        self.state = self.state.replace(step=self.state.step + 1, params=state.params)
        each = jax.device_get(metrics)
        mean = {name: float(np.mean([found[name] for found in each])) for name in each[0]}
        return mean | {"star/steps": steps, "num_tokens": tokens}

    def _shown(self, records: list[Record], count: int) -> list[SampledCompletion]:
        shown = records[:count]
        prompts = self.problems.batch([record["item"] for record in shown]).prompts
        pairs = zip(prompts, shown, strict=True)
        return [SampledCompletion(prompt_text(p), record["completion"], record["reward"]) for p, record in pairs]


class _NoPosition:
    """In place of a loader: what an iteration reads depends on its number alone."""

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Nothing to move."""
