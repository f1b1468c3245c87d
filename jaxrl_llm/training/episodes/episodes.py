"""From sampled tokens to text and rewards, on the host."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.training.episodes.reading import completion_of, completion_text
from jaxrl_llm.training.episodes.scoring import RewardScores, RewardSum
from jaxrl_llm.training.episodes.telling import Sums, TrainerState, added, means
from jaxrl_llm.training.episodes.user_functions import RewardError, together
from jaxrl_llm.training.run.distributed import from_all_processes
from jaxrl_llm.training.run.divergence import check_finite
from jaxrl_llm.training.run.report import SampledCompletion
from jaxrl_llm.types import Rollout

Lacking = Literal["none", "some", "all"]
"""How many samples may be without a reward."""


@dataclasses.dataclass(frozen=True)
class Episodes:
    """G completions of each of P prompts, decoded and scored; the same in every process."""

    rewards: np.ndarray
    """`[P, G]` float32: the weighted sum; NaN where no function applies."""
    by_name: dict[str, np.ndarray]
    """`[P, G]` float32 by reward function; NaN where one does not apply."""
    prompts: list[Any]
    """Text or messages, one a prompt."""
    completion_ids: list[list[int]]
    """Sampled ids, prompt-major: the G samples of prompt 0 first."""
    columns: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """The other columns of the data, one value a prompt."""
    finished: list[bool] = dataclasses.field(default_factory=list)
    """Whether each completion ended with a stop token, as `completion_ids`."""
    openings: list[str] = dataclasses.field(default_factory=list)
    """What each prompt has begun of its completions; see `PromptBatch.openings`."""
    token_rewards: np.ndarray | None = None
    """`[P, G, Tc]` float32, where rewards are given by token, 0 at padding; `rewards` is their sum."""
    reference_rewards: np.ndarray | None = None
    """`[P, N]` float32: of what the reference drew of the same prompts, where the algorithm reads them."""
    told: Sums = dataclasses.field(default_factory=dict)
    """Metrics that reward functions told beside their rewards."""
    extra: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """What they told of each completion, by column, as `completion_ids`; `None` where nothing."""
    ended: list[bool] = dataclasses.field(default_factory=list)
    """Whether each completion ended, by a stop token or a stop text, as `completion_ids`; others were cut."""
    rows: list[int] = dataclasses.field(default_factory=list)
    """Each prompt's row in the data."""

    def plus(self, extra: np.ndarray, by_name: dict[str, np.ndarray]) -> Episodes:
        """The same with more rewards, `[P, G]` or `[P, G, Tc]` (0 at padding), and each of them by name, `[P, G]`."""
        names, own = self.by_name | by_name, np.nan_to_num(self.rewards)
        if len(names) < len(self.by_name) + len(by_name):
            raise RewardError(f"two rewards are named {sorted(self.by_name.keys() & by_name.keys())}: rename one")
        if extra.ndim == 2:
            return dataclasses.replace(self, rewards=own + extra, by_name=names)
        last = np.array([len(ids) - 1 for ids in self.completion_ids]).reshape(self.rewards.shape)
        token_rewards = np.array(extra, np.float32)
        np.put_along_axis(
            token_rewards,
            last[..., None],
            np.take_along_axis(token_rewards, last[..., None], axis=-1) + own[..., None],
            axis=-1,
        )
        total = own + extra.sum(axis=-1)
        return dataclasses.replace(self, rewards=total, by_name=names, token_rewards=token_rewards)

    def groups(self, chosen: list[int]) -> Episodes:
        """Only these prompts, with their samples."""
        size = self.rewards.shape[1]
        samples = [p * size + g for p in chosen for g in range(size)]
        return Episodes(
            self.rewards[chosen],
            {name: values[chosen] for name, values in self.by_name.items()},
            [self.prompts[p] for p in chosen],
            [self.completion_ids[sample] for sample in samples],
            {name: [values[p] for p in chosen] for name, values in self.columns.items()},
            [self.finished[sample] for sample in samples],
            [self.openings[p] for p in chosen],
            None if self.token_rewards is None else self.token_rewards[chosen],
            None if self.reference_rewards is None else self.reference_rewards[chosen],
            self.told,
            {name: [values[sample] for sample in samples] for name, values in self.extra.items()},
            [self.ended[sample] for sample in samples] if self.ended else [],
            [self.rows[p] for p in chosen] if self.rows else [],
        )

    def first(self, count: int) -> Episodes:
        """Only the first so many samples of each prompt: without the greedy one that may lie behind them."""
        size = self.rewards.shape[1]
        return dataclasses.replace(
            self,
            rewards=self.rewards[:, :count],
            by_name={name: values[:, :count] for name, values in self.by_name.items()},
            completion_ids=[ids for n, ids in enumerate(self.completion_ids) if n % size < count],
            finished=[finished for n, finished in enumerate(self.finished) if n % size < count],
            token_rewards=None if self.token_rewards is None else self.token_rewards[:, :count],
            extra={
                name: [value for n, value in enumerate(values) if n % size < count]
                for name, values in self.extra.items()
            },
            ended=[ended for n, ended in enumerate(self.ended) if n % size < count],
        )

    @classmethod
    def joined(cls, parts: list[Episodes]) -> Episodes:
        """The prompts of several batches, one batch after the other."""
        first = parts[0]
        by_token = [part.token_rewards for part in parts if part.token_rewards is not None]
        of_reference = [part.reference_rewards for part in parts if part.reference_rewards is not None]
        return cls(
            np.concatenate([part.rewards for part in parts]),
            {name: np.concatenate([part.by_name[name] for part in parts]) for name in first.by_name},
            [prompt for part in parts for prompt in part.prompts],
            [ids for part in parts for ids in part.completion_ids],
            {name: [value for part in parts for value in part.columns[name]] for name in first.columns},
            [finished for part in parts for finished in part.finished],
            [opening for part in parts for opening in part.openings],
            np.concatenate(by_token) if by_token else None,
            np.concatenate(of_reference) if of_reference else None,
            functools.reduce(added, [part.told for part in parts]),
            {
                name: [value for part in parts for value in part.extra.get(name, [None] * len(part.completion_ids))]
                for name in dict.fromkeys(name for part in parts for name in part.extra)
            },
            [ended for part in parts for ended in part.ended],
            [row for part in parts for row in part.rows],
        )

    def reward_metrics(self) -> dict[str, float]:
        """`rewards/<name>/mean` and `std` of each function, over the samples that it applies to; and what it told."""
        metrics = means(self.told)
        for name, values in self.by_name.items():
            metrics[f"rewards/{name}/mean"] = mean = mean_of_known(values)
            metrics[f"rewards/{name}/std"] = mean_of_known((values - mean) ** 2) ** 0.5
        return metrics

    def without_effect(self) -> list[str]:
        """Names of the reward functions that apply to no sample."""
        return [name for name, values in self.by_name.items() if np.isnan(values).all()]

    def samples(self, tokenizer: Any, count: int) -> list[SampledCompletion]:
        """Some completions for a person to read: the best and worst of the first prompts."""
        return list(itertools.islice(self._best_and_worst(tokenizer), count))

    def _best_and_worst(self, tokenizer: Any) -> Iterator[SampledCompletion]:
        group = self.rewards.shape[1]
        for number, (prompt, rewards) in enumerate(zip(self.prompts, self.rewards, strict=True)):
            lacks = np.isnan(rewards)
            best, worst = np.where(lacks, -np.inf, rewards).argmax(), np.where(lacks, np.inf, rewards).argmin()
            for sample in dict.fromkeys((int(best), int(worst))):
                text = tokenizer.decode(self.completion_ids[number * group + sample], skip_special_tokens=False)
                yield SampledCompletion(prompt_text(prompt), text, float(rewards[sample]))


def mean_of_known(values: np.ndarray) -> float:
    """Mean of the entries that are not NaN; NaN if all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def prompt_text(prompt: Any) -> str:
    """A prompt for a person to read: the text, or the last message's."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def score_rollout(
    rollout: Rollout,
    batch: PromptBatch,
    rewards: RewardSum,
    tokenizer: Any,
    *,
    stop_tokens: Sequence[int],
    trainer_state: TrainerState | None = None,
    lacking: Lacking = "none",
) -> Episodes:
    """Decodes and scores a rollout.

    With several processes each scores its share of the samples, and the results are gathered.

    Args:
        rollout: what the sampler returned; its arrays are replicated.
        batch: the prompts it was sampled from.
        rewards: the reward functions.
        tokenizer: decodes the sampled ids; see `completion_text`.
        stop_tokens: the sampler's, which are no part of a text; stop texts are.
        trainer_state: how far the run is; `None`: there is none.
        lacking: how many samples may be without a reward, because no function applies to them.

    Raises:
        RewardError: a reward function failed, in this process or in another, or too many samples have no reward: all
            raise together.
        DivergedError: the model's logits were not finite.
    """
    ids, (prompts, group) = _sampled_ids(rollout), rollout.completion_lengths.shape
    own = range(jax.process_index(), len(ids), jax.process_count())

    ended = _finished(rollout)
    finished = [stopped and some[-1] in stop_tokens for stopped, some in zip(ended, ids, strict=True)]

    def completion(sample: int) -> Any:
        opening = batch.openings[sample // group]
        text = completion_text(ids[sample], tokenizer, finished=finished[sample], opening=opening)
        return completion_of(batch.prompts[sample // group], text)

    given = (
        [batch.prompts[sample // group] for sample in own],
        [completion(sample) for sample in own],
        [ids[sample] for sample in own],
        {name: [values[sample // group] for sample in own] for name, values in batch.columns.items()},
        trainer_state,
    )
    scores = together(lambda: rewards(*given, may_lack=lacking != "none"), "a reward function")
    table = _gather(np.stack([scores.total, *scores.by_name.values()]), own, len(ids))
    total, *named = table.reshape(-1, prompts, group)
    by_name = dict(zip(scores.by_name, named, strict=True))
    if lacking == "some" and np.isnan(total).all():
        text = completion_text(ids[0], tokenizer, finished=finished[0], opening=batch.openings[0])
        raise RewardError(rewards.none_applies(np.isnan(total).ravel(), [text]) + ": nothing could be learned")
    told, extra = _gather_told(scores, len(ids))
    more = {"told": told, "extra": extra, "ended": ended, "rows": batch.indices.tolist()}
    return Episodes(total, by_name, batch.prompts, ids, batch.columns, finished, batch.openings, **more)


def unscored(rollout: Rollout, batch: PromptBatch, *, stop_tokens: Sequence[int]) -> Episodes:
    """A rollout's completions with rewards of 0: those that a device gives are added by `plus`."""
    zeros, ids, ended = (
        np.zeros(rollout.completion_lengths.shape, np.float32),
        _sampled_ids(rollout),
        _finished(rollout),
    )
    finished = [stopped and some[-1] in stop_tokens for stopped, some in zip(ended, ids, strict=True)]
    more = {"ended": ended, "rows": batch.indices.tolist()}
    return Episodes(zeros, {}, batch.prompts, ids, batch.columns, finished, batch.openings, **more)


def _finished(rollout: Rollout) -> list[bool]:
    return np.asarray(rollout.finished).ravel().tolist()


def _sampled_ids(rollout: Rollout) -> list[list[int]]:
    check_finite(rollout)
    completion, lengths = jax.device_get((rollout.completion, rollout.completion_lengths))
    rows, ends = completion.reshape(-1, completion.shape[-1]), lengths.ravel()
    return [row[:end].tolist() for row, end in zip(rows, ends, strict=True)]


def _gather(table: np.ndarray, own: range, size: int) -> np.ndarray:
    """Columns of all processes, `[functions, size]`, from this one's `[functions, len(own)]`."""
    if jax.process_count() == 1:
        return table
    from jax.experimental import multihost_utils

    whole = np.full((table.shape[0], size), np.nan, np.float32)
    whole[:, own] = table
    shares = multihost_utils.process_allgather(whole)  # [processes, functions, size]
    sample = np.arange(size)
    return np.asarray(shares)[sample % jax.process_count(), :, sample].T


def _gather_told(scores: RewardScores, size: int) -> tuple[Sums, dict[str, list[Any]]]:
    """What reward functions told in all processes, of samples that were dealt out one by one."""
    shares = from_all_processes([scores.metrics, scores.extra])
    told = functools.reduce(added, [metrics for metrics, _ in shares])
    extra: dict[str, list[Any]] = {}
    for process, (_, columns) in enumerate(shares):
        for name, values in columns.items():
            extra.setdefault(name, [None] * size)[process :: len(shares)] = values
    return told, extra
