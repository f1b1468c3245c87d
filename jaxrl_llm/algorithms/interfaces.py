"""What an algorithm is told about a rollout, and what it makes of it: interfaces of algorithms and estimators."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Literal, NamedTuple

import jax

from jaxrl_llm.records import Metrics

Need = (
    Literal["old", "reference", "entropy", "values", "final_values", "greedy", "by_function", "verdicts"]
    | Literal["reference_rewards", "roles", "tasks", "teachers", "hints"]
)
"""A score or a reward that costs something: log-probs under the old policy or under the reference, entropies of the
old policy, values of a critic, also of what follows the last token, the reward of a greedy completion, the reward
functions one by one, a judge's verdicts, rewards of samples that the reference draws, the role that each prompt gives
and the task that it is of, other models' distributions, prompts that say more than the policy's."""


class HintedPrompts(NamedTuple):
    """For each sample the prompt that a teacher reads in place of the policy's: one that says more."""

    tokens: Any
    """`[P, G, Tt]` int32, right-padded."""
    lengths: Any
    """`[P, G]` int32; 0: there is nothing to tell of this sample, or not room enough."""
    too_long: Any
    """`[P, G]` bool: there was not room enough."""


class Feedback(NamedTuple):
    """Rewards of a rollout, and what else was said of it. Only `rewards` is always there where there are any."""

    rewards: Any
    """`[P, G]` float32, or `[P, G, Tc]`: rewards of tokens, such as a process reward model gives. `None`: there are
    none, and the algorithm learns from something else."""
    greedy: Any = None
    """`[P]`: reward of the greedy completion of each prompt (ReMax), less the penalty for its length if there is one.
    `None`: the last sample of each group is greedy."""
    by_function: Any = None
    """`[P, G, K]`: the K reward functions one by one (GDPO); NaN where one does not apply to the sample."""
    weights: Any = None
    """`[K]`: theirs in the sum; `None`: all 1."""
    is_reference: Any = None
    """`[P, G]` bool: the sample of each group that a judge compared the others with (BRPO)."""
    preferred: Any = None
    """`[P, G]` bool: it preferred the sample to the reference."""
    preferred_swapped: Any = None
    """The same with the two shown in the other order, or `None`."""
    reference_rewards: Any = None
    """`[P, N]`: rewards of N samples of each prompt that the reference drew (A*-PO)."""
    roles: Any = None
    """`[P]` int32: the role that the policy has in the samples of each prompt, by its number (RAE)."""
    tasks: Any = None
    """`[P]` int32: equal for prompts that come of one task (hierarchical GRPO)."""
    scored: Any = None
    """`[P, G]` bool: the samples that have a reward; the others' (0 here) is not known. `None`: all have one."""
    hinted: Any = None
    """`HintedPrompts` that the policy reads as its own teacher (SDPO, SDFT)."""


class Signals(NamedTuple):
    """All that an estimator may read; what it does not say that it needs is `None`."""

    rewards: jax.Array
    """`[P, G]`: of whole completions, less the penalty for length; the sum over the tokens where rewards are given by
    token."""
    token_rewards: jax.Array | None
    """`[P, G, Tc]`, where rewards are given by token; the penalty for length is at the last one."""
    mask: jax.Array
    """`[P, G, Tc]` bool: the sampled tokens."""
    finished: jax.Array
    """`[P, G]` bool: ended by a stop token."""
    feedback: Feedback
    old_logprobs: Any = None
    ref_logprobs: Any = None
    entropy: Any = None
    values: Any = None
    """`[P, G, Tc]` each, of the policy, the reference and the critic before this batch's first update."""
    final_values: Any = None
    """`[P, G]`: of the same critic, of the state after the last token."""
    scored: Any = None
    """`[P, G]` bool: the samples whose reward is known; `None`: all."""
    unshaped: Any = None
    """`[P, G]`: the rewards before the penalty for length (`algorithm.overlong`); `None`: as `rewards`."""

    @property
    def outcomes(self) -> jax.Array:
        """`[P, G]`: the rewards as they were given, which say what was right: a right answer stays so if it is long."""
        return self.rewards if self.unshaped is None else self.unshaped


class Credit(NamedTuple):
    """What an estimator returns."""

    advantages: jax.Array
    """`[P, G]`, or `[P, G, Tc]`."""
    keep: jax.Array | None = None
    """`[P, G]` bool: the samples that are trained on; `None`: all."""
    returns: jax.Array | None = None
    """`[P, G, Tc]`: the critic's targets."""
    metrics: Metrics = {}  # noqa: RUF012 (of a tuple, and never written to)


class Advantage(abc.ABC):
    """An advantage estimator: a frozen record of its settings, and a pure function.

    Most have no memory. One that has (a running baseline, an adaptive coefficient) says how it starts and what becomes
    of it after a batch; it is part of the training state, and is saved with it.
    """

    smallest_group: ClassVar[int] = 2
    """Samples of a prompt without which there is nothing to compare: 1 where a sample is judged by itself."""
    skips_unscored: ClassVar[bool] = False
    """Whether it reads `Signals.scored`: a sample without a reward has advantage 0, and no part in that of others."""

    @property
    def needs(self) -> frozenset[Need]:
        """What it reads that costs something."""
        return frozenset()

    def start(self) -> Any:
        """The memory before the first batch, a tree of arrays."""
        return ()

    @abc.abstractmethod
    def __call__(self, signals: Signals, memory: Any) -> Credit:
        """Advantages of a whole batch."""

    def remember(self, signals: Signals, memory: Any) -> Any:
        """The memory after a batch."""
        del signals
        return memory


class Algorithm(abc.ABC):
    """What an on-policy run learns by: a frozen record of settings that says what it reads of a rollout."""

    @property
    @abc.abstractmethod
    def reader(self) -> str:
        """The part that reads the rewards, by its name in messages."""

    @property
    @abc.abstractmethod
    def smallest_group(self) -> int:
        """Samples of a prompt without which there is nothing to learn."""

    @property
    @abc.abstractmethod
    def needs(self) -> frozenset[Need]:
        """What it reads that costs something."""

    @property
    @abc.abstractmethod
    def needs_whole_groups(self) -> bool:
        """Whether a group's completions must be in one micro-batch."""

    @property
    def needs_reference(self) -> bool:
        """Whether any part reads log-probs under a reference."""
        return "reference" in self.needs

    @property
    def needs_critic(self) -> bool:
        """Whether advantages are made of a critic's values."""
        return "values" in self.needs

    @property
    def needs_greedy(self) -> bool:
        """Whether the reward of a greedy completion of each prompt is read."""
        return "greedy" in self.needs

    @property
    def needs_teachers(self) -> bool:
        """Whether other models' distributions are read."""
        return "teachers" in self.needs

    @property
    def needs_hints(self) -> bool:
        """Whether the policy is its own teacher, on prompts that say more."""
        return "hints" in self.needs

    @property
    def averages_policy(self) -> bool:
        """Whether it reads a running average of the policy's parameters, which is then part of the training state."""
        return False

    @property
    def skips_unscored(self) -> bool:
        """Whether samples may have no reward, and are then not learned from."""
        return False

    @property
    def keeps_mask(self) -> bool:
        """Whether it reads which tokens each was drawn from (`Rollout.kept`)."""
        return False

    @property
    def keeps_experts(self) -> bool:
        """Whether it reads which experts computed each token (`Rollout.experts`)."""
        return False

    def start(self) -> Any:
        """Its memory before the first batch, a tree of arrays that is part of the training state."""
        return ()
