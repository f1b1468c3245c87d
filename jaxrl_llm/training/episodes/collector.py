"""What a step samples, and how the host scores it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_llm.algorithms.iteration import DeviceReward
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import reference_of
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sharding import on_host
from jaxrl_llm.training.episodes.dynamic_sampling import GroupBuffer
from jaxrl_llm.training.episodes.episodes import Episodes, score_rollout, unscored
from jaxrl_llm.training.episodes.history import CompletionHistory
from jaxrl_llm.training.episodes.reference_rewards import ReferenceRewards
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.episodes.telling import TrainerState
from jaxrl_llm.training.programs import score_program
from jaxrl_llm.training.stage import Phase
from jaxrl_llm.types import Rollout, TrainState

REFERENCE_KEY = np.uint32(0x0FEF)
"""Keeps the noise of the reference's samples apart from that of training."""


class Collector:
    """Samples a step's prompts and scores the completions; with dynamic sampling as often as it takes.

    Args:
        sampler: draws them.
        rewards: reward functions and weights; `None`: there are none on the host.
        device_rewards: rewards that are JAX functions, added to the others.
        tokenizer: decodes completions.
        prompts: of a step.
        rounds: batches of prompts that are sampled at most to fill a step with groups whose rewards differ; 0: one,
            whatever its rewards.
        skips_unscored: learn from the completions that some function has scored, and not from the others.
        first_step: of this run, in which a function that has applied to no sample is taken for a fault.
        told_of: number of steps → what reward functions may know of the run after them.
        reference_rewards: those of the reference's own samples, where the algorithm compares with them.
    """

    def __init__(
        self,
        sampler: Sampler,
        rewards: RewardSum | None,
        *,
        device_rewards: Sequence[DeviceReward],
        tokenizer: Any,
        prompts: int,
        rounds: int,
        skips_unscored: bool,
        first_step: int,
        told_of: Callable[[int], TrainerState],
        reference_rewards: ReferenceRewards | None,
    ):
        self._sampler, self._rewards, self._tokenizer = sampler, rewards, tokenizer
        self._device_params = [reward.params for reward in device_rewards]
        self._score = score_program(device_rewards, sampler.mesh) if device_rewards else None
        self._prompts, self._rounds, self._skips_unscored = prompts, rounds, skips_unscored
        self._first_step, self._told_of, self._reference_rewards = first_step, told_of, reference_rewards
        self.history: CompletionHistory | None = None
        """Of this process: a run that goes on begins with none, and proposes from prompts again."""
        if sampler.config.speculate == "history":
            self.history = CompletionHistory(sampler.group, sampler.config.max_tokens)

    def __call__(
        self,
        loader: Iterator[PromptBatch],
        state: TrainState,
        reference: Params | None,
        step: int,
        phase: Phase,
        *,
        ready: Callable[[], None],
    ) -> tuple[Rollout, Episodes, dict[str, float]]:
        """Completions of a step's prompts with their rewards, and metrics of how they were found.

        Args:
            loader: of prompts.
            state: whose policy samples.
            reference: parameters, for `reference_rewards`.
            step: the number of it.
            phase: times sampling and scoring.
            ready: waits until the sampler has been compiled.
        """
        filled = GroupBuffer(self._prompts)
        for number in range(max(1, self._rounds)):
            with phase("sample"):
                batch = next(loader)
                key = np.asarray(state.key) ^ np.uint32(number)  # the rounds of a step draw apart
                history = self.proposed(batch)
                ready()
                rollout = self._sampler(state.params, batch.tokens, batch.lengths, key, step, history=history)
                jax.block_until_ready(rollout)
                self.remember(batch, rollout)
            with phase("reward"):
                episodes = self._scored(rollout, batch, step)
                if self._reference_rewards is not None:
                    of_reference = self._of_reference(self._reference_rewards, state, reference, batch, key, step)
                    episodes = dataclasses.replace(episodes, reference_rewards=of_reference)
            if not self._rounds:
                return rollout, episodes, {}
            if filled.add(jax.tree.map(on_host, rollout), episodes):
                break
        rollout, episodes = filled.take()
        told = {"dynamic_sampling/rounds": number + 1, "dynamic_sampling/kept": filled.kept_share}
        return self._sampler.placed(rollout), episodes, told

    def _scored(self, rollout: Rollout, batch: PromptBatch, step: int) -> Episodes:
        stops = self._sampler.stop_tokens
        if self._rewards is None:
            episodes = unscored(rollout, batch, stop_tokens=stops)
        else:
            # Where no function has applied to any sample as yet, something is wrong with them.
            lacking = ("some" if step == self._first_step else "all") if self._skips_unscored else "none"
            told: dict[str, Any] = {"stop_tokens": stops, "trainer_state": self._told_of(step - 1), "lacking": lacking}
            episodes = score_rollout(rollout, batch, self._rewards, self._tokenizer, **told)
        if self._score is None:
            return episodes
        with jax.set_mesh(self._sampler.mesh):
            scores = jax.device_get(self._score(self._device_params, rollout))
        return episodes.plus(scores.total, scores.by_name)

    def _of_reference(
        self,
        kept: ReferenceRewards,
        state: TrainState,
        reference: Params | None,
        batch: PromptBatch,
        key: np.ndarray,
        step: int,
    ) -> np.ndarray:
        """Rewards of the reference's samples, which it draws where a prompt comes for the first time."""
        if kept.lacks(batch.indices):
            params = reference_of(state.params, reference)
            assert params is not None  # the algorithm reads its log-probs, too
            rollout = self._sampler(params, batch.tokens, batch.lengths, key ^ REFERENCE_KEY, step)
            kept.keep(batch.indices, self._scored(rollout, batch, step).rewards)
        return kept.of(batch.indices)

    def proposed(self, batch: PromptBatch) -> tuple[np.ndarray, np.ndarray] | None:
        """What the sampler may propose."""
        return None if self.history is None else self.history.of(batch.indices)

    def remember(self, batch: PromptBatch, rollout: Rollout) -> None:
        """Keeps the completions, to be proposed when their prompts come again."""
        if self.history is not None:
            self.history.keep(batch.indices, *jax.device_get((rollout.completion, rollout.completion_lengths)))
