"""Supervised fine-tuning on completions of prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from jaxrl_llm.algorithms.gradient import make_gradient_step
from jaxrl_llm.algorithms.update import UpdateConfig, make_scorer, split_groups
from jaxrl_llm.losses.aggregate import aggregation_normalizer
from jaxrl_llm.losses.supervised import sft_loss
from jaxrl_llm.models.transformer import Params, Transformer
from jaxrl_llm.records import Metrics
from jaxrl_llm.sharding import row_shards
from jaxrl_llm.types import TrainState


class Demonstrations(NamedTuple):
    """Prompts, each with G given completions."""

    prompt: jax.Array
    """`[P, Tp]` int32, right-padded."""
    prompt_lengths: jax.Array
    """`[P]` int32."""
    completion: jax.Array
    """`[P, G, Tc]` int32, right-padded, the end-of-sequence token included."""
    mask: jax.Array
    """`[P, G, Tc]` bool: the tokens that are trained."""


def make_supervised_step(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
) -> Callable[[TrainState, Demonstrations], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure function `(state, demonstrations) -> (state, metrics)` that makes one optimizer step on `sft_loss`.

    Compile and call it under `jax.set_mesh`, where there is a mesh: it splits rows over that.

    Args:
        policy: the model.
        optimizer: an optax transformation.
        micro_batches: pieces in which the gradient is accumulated.
    """
    plan, scores = UpdateConfig(micro_batches=micro_batches), make_scorer(policy)

    def loss(params: Params, rows: Demonstrations, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
        return sft_loss(scores(params, rows).logprobs, rows.mask, normalizer=normalizer)

    gradient_step = make_gradient_step(loss, optimizer, micro_batches)

    def supervised_step(state: TrainState, batch: Demonstrations) -> tuple[TrainState, dict[str, jax.Array]]:
        normalizer = aggregation_normalizer(batch.mask, mode="token-mean")
        prompts, group = batch.mask.shape[:2]
        rows = split_groups(batch, plan.group_split(prompts, group, row_shards()))
        (params, opt_state), metrics = gradient_step((state.params, state.opt_state), rows, normalizer)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {name: record.value() for name, record in metrics.items()}

    return supervised_step
