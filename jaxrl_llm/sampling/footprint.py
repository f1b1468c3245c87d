"""What sampling takes of a device's memory, in closed form, and how many completions fit in flight.

Sizes come from the shapes of the model, of the batch and of the mesh; nothing is compiled. What the compiler lays out
otherwise (tiles that are filled up, buffers that are not packed perfectly) is left to `MARGIN`.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_llm.device_memory import bytes_per_device
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import has_adapters, read_by_sampler
from jaxrl_llm.models.tensor_heads import kv_heads_on, with_whole_parts
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.caches import Sizes, as_kept
from jaxrl_llm.sampling.decode import Loop
from jaxrl_llm.sampling.flight import prompts_at_a_time, sizes_of
from jaxrl_llm.sampling.layout import dtype_read
from jaxrl_llm.sampling.logits import SamplingConfig, block_size
from jaxrl_llm.sampling.together import rooms
from jaxrl_llm.sharding import head_shards, on_cpu, parameter_shardings

MARGIN = 1 / 16
"""Of a device's memory what is left to the compiler."""

_LOGITS = 3
"""Arrays as large as the logits at one time: themselves, their weights, the running sum."""

_SORTED = 2
"""More of them, to find top-p."""

_LANES = 128
"""Entries of a row of a TPU's tile, to which blocks of the running sum are filled up."""

_ACROSS = 16
"""Entries of a block that is so small that the compiler lays such blocks out the other way, which fills up nothing."""


class Batch(NamedTuple):
    """What one device samples, or those that share the weights along `tensor`."""

    prompts: int
    """P."""
    group: int
    """G, completions of each."""
    width: int
    """Tp."""
    tokens: int
    """Tc, of the longest completion."""
    shards: int
    """How many of these devices, or groups of them, there are; each has as much."""
    returned: float
    """Of how many of them a device has what is returned with the learner's rows (`Sampler.shardings`)."""

    @property
    def completions(self) -> int:
        """Of all its prompts."""
        return self.prompts * self.group


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes of one device while it samples."""

    model: Transformer
    config: SamplingConfig
    learner_mesh: Mesh
    """On which the parameters lie."""
    mesh: Mesh
    """The sampler's."""
    dtype: Any
    """Type to decode with."""
    batch: Batch
    resident: int | None = None
    """What lies there while it samples, the parameters included; `None`: these alone."""
    kept: int = 0
    """Ids that are written down of those that each token was drawn from."""
    keep_experts: bool = False
    """Whether each token's experts are written down."""
    learner: Transformer | None = None
    """The model that is trained, where `model` is one with rounded weights in its place."""

    def most_slots(self, memory: float) -> int:
        """How many completions can be in flight on devices of so many bytes; 0: not one."""
        room, every = memory * (1 - MARGIN), self.batch.completions

        def exceeds(slots: int) -> bool:
            return sum(self.needs(slots).values()) > room

        return every if not exceeds(every) else bisect.bisect_left(range(1, every), True, key=exceeds)

    def needs(self, slots: int) -> dict[str, int]:
        """What there is at the same time with so many completions in flight, by what it is for."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            loop, batch = self._loop(slots), self.batch
            rows = batch.completions if loop.together else self._sizes(slots).slots * (1 + self.config.drafts)
            sampled = 4 * batch.completions * batch.tokens
            return {
                "parameters and what else stays there": self._resident,
                "the sampler's own weights": self._copied + (0 if loop.in_loops else self._unstacked),
                "keys and values": self._caches(loop),
                "prompts that are read, or logits": max(self._reading(loop), self._drawing(rows)),
                # in the loop, their randomness, and what is returned: of all devices, or of the learner's rows
                "tokens and log-probs": round(
                    sampled * (2 + 3 * (1 + batch.shards) + self.kept * (1 + batch.returned))
                ),
                **self._experts(),
            }

    def _experts(self) -> dict[str, int]:
        """Those of all tokens, in the loop and as they are returned; nothing where they are not written down."""
        config, batch = self.model.config, self.batch
        if not self.keep_experts or config.experts is None:
            return {}
        tokens = batch.prompts * batch.width + batch.completions * batch.tokens
        of_token = 2 * config.num_layers * config.experts.per_token
        return {"experts of tokens": round(of_token * tokens * (1 + batch.returned))}

    def caches(self, slots: int) -> int:
        """Keys and values of prompts and completions."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self._caches(self._loop(slots))

    def fills(self, slots: int) -> int:
        """How often prompts are computed, some at a time."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return -(-self.batch.prompts // self._prompts_at_a_time(self._loop(slots)))

    # ---- Parts of it, where the ambient mesh is the sampler's ------------------------------------------

    def _loop(self, slots: int) -> Loop:
        layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self._ours["layers"])
        return Loop.of(self.model, layer, self.config, slots=slots, completions=self.batch.completions)

    def _sizes(self, slots: int) -> Sizes:
        batch = self.batch
        return sizes_of(
            self._kept,
            slots=slots,
            prompts=batch.prompts,
            group=batch.group,
            prompt_width=batch.width,
            tokens=batch.tokens,
            drafts=self.config.drafts,
        )

    def _caches(self, loop: Loop) -> int:
        batch, windows = self.batch, [kind.window for kind in self.model.config.kinds]
        if not loop.together:
            return self._part(self._sizes(loop.slots).bytes(windows, self._kept))
        own = sum(rooms(batch.tokens))  # the smaller ones stay until all ends
        return (batch.prompts * batch.width + batch.completions * own) * self._token

    def _reading(self, loop: Loop) -> int:
        """Of the prompts that are computed at a time: what layers make, and what one of them computes."""
        config, batch, prompts = self.model.config, self.batch, self._prompts_at_a_time(loop)
        made = self._token if loop.together else 2 * self._token  # as it is made, and as pages
        heads = (2 * config.num_heads + 2 * self._value.shape[0]) * config.head_dim
        mlp, copies = 3 * config.mlp_dim, 0
        if (experts := config.experts) is not None:  # each token once for each of its experts
            mlp = max(mlp, 3 * (experts.per_token * experts.width + (experts.shared or 0)))
            copies = 2 * experts.per_token * config.embed_dim
        in_layer = 4 * config.embed_dim + copies + self._part(heads + mlp)
        return prompts * batch.width * (made + in_layer * self._value.dtype.itemsize)

    def _prompts_at_a_time(self, loop: Loop) -> int:
        batch = self.batch
        if loop.together:
            return batch.prompts
        return prompts_at_a_time(self._sizes(loop.slots), batch.width, batch.group, loop.slots)

    def _drawing(self, rows: int) -> int:
        """Of the tokens that are drawn at a time."""
        vocabulary = self.model.config.vocab_size
        arrays = _LOGITS + _SORTED * (self.config.top_p < 1)
        block = block_size(vocabulary)
        if _ACROSS < block < _LANES and not on_cpu():  # the running sum
            arrays += _LANES // block - 1
        return 4 * arrays * rows * self._part(vocabulary)

    def _part(self, size: int) -> int:
        """A device's, of what is split along `tensor`."""
        return size // head_shards(self.mesh)

    @functools.cached_property
    def _value(self) -> jax.ShapeDtypeStruct:
        """`[K, H]` of a token in a layer, as that makes it."""
        shape = kv_heads_on(self.model.config, self.mesh), self.model.config.head_dim
        return jax.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32 if on_cpu() else self.model.config.dtype))

    @property
    def _kept(self) -> jax.ShapeDtypeStruct:
        """The same as it is kept."""
        return as_kept(self._value, self.config.cache_dtype)

    @functools.cached_property
    def _token(self) -> int:
        """Keys and values of a token in all layers, as these make them."""
        return self._part(2 * self.model.config.num_layers * self._value.size * self._value.dtype.itemsize)

    @functools.cached_property
    def _given(self) -> Params:
        return (self.learner or self.model).abstract_params_on(self.learner_mesh)

    @functools.cached_property
    def _resident(self) -> int:
        return bytes_per_device(self._given) if self.resident is None else self.resident

    @functools.cached_property
    def _ours(self) -> Params:
        """Parameters as the sampler has them, stacked."""
        axes = read_by_sampler(self.model.logical_axes(), self.model.config)

        def one(names: tuple[str | None, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, dtype_read(names, leaf.dtype, self.dtype))

        given = read_by_sampler(self.model.abstract_params(), self.model.config)
        cast = jax.tree.map(one, axes, given, is_leaf=_is_names)
        shapes = jax.eval_shape(lambda params: with_whole_parts(params, self.model.config), cast)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            parameter_shardings(self.mesh, axes, shapes),
        )

    @functools.cached_property
    def _copied(self) -> int:
        """Of the weights that are no longer the learner's own arrays, and of those with adapters merged into them."""

        def differs(ours: Any, given: Any) -> bool:
            same = ours.sharding.shard_shape(ours.shape) == given.sharding.shard_shape(given.shape)
            return not same or ours.dtype != given.dtype or self._widened > 1

        if self.learner is not None:
            return bytes_per_device(self._ours)  # rounded
        base = read_by_sampler(self._given, self.model.config)
        changed = jax.tree.map(lambda ours, given: ours if differs(ours, given) else None, self._ours, base)
        merged = base["layers"] if has_adapters(self._given) and not has_adapters(base) else {}
        return self._widened * bytes_per_device(changed) + bytes_per_device(merged)

    @functools.cached_property
    def _unstacked(self) -> int:
        """Of the layers one by one."""
        return self._widened * bytes_per_device(self._ours["layers"])

    @property
    def _widened(self) -> int:
        """How much larger weights become: XLA's CPU compiler multiplies float32, and keeps copies in it."""
        return 4 // self.dtype.itemsize if on_cpu() else 1


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple)
