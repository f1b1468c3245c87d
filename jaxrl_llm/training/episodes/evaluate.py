"""Evaluation on held-out prompts: greedy decoding, and pass@k."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm.checks import check_fields, count
from jaxrl_llm.data.loader import eval_batches
from jaxrl_llm.data.prompts import PromptBatch, PromptDataset
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.layout import sampling_mesh
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import row_shards
from jaxrl_llm.training.episodes.episodes import Episodes, mean_of_known, score_rollout
from jaxrl_llm.training.episodes.estimates import solved_within
from jaxrl_llm.training.episodes.scorable import check_scorable
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.episodes.telling import Sums, TrainerState, added, means
from jaxrl_llm.types import Rollout


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When and how held-out prompts are evaluated."""

    every: int = 0
    """Steps between evaluations; one more comes before the first step and one after the last. 0: none."""
    max_prompts: int | None = 256
    """Use the first prompts only."""
    samples: int = 0
    """Samples a prompt for pass@k, drawn as in training; 0 decodes greedily only."""
    solved_by: str | None = None
    """Reward function whose value of at least 1 means that a prompt is solved; `None`: the first one."""
    batch_size: int | None = None
    """Prompts decoded at a time; `None`: as many as a training step has rows."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant."""
        least = {"every": 0, "max_prompts": 1, "samples": 0, "batch_size": 1}
        check_fields("evaluation", self, **{name: count(getattr(self, name), least=n) for name, n in least.items()})

    def solving_reward(self, rewards: RewardSum) -> str:
        """The name of the function that says what is solved.

        Raises:
            ValueError: `solved_by` names none of them.
        """
        name = self.solved_by or rewards.names[0]
        if name not in rewards.names:
            raise ValueError(
                f"evaluation.solved_by={name!r} is no reward function; there are {', '.join(rewards.names)}"
            )
        return name


class Scores(NamedTuple):
    """What is counted of G completions of each of P prompts."""

    rewards: dict[str, np.ndarray]
    """`[P, G]` by function, NaN where one does not apply; under the empty name the sum of those that do."""
    lengths: np.ndarray
    """`[P, G]` tokens."""
    finished: np.ndarray
    """`[P, G]` bool: ended by a stop token or a stop text."""

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Of all prompts, one batch after another."""
        rewards = {name: np.concatenate([part.rewards[name] for part in parts]) for name in parts[0].rewards}
        return cls(
            rewards,
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.finished for part in parts]),
        )


class Decoded(NamedTuple):
    """Completions of a batch's prompts, each of which counts once."""

    rows: np.ndarray
    """`[P]` numbers of the prompts' rows in the source."""
    episodes: Episodes
    """The completions with their rewards."""
    scores: Scores
    """What is counted of them."""


class Evaluator:
    """Decodes every held-out prompt and scores it; compiled once.

    Args:
        model: the transformer.
        dataset: held-out prompts.
        tokenizer: decodes completions.
        rewards: the reward functions of training.
        config: what to measure.
        sampling: how training samples; its length limit holds here, too.
        stop_tokens: ids that end a completion.
        mesh: the device mesh.
        rows: rows of a training step, the default batch size.
        greedy: whether to decode greedily, which training does.
        resident: as `Sampler`.
    """

    def __init__(
        self,
        model: Transformer,
        dataset: PromptDataset,
        tokenizer: Any,
        rewards: RewardSum,
        config: EvaluationConfig,
        *,
        sampling: SamplingConfig,
        stop_tokens: tuple[int, ...],
        mesh: jax.sharding.Mesh,
        rows: int,
        greedy: bool = True,
        resident: int | None = None,
    ):
        self.solved_by = config.solving_reward(rewards)
        check_scorable(rewards, dataset)
        self._dataset, self._tokenizer, self._rewards = dataset, tokenizer, rewards
        shards = row_shards(sampling_mesh(mesh, sampling.tensor))
        wanted = min(config.batch_size or rows, len(dataset))
        self._batch_size = -(-wanted // shards) * shards
        given: dict[str, Any] = {"stop_tokens": stop_tokens, "mesh": mesh, "tokenizer": tokenizer, "resident": resident}
        self._greedy = Sampler(model, sampling.as_greedy(), group=1, **given) if greedy else None
        self._samples, self._stop_tokens = config.samples, stop_tokens
        self._drawn = Sampler(model, sampling, group=config.samples, **given) if config.samples else None
        for sampler in (self._greedy, self._drawn):
            if sampler is not None:
                sampler.check_length(dataset.longest, width=dataset.max_prompt_length)

    def __call__(
        self, params: Params, key: np.ndarray, trainer_state: TrainerState | None = None
    ) -> tuple[dict[str, float], Episodes]:
        """Evaluates `params`.

        Args:
            params: the policy's parameters.
            key: uint32 key data of the sampling noise, the same at each evaluation, so that they compare.
            trainer_state: as `score_rollout`.

        Returns:
            Metrics: `eval/reward`, `eval/rewards/<name>`, `eval/accuracy` (prompts solved greedily),
            `eval/completion_length`, `eval/finished`, with samples `eval/pass@1` and `eval/pass@k`, and what reward
            functions told of greedy completions; and the first batch's greedy completions.

        Raises:
            RewardError: a reward function failed.
        """
        greedy, drawn, first = [], [], None
        told: Sums = {}
        for decoded, sampled in self.batches(params, key, trainer_state):
            assert decoded is not None  # unless it is left out, which training does not
            first = first or decoded.episodes
            told = added(told, decoded.episodes.told)
            greedy.append(decoded.scores)
            if sampled is not None:
                drawn.append(sampled.scores)
        scores = Scores.joined(greedy)
        metrics = {f"eval/{name}": value for name, value in means(told).items()}
        metrics |= {f"eval/rewards/{name}": mean_of_known(scores.rewards[name]) for name in self._rewards.names}
        metrics["eval/reward"] = mean_of_known(scores.rewards[""])
        metrics["eval/accuracy"] = float(np.mean(scores.rewards[self.solved_by] >= 1))
        metrics["eval/completion_length"] = float(scores.lengths.mean())
        metrics["eval/finished"] = float(scores.finished.mean())
        if drawn:
            solved = Scores.joined(drawn).rewards[self.solved_by] >= 1
            for k in sorted({1, self._samples}):
                metrics[f"eval/pass@{k}"] = float(solved_within(solved, k).mean())
        assert first is not None  # a data set is never empty
        return metrics, first

    def batches(
        self, params: Params, key: np.ndarray, trainer_state: TrainerState | None = None
    ) -> Iterator[tuple[Decoded | None, Decoded | None]]:
        """Completions of one batch of prompts after another: the greedy ones, and the samples, where there are any.

        Args:
            params: the policy's parameters.
            key: as `__call__`.
            trainer_state: as `score_rollout`.

        Raises:
            RewardError: a reward function failed.
        """
        for number, batch in enumerate(eval_batches(self._dataset, batch_size=self._batch_size)):
            rollouts = [  # both at once: the device need not wait until the first is scored
                None if sampler is None else sampler(params, batch.tokens, batch.lengths, key, number)
                for sampler in (self._greedy, self._drawn)
            ]
            greedy, drawn = (
                None if rollout is None else self._decoded(rollout, batch, trainer_state, number)
                for rollout in rollouts
            )
            yield greedy, drawn

    def _decoded(
        self, rollout: Rollout, batch: PromptBatch, trainer_state: TrainerState | None, number: int
    ) -> Decoded:
        """The completions of the prompts that count."""
        chosen = np.flatnonzero(batch.valid)
        scored = score_rollout(
            rollout,
            batch,
            self._rewards,
            self._tokenizer,
            stop_tokens=self._stop_tokens,
            trainer_state=trainer_state,
            lacking="all" if number else "some",
        )
        episodes = scored.groups(chosen.tolist())
        scores = Scores(
            {"": episodes.rewards} | episodes.by_name,
            np.asarray(rollout.completion_lengths)[chosen],
            np.asarray(rollout.finished)[chosen],
        )
        return Decoded(batch.indices[chosen], episodes, scores)


def make_evaluator(
    config: EvaluationConfig,
    model: Transformer,
    dataset: PromptDataset | None,
    tokenizer: Any,
    rewards: RewardSum | None,
    *,
    sampling: SamplingConfig,
    stop_tokens: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    rows: int,
    resident: int | None = None,
) -> Evaluator | None:
    """The evaluator that a run's settings ask for; `None`: they ask for none.

    Args:
        config: what to measure, and whether at all.
        model: the transformer.
        dataset: held-out prompts, if there are any.
        tokenizer: decodes completions.
        rewards: reward functions on the host, if there are any.
        sampling: as `Evaluator`.
        stop_tokens: ids that end a completion.
        mesh: the device mesh.
        rows: as `Evaluator`.
        resident: as `Evaluator`.

    Raises:
        ValueError: it asks for one, and prompts or reward functions are missing.
    """
    if not config.every:
        return None
    if dataset is None:
        raise ValueError(f"evaluation.every={config.every}, but there are no held-out prompts")
    if rewards is None:
        raise ValueError(f"evaluation.every={config.every}, but all rewards are JAX functions: pass eval_rewards")
    return Evaluator(
        model,
        dataset,
        tokenizer,
        rewards,
        config,
        sampling=sampling,
        stop_tokens=stop_tokens,
        mesh=mesh,
        rows=rows,
        resident=resident,
    )
