"""A whole iteration, sample → reward → update, as one pure function, where the reward is a JAX function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm.algorithms.policy_gradient.update import UpdateStep
from jaxrl_llm.checks import check_fields, finite
from jaxrl_llm.masking import segment_last
from jaxrl_llm.models.config import Params
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.types import Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class DeviceReward:
    """A reward that is a JAX function: a reward model, a process reward model, a rule on tokens."""

    name: str
    """For its metric."""
    function: Callable[[Any, Rollout], jax.Array]
    """`(params, rollout) -> [P, G]`, or `[P, G, Tc]` for rewards of tokens; pure."""
    params: Any = ()
    """A tree of arrays, handed to the function."""
    weight: float = 1.0
    """Factor in the sum of all rewards; at 0 it is only reported."""

    def __post_init__(self) -> None:
        """Rejects a weight with which every sum would be NaN or infinite."""
        check_fields(f"device_rewards[{self.name!r}]", self, weight=finite(self.weight))


class DeviceScores(NamedTuple):
    """What device rewards give for a rollout."""

    total: jax.Array
    """The weighted sum, `[P, G]`, or `[P, G, Tc]` if one of them is given by token: then 0 at padding."""
    by_name: dict[str, jax.Array]
    """`[P, G]` each, without weights."""


def make_device_scores(rewards: Sequence[DeviceReward]) -> Callable[[Sequence[Any], Rollout], DeviceScores]:
    """The pure function `(params of each reward, rollout) -> DeviceScores`.

    Raises:
        ValueError: two rewards bear the same name.
    """
    names = [reward.name for reward in rewards]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several device rewards are named {repeated}: give each its own name")

    def scores(params: Sequence[Any], rollout: Rollout) -> DeviceScores:
        rollout.check()
        given = [reward.function(own, rollout) for reward, own in zip(rewards, params, strict=True)]
        for reward, values in zip(rewards, given, strict=True):
            if values.shape not in (rollout.completion_lengths.shape, rollout.completion.shape):
                raise ValueError(
                    f"the device reward {reward.name!r} gave {values.shape} for completions "
                    f"{rollout.completion.shape}: it must give a number for each completion, or for each of its tokens"
                )
        by_token = any(values.ndim == 3 for values in given)
        parts = [
            reward.weight * (_at_last_token(values, rollout) if by_token else values)
            for reward, values in zip(rewards, given, strict=True)
            if reward.weight  # 0 times NaN would be NaN
        ]
        shape = rollout.completion.shape if by_token else rollout.completion_lengths.shape
        total = jnp.sum(jnp.stack(parts), axis=0) if parts else jnp.zeros(shape, jnp.float32)
        return DeviceScores(total, dict(zip(names, map(rollout.of_completions, given), strict=True)))

    return scores


def _at_last_token(values: jax.Array, rollout: Rollout) -> jax.Array:
    """Rewards of completions as rewards of tokens; those of tokens, 0 at padding."""
    if values.ndim == 3:
        return rollout.of_tokens(values)
    return jnp.where(segment_last(rollout.mask), values[..., None], 0.0)


class Iteration(NamedTuple):
    """What one iteration leaves."""

    state: TrainState
    metrics: dict[str, jax.Array]
    rollout: Rollout
    scores: DeviceScores


def make_iteration(
    sampler: Sampler, rewards: Sequence[DeviceReward], update_step: UpdateStep
) -> Callable[..., Iteration]:
    """The pure function `(state, prompt, prompt_lengths, reward_params, reference=None, history=None) -> Iteration`.

    Compiled, it is one XLA program from prompts to the next training state: nothing waits for the host. It draws and
    learns exactly what the sampler, the rewards and the update step do as programs of their own; a profile, and the
    compiled text, name its phases sampler, reward and update. Compile and call it under `jax.set_mesh`, with the state
    donated.

    Args:
        sampler: samples completions; its checks of the prompts are the caller's here.
        rewards: none where the update step learns from something else; then it is given `None` for them.
        update_step: of `make_update_step`, or another that learns from a rollout and its rewards.

    Raises:
        ValueError: two rewards bear the same name.
        AssertionError: when it is traced, if prompts and their lengths do not fit together.
    """
    score = make_device_scores(rewards)

    def iteration(
        state: TrainState,
        prompt: jax.Array,
        prompt_lengths: jax.Array,
        reward_params: Sequence[Any],
        reference: Params | None = None,
        history: tuple[jax.Array, jax.Array] | None = None,
    ) -> Iteration:
        chex.assert_rank(prompt, 2)
        chex.assert_shape(prompt_lengths, (len(prompt),))
        chex.assert_type([prompt, prompt_lengths], int)
        with jax.named_scope("sampler"):
            rollout = sampler.sample(state.params, prompt, prompt_lengths, state.key, state.step + 1, history=history)
        with jax.named_scope("reward"):
            scores = score(reward_params, rollout)
        with jax.named_scope("update"):
            state, metrics = update_step(state, rollout, scores.total if rewards else None, reference)
        return Iteration(state, metrics, rollout, scores)

    return iteration
