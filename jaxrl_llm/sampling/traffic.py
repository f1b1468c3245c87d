"""What decoding one token of every slot reads of a device's memory, by the tables that attention walks.

Decoding is bound by that: weights once for all slots, and the pages of keys and values that attention reads, whole.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrl_llm.models.config import DType
from jaxrl_llm.models.lora import read_by_sampler
from jaxrl_llm.models.tensor_heads import kv_heads_on, with_whole_parts
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.attention import pages_read, slot_attention
from jaxrl_llm.sampling.caches import Sizes, Slots, as_kept, bytes_of, page_tokens
from jaxrl_llm.sampling.logits import CacheDType, SlotAttention
from jaxrl_llm.sharding import head_shards, is_rounded, parameter_shardings


class Traffic(NamedTuple):
    """Bytes that one device reads for a token of each of its slots."""

    weights: int
    """Of the layers and of the head."""
    pages: int
    """Of keys and values, in all layers."""


def spread(slots: int, mean: int) -> np.ndarray:
    """How many tokens slots have written that took up completions one after another: 1 to twice the mean, evenly.

    Neighbours are far apart, as completions of a prompt are that ended and were followed by others.
    """
    stride = next(n for n in range(max(1, round(0.618 * slots)), 2 * slots + 2) if math.gcd(n, slots) == 1)
    return np.maximum(1, (2 * (np.arange(slots) * stride % slots) + 1) * mean // slots)


def traffic(
    model: Transformer,
    mesh: Mesh,
    implementation: SlotAttention,
    written: np.ndarray,
    *,
    group: int,
    prompt_width: int,
    tokens: int,
    dtype: DType | None = None,
    cache_dtype: CacheDType | None = None,
) -> Traffic:
    """Of slots that decode, in order, completions of prompts of the full width.

    Args:
        model: the transformer.
        mesh: the sampler's (`sampling_mesh`), the devices along whose `tensor` share the work.
        implementation: how slots attend.
        written: `[S]` tokens that each has in the cache, the one that attends included; at most Tc.
        group: G.
        prompt_width: Tp.
        tokens: Tc.
        dtype: type of the parameters while decoding; `None`: the model's compute type.
        cache_dtype: type in which keys and values are kept; `None`: the model's compute type.

    Raises:
        ValueError: as `slot_attention`.
    """
    config, asked = model.config, len(written)
    made = jax.ShapeDtypeStruct((kv_heads_on(config, mesh), config.head_dim), jnp.dtype(config.dtype))
    value = as_kept(made, cache_dtype)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        sizes = Sizes.of(
            slots=asked,
            prompts=-(-asked // group),
            group=group,
            prompt_width=prompt_width,
            tokens=tokens,
            page=page_tokens(),
            token_bytes=bytes_of(value),
        )
        attention = slot_attention(implementation, sizes.page, value, config.num_heads)
    number, clock = np.arange(sizes.slots), int(written.max())
    slots = Slots(
        active=jnp.asarray(number < asked),
        place=jnp.asarray(np.minimum(number, asked - 1) // group),
        prompt_length=jnp.full(sizes.slots, prompt_width),
        start=jnp.asarray(clock + 1 - np.pad(written, (0, sizes.slots - asked), constant_values=1)),
    )
    clocks = jnp.full(sizes.slots, clock)

    @functools.partial(jax.jit, static_argnums=2)
    def pages(slots: Slots, clocks: jax.Array, window: int | None) -> jax.Array:
        return pages_read(attention.walk(sizes, slots, clocks, 1, window), sizes)

    windows = dict.fromkeys(kind.window for kind in config.kinds)
    of_window = {window: int(pages(slots, clocks, window)) for window in windows}
    page = 2 * sizes.page * bytes_of(value) // head_shards(mesh)
    return Traffic(_weights(model, mesh, dtype, asked), page * sum(of_window[kind.window] for kind in config.kinds))


def _weights(model: Transformer, mesh: Mesh, dtype: DType | None, slots: int) -> int:
    """Bytes of the layers and the head on one device; a row of the embedding for each slot is left out.

    Of experts those that some slot meets, if each token chose evenly among all.
    """
    config = model.config
    axes = read_by_sampler(model.logical_axes(), config)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shapes = jax.eval_shape(
            lambda params: with_whole_parts(params, config), read_by_sampler(model.abstract_params(), config)
        )
    placed = parameter_shardings(mesh, axes, shapes)

    def size(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> int:
        read = leaf.dtype if is_rounded(leaf.dtype) else jnp.dtype(dtype or config.dtype)
        return math.prod(sharding.shard_shape(leaf.shape)) * read.itemsize

    sizes = jax.tree.map(size, shapes, placed)
    read = sum(jax.tree.leaves((sizes["layers"], model.head(sizes))))
    if (experts := config.experts) is not None:
        of_experts = sum(jax.tree.leaves({name: sizes["layers"]["experts"][name] for name in ("gate", "up", "down")}))
        read -= round(of_experts * (1 - experts.per_token / experts.count) ** slots)
    return read
