"""Runs that diverge: updates without effect counted, sampled log-probs looked at, and what is still good named."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jaxrl_llm.training.run.errors import RunError
from jaxrl_llm.types import Rollout

FEW = 3
"""Steps in a row without effect that are worth a line."""


class DivergedError(RunError):
    """The parameters are no longer those of a good model: they are not saved, and nothing is exported."""

    status = 1


class SkippedSteps:
    """Counts the steps in a row of whose updates at least half were skipped, since their gradients were not finite.

    Args:
        limit: so many end the run; 0: any number may be skipped.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._steps = self.in_a_row = 0

    def count(self, share: float) -> None:
        """Counts a step of whose updates this share was skipped."""
        self._steps += 1
        self.in_a_row = self.in_a_row + 1 if share >= 0.5 else 0

    def __str__(self) -> str:
        return f"the gradients of the last {self.in_a_row} step(s) were not finite"

    @property
    def suspicious(self) -> bool:
        """Whether there are so many that the parameters may not be worth saving."""
        return self.in_a_row >= FEW

    def diverged(self, *, ending: bool) -> bool:
        """Whether the run must stop or, where it is ending anyway, must not be called good."""
        most = 2 * self.in_a_row >= self._steps
        return bool(self.in_a_row) and (0 < self._limit <= self.in_a_row or (ending and (self.suspicious or most)))

    def good_checkpoint(self, step: int, saved: Sequence[int]) -> str:
        """A clause on the latest checkpoint whose parameters have led to a finite gradient.

        The parameters after a step are known by the gradient of the next: those before the first of a row of skipped
        steps are the ones at fault.

        Args:
            step: steps done.
            saved: steps of the checkpoints.
        """
        good = [number for number in saved if number <= step - self.in_a_row - 1]
        return f"checkpoint {good[-1]} is from before" if good else "no checkpoint is from before"


def check_finite(rollout: Rollout) -> None:
    """Checks what was sampled, of whose ids nothing else can be said where logits are not finite.

    Raises:
        DivergedError: some log-probs are not finite.
    """
    logprobs, lengths = jax.device_get((rollout.logprobs, rollout.completion_lengths))
    sampled = np.arange(logprobs.shape[-1]) < lengths[..., None]
    if bad := int(np.any(~np.isfinite(logprobs) & sampled, axis=-1).sum()):
        raise DivergedError(f"the model's logits are not finite in {bad} of {lengths.size} completions")
