"""A model's weights as a decoding loop reads them: layer by layer, small ones turned around."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax

from jaxrl_llm.models.config import Params
from jaxrl_llm.models.operands import SMALL
from jaxrl_llm.models.transformer import Transformer

WeightsT = TypeVar("WeightsT")


class Weights(NamedTuple):
    """What is cut out of the stacked arrays before the loop: cutting it in the loop would copy the weights."""

    layers: tuple[Params, ...]
    """Of each layer, as `_turn` leaves them."""
    head: jax.Array
    """Weight of the LM head, as `_turn` leaves it."""

    @classmethod
    def of(cls, model: Transformer, params: Params) -> Weights:
        """Those of a model; of one that is batch-invariant as they are, since products of turned ones sum otherwise."""
        if model.config.batch_invariant:
            return cls(tuple(model.layers(params)), model.head(params))
        # Without the barrier XLA would undo the turning.
        layers, head = jax.lax.optimization_barrier((_turn(model.layers(params)), _turn(model.head(params))))
        return cls(tuple(layers), head)


def in_loop(model: Transformer, weights: WeightsT) -> WeightsT:
    """Weights of `Weights` as they were given, for use in the loop."""
    return weights if model.config.batch_invariant else _turn(weights)


def _turn(weights: WeightsT) -> WeightsT:
    """Turns weights around if all are small, `[out, in]` to `[in, out]` before the loop and back in it.

    Layers have weights of the same shapes, so that one of them is judged as all of them.

    The way back is no work: XLA then reads the weight as it lies. For products of a few rows XLA's CPU compiler packs
    `[out, in]` weights anew at every token, up to half of a small model's time. Of large ones it packs the rows
    instead (`times_transposed`).
    """
    small = are_small(weights)
    return jax.tree.map(lambda leaf: leaf.T if small and leaf.ndim == 2 else leaf, weights)


def are_small(weights: Any) -> bool:
    """Whether a token takes less time to compute than to begin its products, one by one."""
    return max(leaf.size for leaf in jax.tree.leaves(weights)) <= SMALL
