"""The policy as its own teacher: the same model, an average of it or the one at the start, told more than it is told.

What a policy finds likely once it has seen a demonstration, a right answer or what was wrong with its own is what it
learns to find likely without (Shenfeld et al. 2026, "SDFT", 2601.19897; Hübotter et al. 2026, "SDPO", 2601.20802).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.checks import check_fields, count, finite, one_of
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import join, reference_of, split_trainable
from jaxrl_llm.models.rows import Layout, layout_of
from jaxrl_llm.types import TrainState

ITSELF = "itself"
"""Its name among teachers."""

SOLUTION, FEEDBACK = "solution", "feedback"
"""What hints may read beside columns of the data."""

Taught = Literal["average", "current", "start"]


@dataclasses.dataclass(frozen=True)
class SelfTeacher:
    """What teaches, and what it is told beside the prompt; each sample has a prompt of its own for it."""

    policy: Taught = "average"
    """average: a running average of the policy over the steps, part of the checkpoint; current: the policy as it is,
    without a gradient; start: the one that the run begins with."""
    rate: float = 0.05
    """Of the average: average + rate · (policy − average) after each step."""
    hints: tuple[str, ...] = ("\n\nAn answer to this:\n\n{solution}", "\n\nWhat was said of an answer:\n\n{feedback}")
    """What it is told, one text after another: format strings over columns of the data, `solution` (another completion
    of the prompt, the first that was rewarded with `solved` or more) and `feedback` (what a reward function said of the
    sample by log_extra("feedback", …)). One that has nothing to fill it with is left out; a sample without any is not
    learned from."""
    template: str = "{prompt}{hints}\n\nNow give an answer of your own."
    """The prompt with the hints; of a conversation, its last message."""
    solved: float = 1.0
    """Reward of a sample that others of its prompt are shown."""
    max_prompt_length: int = 1024
    """Tokens of the longest prompt with hints, to which all are padded; a sample that needs more is not learned from,
    and counted."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            "algorithm.itself",
            self,
            policy=one_of(self.policy, Taught),
            rate=(0 < self.rate <= 1, "be above 0 and at most 1"),
            hints=(bool(self.hints), "be at least one text"),
            solved=finite(self.solved),
            max_prompt_length=count(self.max_prompt_length),
        )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        idle = {} if self.policy == "average" else {"rate": "only algorithm.itself.policy=average has one"}
        if not self.shows_solutions:
            idle["solved"] = "no hint shows a {solution}"
        return idle

    @property
    def shows_solutions(self) -> bool:
        """Whether some hint is another completion that was rewarded."""
        return any("{" + SOLUTION in hint for hint in self.hints)

    def params_of(self, state: TrainState, reference: Params | None) -> Params | None:
        """The teacher's parameters; `None`: those of the policy, whatever they are by then."""
        if self.policy == "current":
            return None
        if self.policy == "start":
            return reference_of(state.params, reference)
        return join(state.average, split_trainable(state.params)[1])


def start_average(params: Params) -> Params:
    """The average before the first step, float32, so that small changes are not lost: a copy of what is trained."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), split_trainable(params)[0])


def averaged(average: Params, params: Params, rate: float) -> Params:
    """The average after a step: average + rate · (params − average), of what is trained.

    Args:
        average: before the step, float32.
        params: after it.
        rate: share of the new one, in (0, 1].
    """
    trained = split_trainable(params)[0]
    return jax.tree.map(lambda mean, new: mean + rate * (new.astype(mean.dtype) - mean), average, trained)


class _Texts(NamedTuple):
    """Each sample with its own prompt: groups of one."""

    prompt: jax.Array
    prompt_lengths: jax.Array
    completion: jax.Array


def hinted_layout(tokens: jax.Array, lengths: jax.Array, completion: jax.Array) -> Layout:
    """How completions `[P, G, Tc]` lie behind prompts of their own `[P, G, Tt]`: as those of P·G prompts."""
    rows = completion.shape[0] * completion.shape[1]
    lengths = jnp.maximum(lengths.reshape(rows), 1)  # what nothing is told of is masked
    return layout_of(_Texts(tokens.reshape(rows, -1), lengths, completion.reshape(rows, 1, -1)))
