"""Credit assignment: from a rollout and its rewards to rows with advantages, which the losses read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.algorithms.batching import MicroBatches, cut
from jaxrl_llm.algorithms.interfaces import Credit, Feedback
from jaxrl_llm.algorithms.policy_gradient.critic import Critic
from jaxrl_llm.algorithms.policy_gradient.objective import LearnerBatch, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.rollouts import read_rollout, sampling_gap
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.algorithms.state import step_key
from jaxrl_llm.logprobs import TokenScores
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import reference_of
from jaxrl_llm.records import Metrics
from jaxrl_llm.types import Rollout, TrainState

OBSERVED = "observed/"
"""What is no metric, but made of single completions, begins so among what an update step returns."""


class Observed(NamedTuple):
    """Of which completions an update tells what it made of them, for people to look at."""

    prompts: int = 0
    """Those of so many prompts, the first ones: their advantages."""
    by_token: int = 0
    """So many, the first ones: their scores, token by token."""


NOTHING = Observed()


class Credited(NamedTuple):
    """A rollout with all that an update reads of it."""

    batch: LearnerBatch
    """With advantages, and the scores that the losses read."""
    memory: Any
    """What the estimator remembers after this batch; as before it, where something in the new one is not finite."""
    metrics: Metrics
    old: TokenScores | None
    """Under the policy before this batch, where something reads them."""

    def observed(self, wanted: Observed) -> dict[str, jax.Array]:
        """What was made of completions, for people to look at: of the first prompts, `[prompts, G]` or with `Tc`.

        Advantages, and of the scores those that there are: of the policy before this batch (`old_logprobs`, `entropy`),
        of the reference (`ref_logprobs`) and the critic (`values`).
        """
        batch, old = self.batch, self.old
        scores = {
            "old_logprobs": None if old is None else old.logprobs,
            "entropy": None if old is None else old.entropy,
            "ref_logprobs": batch.ref_logprobs,
            "values": batch.values,
        }
        told = {"advantages": batch.advantages[: wanted.prompts]} if wanted.prompts else {}
        if wanted.by_token:
            prompts = -(-wanted.by_token // batch.mask.shape[1])
            told |= {name: of[:prompts] for name, of in scores.items() if of is not None}
        return {f"{OBSERVED}{name}": of for name, of in told.items()}


@dataclasses.dataclass(frozen=True)
class CreditAssignment:
    """The function from a state, a rollout, its rewards and a reference to `Credited` rows; pure.

    Scores that cost a forward pass over the batch are made only where something reads them: those under the reference,
    those under the policy before this batch, the values of a critic.
    """

    algorithm: PolicyGradient
    """Whose estimator it is."""
    scorer: Scorer
    """Of the policy, at the temperature that it was sampled with."""
    plan: MicroBatches
    """How passes over the batch are cut."""
    keeps_old: bool
    """Whether the losses read log-probs under the policy before this batch. With one optimizer step that is the policy
    itself, and the ratio needs no pass."""
    truncated: bool = False
    """As `sampling_gap`."""
    critic: Critic | None = None
    """Where the advantages are made of values."""

    def __post_init__(self) -> None:
        """Rejects a policy that has not drawn."""
        if self.scorer.temperature <= 0:
            raise ValueError(
                f"a policy sampled at temperature {self.scorer.temperature} (greedily) has no gradient to follow"
            )

    def __call__(
        self, state: TrainState, rollout: Rollout, rewards: jax.Array | Feedback, reference: Params | None
    ) -> Credited:
        """Scores the rollout and asks the estimator; arguments as of `make_update_step`'s function."""
        algorithm, old = self.algorithm, None
        feedback = rewards if isinstance(rewards, Feedback) else Feedback(rewards)
        signals, batch, metrics = read_rollout(algorithm, rollout, feedback)
        prompts = len(batch.mask)
        batch = batch._replace(seeds=jax.random.bits(step_key(state, 2), (prompts,)))
        sampled = batch._replace(mask=signals.mask)  # the estimator reads completions that no loss does, too
        if algorithm.routing == "compared":
            sampled = sampled.with_own_experts()
        if algorithm.needs_reference:
            ref_logprobs = self._reference_logprobs(state, sampled, reference)
            signals = signals._replace(ref_logprobs=ref_logprobs)
            if algorithm.loss_needs_reference:
                batch = batch._replace(ref_logprobs=ref_logprobs)
        if self.keeps_old or algorithm.advantage.needs & {"old", "entropy"}:
            old = self._pass_over(sampled, self.scorer, state.params)
            signals = signals._replace(old_logprobs=old.logprobs, entropy=old.entropy)
            if self.keeps_old:
                metrics |= sampling_gap(
                    old.logprobs, batch, temperature=self.scorer.temperature, truncated=self.truncated
                )
                batch = batch._replace(old_logprobs=old.logprobs)
        if self.critic is not None:
            values, final_values = self._values(state, sampled, rollout.completion_lengths)
            signals = signals._replace(values=values, final_values=final_values)
            batch = batch._replace(values=values)
        credit = algorithm.advantage(signals, state.memory)
        memory = _if_finite(algorithm.advantage.remember(signals, state.memory), state.memory)
        return Credited(_credited(batch, credit), memory, metrics | credit.metrics, old)

    def _reference_logprobs(self, state: TrainState, batch: LearnerBatch, reference: Params | None) -> jax.Array:
        params = reference_of(state.params, reference)
        if params is None:
            raise ValueError(
                "this algorithm reads a reference (a kl_coef is not 0, or the surrogate does): pass its parameters"
            )
        return self._pass_over(batch, self.scorer, params).logprobs

    def _values(self, state: TrainState, batch: LearnerBatch, lengths: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The critic's values `[P, G, Tc]`, and, where read, those `[P, G]` of the state after the last token."""
        assert self.critic is not None
        if not self.critic.shares_trunk:
            batch = batch.with_own_experts()
        params = state.params if state.critic is None else state.critic.params
        if "final_values" not in self.algorithm.needs:
            return self._pass_over(batch, self.critic.values, params), None
        values, after = self._pass_over(batch, self.critic.model.values_around, params)
        return values, jnp.take_along_axis(after, lengths[..., None] - 1, axis=-1)[..., 0]

    def _pass_over(self, batch: LearnerBatch, function: Callable[[Params, Any], Any], params: Params) -> Any:
        """What a forward pass under constant parameters gives for the whole batch."""
        pieces = cut(batch, self.plan, whole_groups=self.algorithm.needs_whole_groups)
        return pieces.map(lambda _, texts: function(params, texts))


def _if_finite(new: Any, old: Any) -> Any:
    """The new memory if all of it is finite, else all of the old one: a part of each would not fit together.

    One reward that is NaN would otherwise stay in every baseline to come, and in the checkpoint.
    """
    finite = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)], True)
    return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)


def _credited(batch: LearnerBatch, credit: Credit) -> LearnerBatch:
    """Rows with their advantages, and with the critic's targets where there are any."""
    if credit.returns is not None:
        batch = batch._replace(returns=credit.returns, value_mask=batch.mask)
    if credit.keep is not None:
        batch = batch._replace(mask=batch.mask & credit.keep[..., None])
    return batch._replace(advantages=credit.advantages)
