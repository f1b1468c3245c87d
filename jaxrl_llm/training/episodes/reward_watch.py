"""Tells a person of reward functions from which nothing can be learned."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxrl_llm.training.episodes.episodes import Episodes

_PATIENCE = 5
"""Steps after which a reward that does not differ is told."""


class RewardWatch:
    """Looks at the rewards of step after step, and says of each function once what is wrong with it.

    Args:
        weights: Of the functions, by name; those of weight 0 teach nothing by intention.
        in_groups: Whether samples are compared with the others of their prompt alone.
    """

    def __init__(self, weights: Mapping[str, float], *, in_groups: bool) -> None:
        self._names = [name for name, weight in weights.items() if weight]
        self._in_groups, self._first = in_groups, True
        self._constant = dict.fromkeys(self._names, 0)
        self._renamed: set[str] = set()

    def remarks(self, episodes: Episodes) -> list[str]:
        """What is to be said after a step."""
        said = []
        if self._first:
            said = [
                f"the reward function {name!r} returned None for all {episodes.rewards.size} samples, and has no part "
                "in their reward; can it read the gold answers in the data?"
                for name in episodes.without_effect()
            ]
        self._first = False
        for name in list(self._names):
            values = episodes.by_name[name]
            self._constant[name] = self._constant[name] + 1 if self._is_constant(values) else 0
            if self._constant[name] == _PATIENCE:
                self._names.remove(name)
                said.append(self._told(name, values))
        return said

    def renamed(self, name: str, new: str) -> list[str]:
        """What is to be said of a metric that the run has itself."""
        told, self._renamed = name in self._renamed, self._renamed | {name}
        return (
            [] if told else [f"log_metric({name!r}, …) bears the name of a metric of the run, and is shown as {new!r}"]
        )

    def _is_constant(self, values: np.ndarray) -> bool:
        """Whether no two samples that are compared differ; where nothing is known, there is nothing to tell."""
        rows = values if self._in_groups else values.reshape(1, -1)
        known = ~np.isnan(rows)
        most, least = np.where(known, rows, -np.inf).max(axis=1), np.where(known, rows, np.inf).min(axis=1)
        return bool(known.any() and (most <= least).all())

    def _told(self, name: str, values: np.ndarray) -> str:
        known = values[~np.isnan(values)]
        value = f" ({known[0]:g})" if np.ptp(known) == 0 else ""
        alike = f"all {values.shape[1]} samples of each prompt" if self._in_groups else "every sample"
        return (
            f"for {_PATIENCE} steps the reward function {name!r} has given {alike} the same reward{value}: what is "
            "learned is what makes one sample better than another, so it teaches nothing. Does it read the text "
            "(completion_text reads that of chat completions, too), and can the model get it both right and wrong?"
        )
