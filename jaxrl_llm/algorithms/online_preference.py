"""On-line preference optimisation: the policy's own samples, labelled by their rewards, are the pairs of a step.

With `PreferenceObjective(DPO())` this is on-line DPO (Guo et al. 2024, "Direct language model alignment from online AI
feedback", 2402.04792); any other loss of pairs will do.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.advantages.group import zero_std_groups
from jaxrl_llm.algorithms.offline import make_offline_step
from jaxrl_llm.algorithms.preference import PreferenceBatch, PreferenceObjective
from jaxrl_llm.losses.online import label_pairs
from jaxrl_llm.models.transformer import Params, Transformer
from jaxrl_llm.types import Rollout, TrainState

OnlineStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_online_preference_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    objective: PreferenceObjective,
    *,
    micro_batches: int = 1,
) -> OnlineStep:
    """The pure function `(state, rollout, rewards, reference=None) -> (state, metrics)` that labels pairs and learns.

    Args:
        model: the policy.
        optimizer: an optax transformation.
        objective: what is learned of the pairs.
        micro_batches: pieces in which the gradient is accumulated.

    Returns:
        A function of `TrainState`, `Rollout` with two samples of each prompt or more, rewards `[P, G]` float32, and the
        parameters of the reference (see `make_offline_step`). Metrics: those of the objective, the step and `reward`,
        `frac_reward_zero_std` and `completions/mean_length`. Prompts of equal rewards have no pair.
    """
    offline_step = make_offline_step(model, optimizer, objective, micro_batches=micro_batches)

    def online_step(
        state: TrainState, rollout: Rollout, rewards: jax.Array, reference: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = offline_step(state, sampled_pairs(rollout, rewards), reference)
        sampled = {
            "reward": jnp.mean(rewards),
            "frac_reward_zero_std": jnp.mean(zero_std_groups(rewards).astype(jnp.float32)),
            "completions/mean_length": jnp.mean(rollout.completion_lengths.astype(jnp.float32)),
        }
        return state, metrics | sampled

    return online_step


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
