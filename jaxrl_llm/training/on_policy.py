"""The trainer of on-policy algorithms: what a run is made of, checked and compiled once.

An iteration is two XLA programs with the reward functions between them; `jaxrl_llm.training.loop` runs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.algorithms.distillation.self_teacher import ITSELF
from jaxrl_llm.algorithms.interfaces import Algorithm
from jaxrl_llm.algorithms.iteration import DeviceReward
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, Rates
from jaxrl_llm.algorithms.policy_gradient.credit_assignment import OBSERVED, Observed
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig
from jaxrl_llm.checks import check_fields, count
from jaxrl_llm.data.encoded_rows import counted
from jaxrl_llm.data.loader import PromptLoader
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.device_memory import bytes_per_device
from jaxrl_llm.models.checkpoints.tokenizers import known_tokens
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import abstract_reference, has_adapters, start_reference
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import row_shards
from jaxrl_llm.training.ahead import Ahead
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.episodes.collector import Collector
from jaxrl_llm.training.episodes.completions import RecordedCompletions
from jaxrl_llm.training.episodes.episodes import Episodes, unscored
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig, make_evaluator
from jaxrl_llm.training.episodes.feedback import FeedbackSource
from jaxrl_llm.training.episodes.hints import check_positions, self_teacher_of
from jaxrl_llm.training.episodes.judging import Judge
from jaxrl_llm.training.episodes.reference_rewards import ReferenceRewards
from jaxrl_llm.training.episodes.reward_watch import RewardWatch
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.episodes.telling import TrainerState
from jaxrl_llm.training.learner import CriticSource, Learner, check_critic, check_group, make_learner
from jaxrl_llm.training.loop import run_stage
from jaxrl_llm.training.programs import iteration_program, update_program
from jaxrl_llm.training.run.completions import CompletionsConfig
from jaxrl_llm.training.run.distributed import is_main_process
from jaxrl_llm.training.run.frozen import check_frozen
from jaxrl_llm.training.run.memory import ROWS, bytes_of, check_memory, rollout_bytes
from jaxrl_llm.training.run.setup import RunSetup
from jaxrl_llm.training.stage import Outcome, Phase, RunLength, TrainingResult
from jaxrl_llm.training.teachers import Teacher, check_teachers, teacher_bytes
from jaxrl_llm.training.texts import how_texts_are_read
from jaxrl_llm.types import Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The length of a run and the size of a step: prompts × samples = rows of an update."""

    steps: int = 100
    """Iterations: one batch of rollouts each."""
    prompts_per_step: int = 8
    """Prompts of a batch."""
    samples_per_prompt: int = 8
    """Completions of each prompt, the group that is compared."""
    checkpoint_every: int = 50
    """Steps between checkpoints; one more comes at the end. 0: none at all."""
    keep_checkpoints: int = 3
    """Latest checkpoints that are kept, beside the best one."""
    max_skipped_steps: int = 10
    """Steps in a row without a finite gradient that end the run: it diverged. 0: any number may have none."""
    samples_every: int = 10
    """Steps between completions that are shown: printed, where there is no terminal, and with those that are written
    (`completions`) as text in TensorBoard and a table in Weights & Biases; 0: never."""
    dynamic_sampling: int = 0
    """Batches of prompts that are sampled at most to fill a step with groups whose rewards differ (DAPO); 0: one,
    whatever its rewards."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant."""
        some = ("steps", "prompts_per_step", "samples_per_prompt", "keep_checkpoints")
        perhaps_none = ("checkpoint_every", "samples_every", "dynamic_sampling", "max_skipped_steps")
        check_fields("training", self, **{field: count(getattr(self, field)) for field in some})
        check_fields("training", self, **{field: count(getattr(self, field), least=0) for field in perhaps_none})


EVALUATION_KEY = np.uint32(0x5EED)
"""Keeps the noise of evaluations apart from that of training."""


class Trainer:
    """Trains a policy on rewards of its own samples; a `Stage` of `jaxrl_llm.training.loop`.

    `training`, `update`, `optimizer`, `sampling`, `evaluation` and `completions` are records that describe themselves.

    Args:
        model: the policy.
        params: its parameters at the start, also the reference's where the algorithm has one.
        tokenizer: decodes completions.
        stop_tokens: ids that end a completion.
        dataset: prompts to train on.
        eval_dataset: held-out prompts, or `None`.
        rewards: reward functions and weights; `None` where all rewards are `device_rewards`, or there are none to
            learn from (`Distillation`): then an iteration is one program, unless the policy is its own teacher.
        algorithm: the objective.
        setup: mesh, folder, seed and name of the run.
        device_rewards: rewards that are JAX functions, added to the others.
        eval_rewards: reward functions of the evaluation; `None`: `rewards`.
        judge: for algorithms that read verdicts (BRPO): see `jaxrl_llm.training.episodes.judging`.
        critic: for algorithms that are made of one (PPO).
        trust_region: TRPO's step in place of the optimizer's.
        teachers: for algorithms that learn from some; they lie beside the policy, sharded as it is.
        critic_params: parameters of a `ScoreModel` from which a critic of its own starts; `None`: the policy's, with a
            new head.

    Raises:
        ValueError: settings, data and mesh do not fit together, or the folder holds another run; names what is
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
        rewards: RewardSum | None,
        algorithm: Algorithm,
        setup: RunSetup,
        eval_dataset: PromptDataset | None = None,
        device_rewards: Sequence[DeviceReward] = (),
        eval_rewards: RewardSum | None = None,
        judge: Judge | None = None,
        critic: CriticSource | None = None,
        critic_params: Params | None = None,
        trust_region: TrustRegionConfig | None = None,
        teachers: Sequence[Teacher] = (),
        training: TrainingConfig | None = None,
        update: UpdateConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        sampling: SamplingConfig | None = None,
        evaluation: EvaluationConfig | None = None,
        completions: CompletionsConfig | None = None,
    ):
        self.completions = completions or CompletionsConfig()
        self.config, self.evaluation = training or TrainingConfig(), evaluation or EvaluationConfig()
        plan, sampling = update or UpdateConfig(), sampling or SamplingConfig()
        prompts, group = self.config.prompts_per_step, self.config.samples_per_prompt
        model = model.with_known_tokens(known_tokens(tokenizer))  # of sampler and learner alike
        self.model, self.tokenizer, self.algorithm = model, tokenizer, algorithm
        self.setup, mesh = setup, setup.mesh
        self.rewards, self.device_rewards = rewards, tuple(device_rewards)
        self._prompts_in_data, self._width = len(dataset), dataset.max_prompt_length

        # All that can be wrong is found before anything is compiled.
        check_group(algorithm, group)
        check_critic(algorithm, critic or CriticSource())
        check_teachers(algorithm, teachers, tokenizer)
        self.feedback = FeedbackSource(algorithm, rewards, self.device_rewards, judge, tokenizer)
        self.feedback.check(dataset, dynamic_sampling=self.config.dynamic_sampling)
        if (itself := self_teacher_of(algorithm)) is not None:
            check_positions(itself, model.config.longest_text, sampling.max_tokens)
        self.saved = setup.find()
        plan.group_split(prompts, group, row_shards(mesh), whole_groups=algorithm.needs_whole_groups)
        self.loader = PromptLoader(dataset, batch_size=prompts, seed=setup.seed)
        if self.saved:
            self.loader.set_state(self.saved.data)
        learner = make_learner(
            model,
            algorithm,
            iterations=self.config.steps,
            plan=plan,
            optimizer=optimizer or OptimizerConfig(),
            sampling=sampling,
            critic=critic or CriticSource(),
            trust_region=trust_region,
            teachers={teacher.name: teacher.over(known_tokens(tokenizer)) for teacher in teachers},
            observed=self._observed(),
        )
        if isinstance(algorithm, Distillation):
            algorithm.weights_of(len(teachers))  # raises, if there are not as many
        self.abstract_state = learner.abstract_state(mesh)
        resident = self._resident(teachers)
        self.sampler = Sampler(
            model,
            sampling,
            group=group,
            stop_tokens=stop_tokens,
            mesh=mesh,
            greedy=algorithm.needs_greedy,
            tokenizer=tokenizer,
            keep_mask=algorithm.keeps_mask,
            keep_experts=algorithm.keeps_experts,
            resident=resident,
        )
        reference_rewards = None
        if "reference_rewards" in algorithm.needs:
            reference_rewards = ReferenceRewards(setup.folder, resume=self.saved is not None)
        self.sampler.check_length(dataset.longest, width=dataset.max_prompt_length)
        self.sampler.row_split(prompts)
        self.evaluator = make_evaluator(
            self.evaluation,
            model,
            eval_dataset,
            tokenizer,
            eval_rewards or rewards,
            sampling=sampling,
            stop_tokens=stop_tokens,
            mesh=mesh,
            rows=prompts * group,
            resident=resident,
        )
        self._optimizer_steps = plan.optimizer_steps
        self.what_a_step_is = (
            f"{counted(dataset, 'prompts')} to train on, {counted(eval_dataset, 'prompts')} held out. A step: "
            f"{prompts} prompts × {group} samples = {prompts * group} rows, {plan.optimizer_steps} optimizer step(s), "
            f"on {mesh.size} device(s)."
        ) + how_texts_are_read(model.config, plan, dataset.max_prompt_length, sampling.max_tokens)
        if not stop_tokens:
            self.what_a_step_is += f" No token ends a completion: each has sampling.max_tokens={sampling.max_tokens}."
        needs = {"parameters and optimizer": bytes_of(self.abstract_state)} | rollout_bytes(
            self.sampler, prompts=prompts, max_prompt_length=dataset.max_prompt_length
        )
        if teachers:
            needs["teachers"] = sum(bytes_of(teacher.params) for teacher in teachers)
        check_memory(mesh, needs, f"{ROWS}; more devices along mesh.fsdp share them")
        self.what_a_step_is += self.sampler.how_slots_are_chosen(prompts, dataset.max_prompt_length)
        self._start(learner, params, critic_params, teachers)
        self._make_programs(learner)
        self.collector = Collector(
            self.sampler,
            rewards,
            device_rewards=self.device_rewards,
            tokenizer=tokenizer,
            prompts=prompts,
            rounds=self.config.dynamic_sampling,
            skips_unscored=self.feedback.skips_unscored,
            first_step=self.saved.step + 1 if self.saved else 1,
            told_of=self._told_of,
            reference_rewards=reference_rewards,
        )
        self._begun, self._ahead = False, Ahead(mesh, {})
        self._watch = RewardWatch(self.feedback.watched, in_groups=algorithm.smallest_group > 1)
        self.compilations = CompilationCounter()
        self.phases = ("sample", "reward", "update") if self._iteration is None else ("iteration",)

    def _observed(self) -> Observed:
        """Of which completions the update tells what it made of them: those that are written."""
        if not self.completions.every:
            return Observed()
        group = self.config.samples_per_prompt
        groups = self.completions.groups(self.config.prompts_per_step, group)
        return Observed(groups, min(self.completions.tokens, groups * group))

    def _resident(self, teachers: Sequence[Teacher]) -> int:
        """Bytes of each device that are taken while it samples."""
        state, scored = self.abstract_state, [reward.params for reward in self.device_rewards]
        kept = bytes_per_device([state, [leaf for leaf in jax.tree.leaves(scored) if isinstance(leaf, jax.Array)]])
        kept += teacher_bytes(teachers, self.setup.mesh)
        if not self.algorithm.needs_reference or has_adapters(state.params):
            return kept
        return kept + bytes_per_device(abstract_reference(state.params, self.model.config.dtype))

    def _start(
        self, learner: Learner, params: Params, critic_params: Params | None, teachers: Sequence[Teacher]
    ) -> None:
        """What the programs work on: the state, and the reference if there is one."""
        placed: TrainState = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        start = jax.jit(learner.start, static_argnames="seed", out_shardings=placed)
        with jax.set_mesh(self.setup.mesh):
            # a copy of the parameters: updates overwrite it
            self.state: TrainState = start(params, critic_params, seed=self.setup.seed)
            self.reference: Params | None = None
            if self.algorithm.needs_reference:
                with_adapters = not self.setup.bare_reference
                self.reference, said = start_reference(
                    params, placed.params, self.model.config.dtype, with_adapters=with_adapters
                )
                self.what_a_step_is += said
            if isinstance(self.algorithm, Distillation):
                own = {ITSELF: self.reference or {}} if self.algorithm.needs_reference else {}
                self.reference = {teacher.name: teacher.kept(self.setup.mesh) for teacher in teachers} | own
        check_frozen(self.saved, self.state, self.reference)

    def _make_programs(self, learner: Learner) -> None:
        """The programs, still to be compiled."""
        state, mesh, rewards = self.abstract_state, self.setup.mesh, self.device_rewards
        self.update = update_program(learner, state, mesh)
        self._lower_update = self.update.lower
        self._iteration = None
        if self.rewards is None and not self.algorithm.needs_hints:
            self._iteration = iteration_program(learner, state, self.sampler, rewards, self.config.prompts_per_step)
        self._rates = Rates(learner.schedule)

    def learning_rate(self, step: int) -> float:
        """The rate of the last optimizer step of an iteration."""
        return self._rates[step * self._optimizer_steps - 1]

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
            max_skipped_steps=config.max_skipped_steps,
            completions=self.completions,
        )

    def run(self) -> TrainingResult:
        """Trains to the last step, or until SIGTERM or Ctrl-C; then saves and returns.

        Raises:
            RewardError: a reward function failed; the steps before are saved.
        """
        return run_stage(self)

    def _begin(self) -> None:
        """Lets sampler and update be compiled beside each other, the first time that it is called.

        Not where it is only known later what the update is given, and not where several processes would have to
        compile the same programs in the same order.
        """
        mesh, prompts = self.setup.mesh, self.config.prompts_per_step
        feedback = self.feedback.foretold(prompts, self.sampler.group)
        later = feedback is None or self.config.dynamic_sampling or self.collector.history is not None
        if self._begun or self._iteration is not None or later or jax.process_count() > 1:
            return
        self._begun = True
        sampling = self.sampler.trace(self.state.params, prompts, self._width, self.state.key)
        rollout = jax.tree.map(
            lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies),
            *(sampling.out_info, self.sampler.shardings(prompts)),
        )
        given = (self.state, rollout, feedback, self.reference)
        self._ahead = Ahead(mesh, {"sample": sampling.lower, "update": lambda: self._lower_update(*given)})

    def iterate(self, step: int, phase: Phase) -> Outcome:
        """Samples, scores and updates."""
        if self._iteration is not None:
            return self._iterate_on_device(step, phase)
        self._begin()
        rollout, episodes, drawn = self.collector(
            self.loader, self.state, self.reference, step, phase, ready=partial(self._ahead.wait, "sample")
        )
        with phase("update"), jax.set_mesh(self.setup.mesh):
            self._ahead.wait("update")
            feedback = self.feedback(episodes, np.asarray(self.state.key), step)
            self.state, found = self.update(self.state, rollout, feedback, self.reference)
            episodes = episodes.first(self.config.samples_per_prompt)  # not the greedy ones beside them
            recorded = self._recorded(step, episodes, rollout)  # while the device updates
            found = jax.device_get(found)
        return self._outcome(found | drawn, episodes, recorded)

    def _recorded(self, step: int, episodes: Episodes, rollout: Rollout) -> RecordedCompletions | None:
        """The completions of a step that are to be written, if it is one of those."""
        config = self.completions
        if not (config.is_due(step, self.config.steps) and is_main_process()):
            return None
        groups = config.groups(*episodes.rewards.shape)
        given: dict[str, Any] = {"groups": groups, "rollout": rollout, "tokens": config.tokens}
        return RecordedCompletions.of(episodes, self.tokenizer, kind="train", **given)

    def _outcome(self, found: dict[str, Any], episodes: Episodes, recorded: RecordedCompletions | None) -> Outcome:
        """What is told of a step, from what its update returned."""
        metrics = {name: float(value) for name, value in found.items() if not name.startswith(OBSERVED)}
        if recorded is not None:
            observed = {name.removeprefix(OBSERVED): of for name, of in found.items() if name.startswith(OBSERVED)}
            recorded = recorded.with_observed(observed)
        told, remarks = episodes.reward_metrics(), self._watch.remarks(episodes)
        for name in sorted(metrics.keys() & told.keys()):
            metrics[f"told/{name}"] = told.pop(name)
            remarks += self._watch.renamed(name, f"told/{name}")
        rows = None if recorded is None else recorded.rows
        return Outcome(metrics | told, partial(episodes.samples, self.tokenizer), remarks, rows)

    def _told_of(self, step: int) -> TrainerState:
        """What reward functions may know of the run after so many steps."""
        each = self.config.prompts_per_step / self._prompts_in_data
        last = self.config.steps
        return TrainerState(global_step=step, max_steps=last, epoch=step * each, num_train_epochs=last * each)

    def _iterate_on_device(self, step: int, phase: Phase) -> Outcome:
        """Samples, scores and updates in one program."""
        assert self._iteration is not None
        with phase("iteration"), jax.set_mesh(self.setup.mesh):
            batch = next(self.loader)
            given = [reward.params for reward in self.device_rewards]
            history = self.collector.proposed(batch)
            done = self._iteration(self.state, batch.tokens, batch.lengths, given, self.reference, history)
            self.state, found, rollout, scores = done
            self.collector.remember(batch, rollout)
            found = jax.device_get(found)
        episodes = unscored(rollout, batch, stop_tokens=self.sampler.stop_tokens).plus(*jax.device_get(scores))
        episodes = episodes.first(self.config.samples_per_prompt)
        return self._outcome(found, episodes, self._recorded(step, episodes, rollout))

    def evaluate(self, phase: Phase) -> Outcome:
        """Decodes the held-out prompts and scores them."""
        assert self.evaluator is not None  # evaluation.every says when, and is 0 without
        self._begin()
        with phase("evaluate"):
            key, state = np.asarray(self.state.key) ^ EVALUATION_KEY, self._told_of(int(self.state.step))
            metrics, episodes = self.evaluator(self.state.params, key, state)
        rows = None
        if self.completions.every and is_main_process():
            groups = self.completions.groups(len(episodes.prompts), 1)
            rows = RecordedCompletions.of(episodes, self.tokenizer, kind="eval", groups=groups).rows
        return Outcome(metrics, partial(episodes.samples, self.tokenizer), completions=rows)
