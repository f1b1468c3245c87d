"""On-policy distillation: the policy's own samples, and at each token the next-token distributions of teachers.

With one teacher and exact divergences it is GKD on the student's samples (Agarwal et al. 2023, 2306.13649); with
sampled ones, on-policy distillation by token (Lu & Thinking Machines Lab 2025); with the policy itself as a teacher
that is told more, SDFT and SDPO (`self_teacher`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxrl_llm.algorithms.distillation.self_teacher import SelfTeacher
from jaxrl_llm.algorithms.interfaces import Algorithm, Need
from jaxrl_llm.checks import at_least, check_fields, one_of, share
from jaxrl_llm.losses import AggregationMode

Divergence = Literal["exact", "sampled"]


@dataclasses.dataclass(frozen=True)
class Distillation(Algorithm):
    """Σ over teachers of weight × divergence(teacher, policy), at each token that the policy sampled.

    Rewards are told, and not learned from, but that the policy as its own teacher may be shown what was rewarded.
    """

    beta: float = 1.0
    """1: reverse KL(policy ‖ teacher); 0: forward KL(teacher ‖ policy); between: see `generalized_jsd`."""
    divergence: Divergence = "exact"
    """exact: over the whole vocabulary; sampled: the log-ratio of the sampled token, an estimate of the reverse KL."""
    weights: tuple[float, ...] | None = None
    """One a teacher; `None`: they are alike, and sum to 1."""
    aggregation: AggregationMode = "token-mean"
    """How token losses become one number."""
    max_length: int | None = None
    """Constant of `seq-mean-token-sum-norm`; `None`: the configured length of completions."""
    itself: SelfTeacher | None = None
    """The policy as a teacher, the last of them, which is told more: --algorithm.itself.policy=average."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        weights = self.weights
        check_fields(
            "algorithm",
            self,
            beta=share(self.beta),
            divergence=one_of(self.divergence, Divergence),
            weights=(
                weights is None or (any(weights) and all(0 <= weight < math.inf for weight in weights)),
                "be None, or finite numbers that are not negative, nor all 0",
            ),
            aggregation=one_of(self.aggregation, AggregationMode),
            max_length=at_least(self.max_length, 1, optional=True),
        )
        if self.divergence == "sampled" and self.beta != 1:
            raise ValueError(
                f"algorithm.beta={self.beta} would have no effect: the sampled divergence is the reverse KL; pass "
                "--algorithm.beta=1, or --algorithm.divergence=exact"
            )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        if self.aggregation == "seq-mean-token-sum-norm":
            return {}
        return {"max_length": "only algorithm.aggregation='seq-mean-token-sum-norm' divides by it"}

    @property
    def reader(self) -> str:
        """Its own name."""
        return type(self).__name__

    @property
    def smallest_group(self) -> int:
        """Nothing is compared."""
        return 1

    @property
    def needs(self) -> frozenset[Need]:
        """Teachers, unless the policy is its own; then what it is told, and perhaps how it began."""
        if self.itself is None:
            return frozenset({"teachers"})
        return frozenset({"hints", "reference"} if self.itself.policy == "start" else {"hints"})

    @property
    def averages_policy(self) -> bool:
        """Whether an average of the policy is its teacher."""
        return self.itself is not None and self.itself.policy == "average"

    @property
    def skips_unscored(self) -> bool:
        """Rewards are not learned from."""
        return True

    @property
    def needs_whole_groups(self) -> bool:
        """Whether the aggregation looks at groups."""
        return self.aggregation.startswith("group")

    def weights_of(self, others: int) -> tuple[float, ...]:
        """The weight of each of so many other models that teach, and of the policy if it does.

        Raises:
            ValueError: there is none, or another number of weights.
        """
        teachers = others + (self.itself is not None)
        if not teachers:
            raise ValueError(f"{self.reader} has nobody to learn from: pass teachers")
        if self.weights is None:
            return (1 / teachers,) * teachers
        if len(self.weights) != teachers:
            raise ValueError(
                f"algorithm.weights={self.weights} are {len(self.weights)} for {teachers} teachers: one each"
            )
        return self.weights
