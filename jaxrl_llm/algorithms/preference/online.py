"""On-line preference optimisation: the policy's own samples, labelled by their rewards, are the pairs of a step.

With `PreferenceObjective(DPO())` this is on-line DPO (Guo et al. 2024, "Direct language model alignment from online AI
feedback", 2402.04792); any other loss of pairs will do.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.gradient import Carry, make_gradient_step
from jaxrl_llm.algorithms.interfaces import Algorithm, Need
from jaxrl_llm.algorithms.offline import loss_of, make_reference_pass, with_reference
from jaxrl_llm.algorithms.policy_gradient.rollouts import rollout_metrics
from jaxrl_llm.algorithms.policy_gradient.update import UpdateStep, run_epochs
from jaxrl_llm.algorithms.preference.objective import PreferenceBatch, PreferenceObjective
from jaxrl_llm.algorithms.state import step_key
from jaxrl_llm.checks import check_fields, not_negative
from jaxrl_llm.losses.online import label_pairs
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import reference_of
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Mean, Metrics
from jaxrl_llm.sharding import row_shards
from jaxrl_llm.types import Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class OnlinePreference(Algorithm):
    """Learns from the best and the worst sample of each prompt, as a pair; equal rewards make none."""

    objective: PreferenceObjective = PreferenceObjective()
    """What is learned of the pairs."""
    missing_eos_penalty: float = 0.0
    """Taken from the reward of a completion that was cut at the length limit."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields("algorithm", self, missing_eos_penalty=not_negative(self.missing_eos_penalty))

    @property
    def reader(self) -> str:
        """Its own name."""
        return type(self).__name__

    @property
    def smallest_group(self) -> int:
        """A pair."""
        return 2

    @property
    def needs(self) -> frozenset[Need]:
        """A reference, if the loss reads one."""
        return frozenset({"reference"} if self.objective.needs_reference else ())

    @property
    def needs_whole_groups(self) -> bool:
        """True: the two of a pair are computed together."""
        return True


def make_online_preference_step(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    algorithm: OnlinePreference,
    config: UpdateConfig | None = None,
) -> UpdateStep:
    """The pure function `(state, rollout, rewards, reference=None) -> (state, metrics)`, as `make_update_step`.

    Args:
        policy: the model.
        optimizer: an optax transformation.
        algorithm: what is learned of the pairs.
        config: epochs, minibatches, micro-batches.

    Returns:
        A function as `make_update_step` returns, of two samples of each prompt or more and of rewards `[P, G]`, or
        `[P, G, Tc]` by token, of which the sum counts. A prompt whose rewards are equal, or one of them NaN, has no
        pair. Pairs are scored at temperature 1, whatever they were sampled at. Metrics: those of the rollout, of the
        objective and of the optimizer; `entropy` is that of the distribution which was drawn from, estimated by what
        was drawn: the mean of −log p.

    Raises:
        ValueError: when it is traced, if the rewards are not of this shape, or pairs cannot be cut into the pieces.
    """
    plan, objective = config or UpdateConfig(), algorithm.objective
    reference_logprobs = make_reference_pass(policy, plan.of_batch)
    gradient_step = make_gradient_step(loss_of(objective, policy), optimizer, plan.of_minibatch)

    def optimizer_step(carry: Carry, rows: PreferenceBatch) -> tuple[Carry, Metrics]:
        return gradient_step(carry, rows, objective.normalizer(rows))

    def update_step(
        state: TrainState, rollout: Rollout, rewards: jax.Array, reference: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rollout.check()
        rewards = rollout.of_completions(rewards)
        pairs = sampled_pairs(rollout, rewards - algorithm.missing_eos_penalty * ~rollout.finished)
        plan.group_split(len(pairs.prompt), 2, row_shards(), whole_groups=True)  # raises where pairs would be cut
        pairs = with_reference(objective, pairs, reference_of(state.params, reference), reference_logprobs)
        carry, trained = run_epochs(optimizer_step, (state.params, state.opt_state), pairs, plan, step_key(state, 1))
        state = state.replace(step=state.step + 1, params=carry[0], opt_state=carry[1])
        metrics = rollout_metrics(rollout, rewards) | {"entropy": Mean.of(-rollout.sampler_logprobs, rollout.mask)}
        return state, {name: record.value() for name, record in (metrics | trained).items()}

    return update_step


def sampled_pairs(rollout: Rollout, rewards: jax.Array) -> PreferenceBatch:
    """The best and the worst sample of each prompt as a pair; its mask is empty where all rewards are equal.

    Raises:
        ValueError: there are no two samples of a prompt, or not one reward for each.
    """
    if rewards.shape != rollout.completion_lengths.shape or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards has shape {rewards.shape}, the rollout {rollout.completion_lengths.shape} prompts and samples: "
            "pairs need two samples of each prompt at least, and one reward for each"
        )
    labels = label_pairs(rewards)
    pair = jnp.stack([labels.chosen, labels.rejected], axis=1)[..., None]  # [P, 2, 1]
    best, worst = labels.select(rewards)
    return PreferenceBatch(
        prompt=rollout.prompt,
        prompt_lengths=rollout.prompt_lengths,
        completion=jnp.take_along_axis(rollout.completion, pair, axis=1),
        mask=jnp.take_along_axis(rollout.mask, pair, axis=1) & (best > worst)[:, None, None],
    )
