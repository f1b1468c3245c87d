"""Completions as rows for people and reports: what was sampled, what it was worth, and what was learned of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxrl_llm.training.episodes.episodes import Episodes
from jaxrl_llm.training.episodes.reading import completion_text
from jaxrl_llm.types import Rollout

_DIGITS = 6
"""Of numbers, which are there to be read."""


@dataclasses.dataclass(frozen=True)
class RecordedCompletions:
    """Completions of the first prompts of a step, on the host."""

    episodes: Episodes
    tokenizer: Any
    kind: str
    """"train" or "eval"."""
    logprobs: np.ndarray | None = None
    """`[P, G, Tc]`: of the tokens, under the policy that drew them, at temperature 1."""
    observed: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """What the update made of them by name, `[P, G]` or `[P, G, Tc]`: advantages, and scores where it had any."""
    tokens: int = 0
    """Completions whose tokens are told one by one."""

    @classmethod
    def of(
        cls,
        episodes: Episodes,
        tokenizer: Any,
        *,
        kind: str,
        groups: int,
        rollout: Rollout | None = None,
        tokens: int = 0,
    ) -> RecordedCompletions:
        """The first groups of a step.

        Args:
            episodes: the step's completions with their rewards.
            tokenizer: decodes them.
            kind: "train" or "eval".
            groups: how many prompts.
            rollout: what they were drawn as; the same prompts, and perhaps more samples of each.
            tokens: completions whose tokens are told one by one.
        """
        groups = min(groups, len(episodes.prompts))
        logprobs = None if rollout is None else np.asarray(rollout.logprobs)[:groups, : episodes.rewards.shape[1]]
        return cls(episodes.groups(list(range(groups))), tokenizer, kind, logprobs, {}, tokens)

    def with_observed(self, observed: Mapping[str, Any]) -> RecordedCompletions:
        """The same with what the update made of them."""
        group = self.episodes.rewards.shape[1]
        arrays = {name: np.asarray(values)[: len(self.episodes.prompts), :group] for name, values in observed.items()}
        return dataclasses.replace(self, observed=arrays)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row a completion; see `read_completions`."""
        episodes = self.episodes
        for number, (prompt, sample) in enumerate(np.ndindex(episodes.rewards.shape)):
            ids = episodes.completion_ids[number]
            place = prompt, sample, slice(len(ids))
            yield {
                "kind": self.kind,
                "row": episodes.rows[prompt] if episodes.rows else None,
                "sample": sample,
                "prompt": episodes.prompts[prompt],
                "completion": self._text(number, prompt),
                "reward": _rounded(episodes.rewards[prompt, sample]),
                "rewards": {name: _rounded(values[prompt, sample]) for name, values in episodes.by_name.items()},
                "advantage": self._advantage(place),
                "logprob": None if self.logprobs is None else _rounded(self.logprobs[place].sum(dtype=np.float64)),
                "tokens": len(ids),
                "finished": episodes.ended[number],
                "extra": {name: values[number] for name, values in episodes.extra.items()},
            } | (self._by_token(ids, place) if number < self.tokens else {})

    def _text(self, number: int, prompt: int) -> str:
        """As reward functions read it."""
        episodes = self.episodes
        return completion_text(
            episodes.completion_ids[number],
            self.tokenizer,
            finished=episodes.finished[number],
            opening=episodes.openings[prompt],
        )

    def _advantage(self, place: tuple[int, int, slice]) -> float | None:
        values = self.observed.get("advantages")
        if values is None:
            return None
        return _rounded(values[place[:2]] if values.ndim == 2 else values[place].mean())

    def _by_token(self, ids: list[int], place: tuple[int, int, slice]) -> dict[str, list[Any]]:
        told: dict[str, list[Any]] = {
            "token_ids": ids,
            "token_texts": [self.tokenizer.decode([token], skip_special_tokens=False) for token in ids],
        }
        arrays = {} if self.logprobs is None else {"logprobs": self.logprobs}
        for name, values in (arrays | dict(self.observed)).items():
            if values.ndim == 3:
                told[f"token_{name}"] = [_rounded(value) for value in values[place]]
        return told


def _rounded(value: Any) -> float:
    return float(f"{float(value):.{_DIGITS}g}")
