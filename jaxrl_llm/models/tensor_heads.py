"""Whole heads on every device of the `tensor` axis: where there are fewer of keys and values, these are repeated.

So are the scales of weights that are integers, of which each device needs those of its own entries.

A device that has N/t of the query heads needs the keys and values that they read. With K heads of these and K no
multiple of t, each is repeated until there are lcm(K, t) of them, which t divides, and which divides N as K and t do;
query head n then reads copy n // (N / lcm(K, t)) of head n // (N / K). The weights are repeated, and not what they
give: of these there are fewer, and in a sampling loop none of it is left.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxrl_llm.models.config import ModelConfig, Params
from jaxrl_llm.models.integers import LEAVES, with_whole_blocks
from jaxrl_llm.sharding import blocks_of, constrain, head_shards, is_rounded

_AXES = {
    "weight": ("kv_heads", "embed"),
    "lora_b": ("kv_heads", "lora_rank"),
    "bias": ("kv_heads",),
}
"""Of the leaves of a linear layer those that have its outputs as an axis; of integers it is another one."""
_OF_INTEGERS = dict.fromkeys(LEAVES, (blocks_of("embed"), "kv_heads"))


def kv_heads_on(config: ModelConfig, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Heads of keys and values that there are on a mesh, repeated ones counted; `mesh` as for `row_shards`.

    Raises:
        ValueError: the `tensor` axis does not divide the query heads.
    """
    shards, heads = head_shards(mesh), config.num_heads
    if heads % shards:
        possible = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise ValueError(
            f"a tensor axis of {shards} devices cannot hold whole heads: it does not divide the {heads} query heads of "
            f"the model; set mesh.tensor to one of {possible}"
        )
    return math.lcm(config.num_kv_heads, shards)


def with_whole_parts(params: Params, config: ModelConfig) -> Params:
    """Parameters of the same function with the heads of keys and values, and scales, that the ambient mesh needs.

    Args:
        params: of a model or of one of its blocks; those that have them already are returned as they are.
        config: of the model.

    Raises:
        ValueError: as `kv_heads_on`.
    """
    heads = kv_heads_on(config)
    params = with_whole_blocks(params)
    if heads == config.num_kv_heads:
        return params

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        *_, module, projection, name = [None, None, *(getattr(entry, "key", None) for entry in path)]
        if (module, projection) == ("attention", "key_norm") and config.qk_norm_over_heads:
            return _repeat(leaf, heads, ("norm",), config.head_dim)  # its mean is that of the heads that there were
        axes = _OF_INTEGERS if is_rounded(leaf.dtype) else _AXES
        if module != "attention" or projection not in ("key", "value") or name not in axes:
            return leaf
        return _repeat(leaf, heads, axes[name], config.head_dim)

    return jax.tree_util.tree_map_with_path(one, params)


def _repeat(leaf: jax.Array, heads: int, names: tuple[str | None, ...], head_dim: int) -> jax.Array:
    """Brings `[…, K·H, …]`, whose last axes bear these names, to so many heads; of stacked layers, too."""
    names = (*[None] * (leaf.ndim - len(names)), *names)
    axis = next(place for place, name in enumerate(names) if name in ("kv_heads", "norm"))
    before, width, after = leaf.shape[:axis], leaf.shape[axis], leaf.shape[axis + 1 :]
    if width == heads * head_dim:
        return leaf
    # The few weights whole, for there may be half a head on a device: its copies would be put together one by one.
    whole = constrain(leaf, *names[:axis], None, *names[axis + 1 :]).reshape(*before, -1, head_dim, *after)
    copies = jnp.repeat(whole, heads * head_dim // width, axis=axis)
    return constrain(copies.reshape(*before, -1, *after), *names)
