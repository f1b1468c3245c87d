"""The trainer of on-policy algorithms: what a run is made of, checked and compiled once.

An iteration is two XLA programs with the reward functions between them; `jaxrl_llm.training.loop` runs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.critic import Critic
from jaxrl_llm.algorithms.iteration import DeviceReward, Iteration, make_device_scores, make_iteration
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient import PolicyGradient
from jaxrl_llm.algorithms.signals import Feedback
from jaxrl_llm.algorithms.state import abstract_train_state, make_train_state
from jaxrl_llm.algorithms.trust_region import TrustRegionConfig, make_trust_region_step
from jaxrl_llm.algorithms.update import make_update_step
from jaxrl_llm.data.loader import PromptLoader
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.lora import has_adapters
from jaxrl_llm.models.transformer import Params, Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import replicated, row_shards
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.dynamic_sampling import GroupBuffer
from jaxrl_llm.training.episodes import Episodes, score_rollout, unscored
from jaxrl_llm.training.evaluate import EvaluationConfig, Evaluator
from jaxrl_llm.training.frozen import check_frozen
from jaxrl_llm.training.judging import Judge, compare
from jaxrl_llm.training.loop import Outcome, Phase, RunLength, TrainingResult, run_stage
from jaxrl_llm.training.metrics import WandbConfig
from jaxrl_llm.training.resume import find_run
from jaxrl_llm.training.scoring import RewardSum
from jaxrl_llm.types import Rollout, TrainState


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
    dynamic_sampling: int = 0
    """Batches of prompts that are sampled at most to fill a step with groups whose rewards differ (DAPO); 0: one,
    whatever its rewards."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant."""
        for field in ("steps", "prompts_per_step", "samples_per_prompt", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise ValueError(f"training.{field}={getattr(self, field)} must be at least 1")
        for field in ("checkpoint_every", "samples_every", "dynamic_sampling"):
            if getattr(self, field) < 0:
                raise ValueError(f"training.{field}={getattr(self, field)} must not be negative")


@dataclasses.dataclass(frozen=True)
class CriticSource:
    """The critic of an algorithm that is made of one (PPO)."""

    shares_trunk: bool = False
    """A head on the policy's last state, trained by one joint loss; else a transformer of its own."""
    stop_gradient: bool = False
    """With a shared trunk, let only the head learn from the values."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """Of a critic of its own."""


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
        rewards: reward functions and weights; `None` where all rewards are `device_rewards`: then an iteration is one
            program.
        algorithm: the objective.
        run_dir: folder of metrics and checkpoints.
        mesh: the device mesh.
        device_rewards: rewards that are JAX functions, added to the others.
        eval_rewards: reward functions of the evaluation; `None`: `rewards`.
        judge: for algorithms that read verdicts (BRPO): see `jaxrl_llm.training.judging`.
        critic: for algorithms that are made of one (PPO).
        trust_region: TRPO's step in place of the optimizer's.
        critic_params: parameters of a `ScoreModel` from which a critic of its own starts; `None`: the policy's, with a
            new head.
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
        rewards: RewardSum | None,
        algorithm: PolicyGradient,
        run_dir: str | Path,
        mesh: jax.sharding.Mesh,
        eval_dataset: PromptDataset | None = None,
        device_rewards: Sequence[DeviceReward] = (),
        eval_rewards: RewardSum | None = None,
        judge: Judge | None = None,
        critic: CriticSource | None = None,
        critic_params: Params | None = None,
        trust_region: TrustRegionConfig | None = None,
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

        self.algorithm, self.judge, self.device_rewards = algorithm, judge, tuple(device_rewards)
        scored_by = eval_rewards or rewards

        # All that can be wrong is found before anything is compiled.
        if group < algorithm.advantage.smallest_group:  # a group of equal rewards has advantages of 0
            raise ValueError(
                f"training.samples_per_prompt={group} cannot learn: {type(algorithm.advantage).__name__} compares a "
                "sample with the others of its prompt; pass --training.samples-per-prompt=2 or more"
            )
        if trust_region is not None and plan.optimizer_steps > 1:
            raise ValueError(
                f"update.epochs={plan.epochs} and update.minibatches={plan.minibatches} would have no effect: a trust "
                "region makes one step of a batch; pass 1"
            )
        self._check_rewards()
        self.saved = find_run(run_dir, self.description, resume=resume)
        if rewards is not None:
            rewards.check_columns(dataset.column_names)
        plan.group_split(prompts, group, row_shards(mesh), whole_groups=algorithm.needs_whole_groups)
        self.loader = PromptLoader(dataset, batch_size=prompts, seed=seed)
        if self.saved:
            self.loader.set_state(self.saved.data)
        self.sampler = Sampler(
            model, sampling, group=group, stop_tokens=stop_tokens, mesh=mesh, greedy=algorithm.needs_greedy
        )
        self.sampler.check_length(dataset.longest)
        self.evaluator = None
        if self.evaluation.every:
            if eval_dataset is None:
                raise ValueError(f"evaluation.every={self.evaluation.every}, but there are no held-out prompts")
            if scored_by is None:
                raise ValueError(
                    f"evaluation.every={self.evaluation.every}, but all rewards are JAX functions: pass eval_rewards"
                )
            self.evaluator = Evaluator(
                model,
                eval_dataset,
                tokenizer,
                scored_by,
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
        self._prepare_updates(
            params, plan, optimizer, sampling, seed, critic or CriticSource(), critic_params, trust_region
        )
        self.compilations = CompilationCounter()
        self.phases = ("sample", "reward", "update") if self._iteration is None else ("iteration",)

    def _check_rewards(self) -> None:
        """Raises if what is rewarded and what the algorithm reads do not fit together."""
        needs, name = self.algorithm.advantage.needs, type(self.algorithm.advantage).__name__
        if self.rewards is None and not self.device_rewards:
            raise ValueError("there is no reward: pass rewards=, or device_rewards=")
        if ("verdicts" in needs) != (self.judge is not None):
            raise ValueError(
                f"{name} " + ("reads a judge's verdicts: pass judge=" if self.judge is None else "reads no verdicts")
            )
        if self.rewards is not None:
            return
        if needs & {"verdicts", "by_function"}:
            raise ValueError(f"{name} reads what reward functions say: pass rewards=")
        if self.config.dynamic_sampling:
            raise ValueError(
                f"training.dynamic_sampling={self.config.dynamic_sampling} looks at rewards on the host: "
                "pass rewards=, or 0"
            )

    def _prepare_updates(
        self,
        params: Params,
        plan: UpdateConfig,
        config: OptimizerConfig,
        sampling: SamplingConfig,
        seed: int,
        source: CriticSource,
        critic_params: Params | None,
        trust_region: TrustRegionConfig | None,
    ) -> None:
        """The programs, still to be compiled, and what they work on: the state, and the reference if it has one."""
        algorithm, total = self.algorithm, self.config.steps * plan.optimizer_steps
        schedule = make_schedule(config, total)
        optimizer = make_optimizer(config, schedule) if trust_region is None else optax.identity()
        critic = self._make_critic(source, total) if algorithm.needs_critic else None
        drawn = {"temperature": sampling.temperature, "truncated": sampling.truncates}
        if trust_region is None:
            step = make_update_step(self.model, optimizer, algorithm, plan, critic=critic, **drawn)
        else:
            pieces = plan.micro_batches
            step = make_trust_region_step(self.model, algorithm, trust_region, micro_batches=pieces, **drawn)
        self.abstract_state = abstract_train_state(self.model, optimizer, self.mesh, algorithm=algorithm, critic=critic)
        placed: TrainState = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        whole = replicated(self.mesh)

        def start(params: Params, own: Params | None) -> TrainState:
            if critic is not None and critic.shares_trunk:
                params = critic.model.from_trunk(params)
            elif critic is not None and own is None:
                own = critic.model.from_trunk(params)
            return make_train_state(params, optimizer, seed, algorithm=algorithm, critic=critic, critic_params=own)

        with jax.set_mesh(self.mesh):
            # a copy of the parameters: updates overwrite it
            self.state: TrainState = jax.jit(start, out_shardings=placed)(params, critic_params)
            shardings = {name: placed.params[name] for name in params}
            needed = algorithm.needs_reference and not has_adapters(params)  # without them, the policy is the base
            self.reference = jax.device_put(params, shardings) if needed else None
        check_frozen(self.saved, self.state)
        self.update = jax.jit(step, donate_argnums=0, out_shardings=(placed, whole))
        self._score = self._iteration = None
        if self.device_rewards and self.rewards is not None:
            self._score = jax.jit(make_device_scores(self.device_rewards), out_shardings=whole)
        elif self.device_rewards:
            iteration = make_iteration(self.sampler, self.device_rewards, step)
            shardings: Any = (placed, whole, whole, whole)
            self._iteration = jax.jit(iteration, donate_argnums=0, out_shardings=Iteration(*shardings))
        self._learning_rates = np.asarray(jax.jit(jax.vmap(schedule))(np.arange(total)))

    def _make_critic(self, source: CriticSource, total: int) -> Critic:
        model = ScoreModel(self.model, lm_head=source.shares_trunk)
        if source.shares_trunk:
            return Critic(model, stop_gradient=source.stop_gradient)
        return Critic(model, make_optimizer(source.optimizer, make_schedule(source.optimizer, total)))

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
        if self._iteration is not None:
            return self._iterate_on_device(phase)
        rollout, episodes, drawn = self._collect(step, phase)
        with phase("update"), jax.set_mesh(self.mesh):
            feedback = self._feedback(rollout, episodes, step)
            self.state, metrics = self.update(self.state, rollout, feedback, self.reference)
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        remarks = [
            f"the reward function {name!r} returned None for all {episodes.rewards.size} samples, and has no part in "
            "their reward; can it read the gold answers in the data?"
            for name in episodes.without_effect()
        ]
        metrics |= episodes.reward_metrics() | drawn
        return Outcome(metrics, partial(episodes.samples, self.tokenizer), remarks)

    def _collect(self, step: int, phase: Phase) -> tuple[Rollout, Episodes, dict[str, float]]:
        """Completions of a step's prompts with their rewards, and metrics of how they were found."""
        wanted, rounds = self.config.prompts_per_step, max(1, self.config.dynamic_sampling)
        filled = GroupBuffer(wanted)
        for number in range(rounds):
            with phase("sample"):
                batch = next(self.loader)
                key = np.asarray(self.state.key) ^ np.uint32(number)  # the rounds of a step draw apart
                rollout = self.sampler(self.state.params, batch.tokens, batch.lengths, key, step)
                jax.block_until_ready(rollout)
            with phase("reward"):
                assert self.rewards is not None
                episodes = score_rollout(rollout, batch, self.rewards, self.tokenizer)
                if self._score is not None:
                    episodes = self._with_device_rewards(rollout, episodes)
            if not self.config.dynamic_sampling:
                return rollout, episodes, {}
            if filled.add(jax.device_get(rollout), episodes):
                break
        return *filled.take(), {"dynamic_sampling/rounds": number + 1, "dynamic_sampling/kept": filled.kept_share}

    def _with_device_rewards(self, rollout: Rollout, episodes: Episodes) -> Episodes:
        assert self._score is not None
        with jax.set_mesh(self.mesh):
            scores = jax.device_get(self._score([reward.params for reward in self.device_rewards], rollout))
        return episodes.plus(scores.total, scores.by_name)

    def _feedback(self, rollout: Rollout, episodes: Episodes, step: int) -> Any:
        """Rewards, and what else the algorithm reads."""
        needs = self.algorithm.advantage.needs
        rewards = episodes.rewards if episodes.token_rewards is None else episodes.token_rewards
        if "by_function" in needs:
            table = np.stack([np.nan_to_num(values) for values in episodes.by_name.values()], axis=-1)
            return Feedback(rewards, by_function=table)
        if self.judge is not None:
            verdicts = compare(self.judge, episodes, self.tokenizer, np.asarray(self.state.key), step)
            return Feedback(rewards, **verdicts)
        return rewards

    def _iterate_on_device(self, phase: Phase) -> Outcome:
        """Samples, scores and updates in one program."""
        assert self._iteration is not None
        with phase("iteration"), jax.set_mesh(self.mesh):
            batch = next(self.loader)
            given = [reward.params for reward in self.device_rewards]
            done = self._iteration(self.state, batch.tokens, batch.lengths, given, self.reference)
            self.state, metrics, rollout, scores = done
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        episodes = unscored(rollout, batch).plus(*jax.device_get(scores))
        return Outcome(metrics | episodes.reward_metrics(), partial(episodes.samples, self.tokenizer))

    def evaluate(self, phase: Phase) -> Outcome:
        """Decodes the held-out prompts and scores them."""
        assert self.evaluator is not None  # evaluation.every says when, and is 0 without
        with phase("evaluate"):
            metrics, episodes = self.evaluator(self.state.params, np.asarray(self.state.key) ^ EVALUATION_KEY)
        return Outcome(metrics, partial(episodes.samples, self.tokenizer))


def _count(dataset: PromptDataset) -> str:
    dropped = f" ({dataset.dropped} too long were dropped)" if dataset.dropped else ""
    return f"{len(dataset)} prompts{dropped}"
