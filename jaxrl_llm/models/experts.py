"""Mixtures of experts: a router that chooses k of E gated MLPs for each token, and their weighted sum.

Each device computes its own experts for its own tokens, one product of rows that are sorted by expert
(`kernels/grouped.py`). Nothing has a capacity, and no token is dropped.

Along the mesh axis `expert`, which is more rows everywhere else, devices gather one another's tokens, compute those
of their experts and sum what these give to where the tokens came from. Of N tokens on each of e devices that moves
(e − 1)·N·D there and as much back; an exchange of each token with its k experts moves k·N·D·(e − 1)/e, which is more
wherever e < k (Qwen3-MoE: k = 8), needs to know how many go where, and room for the worst case.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxrl_llm.models.config import Activation, ExpertsConfig, LayerKind, LoraTarget, ModelConfig, Params
from jaxrl_llm.models.expert_products import Gathers, expert_product, gathers_of
from jaxrl_llm.models.integers import LEAVES, Blocks
from jaxrl_llm.models.operands import GATES, LINEAR, operand
from jaxrl_llm.sharding import MESH_AXES, blocks_of, gathered, row_shards, spec

_EXPERT = "expert"
"""The mesh axis."""


class Routed(NamedTuple):
    """What the router made of tokens."""

    experts: jax.Array
    """`[..., k]` int32: those that computed each token."""
    logits: jax.Array
    """`[..., E]` float32."""


def top_experts(logits: jax.Array, config: ExpertsConfig, chosen: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """The experts of each token, and how much of what each gives is taken.

    Args:
        logits: `[..., E]` float32.
        config: says how many, and whether their shares add up to 1.
        chosen: `[..., k]`: experts that are to be taken whatever the logits; −1: those with the highest logits.

    Returns:
        `[..., k]` int32, and their shares: softmax(logits) of them, or what of it they have among themselves.
    """
    experts = jax.lax.top_k(jax.lax.stop_gradient(logits), config.per_token)[1]
    if chosen is not None:
        experts = jnp.where(chosen < 0, experts, chosen.astype(experts.dtype))
    logs = logits if config.normalize else jax.nn.log_softmax(logits)
    of_chosen = jnp.take_along_axis(logs, experts, axis=-1)
    return experts, jax.nn.softmax(of_chosen) if config.normalize else jnp.exp(of_chosen)


class Stacked(nnx.Module):
    """A linear layer of each expert: weight `[E, out, inner]`, and a bias and an adapter where they are configured.

    The weight may be of integers.
    """

    def __init__(
        self,
        out: int,
        inner: int,
        axes: tuple[str, str],
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        name: LoraTarget,
    ):
        """As `Linear`."""
        assert config.experts is not None
        count, dtype = config.experts.count, jnp.dtype(config.param_dtype)
        weight = 0.02 * jax.random.normal(rngs.params(), (count, out, inner), dtype)
        rounded = None if config.base_dtype is None else Blocks.of(weight, config.base_dtype)
        weight, scale, offset = (weight, None, None) if rounded is None else rounded
        in_blocks = ("expert", *axes) if rounded is None else ("expert", blocks_of(axes[1]), axes[0])
        self.weight = nnx.Param(weight, axes=in_blocks)
        self.weight_scale = None if scale is None else nnx.Param(scale, axes=in_blocks)
        self.weight_offset = None if offset is None else nnx.Param(offset, axes=in_blocks)
        bias = jnp.zeros((count, out), dtype) if config.experts.bias else None
        self.bias = None if bias is None else nnx.Param(bias, axes=("expert", "mlp" if axes[0] == "mlp" else "whole"))
        if config.lora is None or name not in config.lora.targets:
            self.lora_a = self.lora_b = None
        else:
            shape, bound = (count, config.lora.rank, inner), inner**-0.5
            a = jax.random.uniform(rngs.lora(), shape, jnp.float32, -bound, bound)
            self.lora_a = nnx.Param(a, axes=("expert", "lora_rank", axes[1]))
            b = jnp.zeros((count, out, config.lora.rank), jnp.float32)
            self.lora_b = nnx.Param(b, axes=("expert", axes[0], "lora_rank"))

    @property
    def leaves(self) -> dict[str, nnx.Param[jax.Array]]:
        """The parameters by name."""
        named = {name: getattr(self, name) for name in (*LEAVES, "bias", "lora_a", "lora_b")}
        return {name: leaf for name, leaf in named.items() if leaf is not None}


class Router(nnx.Module):
    """The logits of experts, in float32 whatever the compute type."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Weight `[E, D]` from N(0, 0.02²), bias zero where there is one."""
        assert config.experts is not None
        shape, dtype = (config.experts.count, config.embed_dim), jnp.dtype(config.param_dtype)
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype), axes=("router", "embed"))
        self.bias = nnx.Param(jnp.zeros(shape[:1], dtype), axes=("router",)) if config.experts.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., D]` to `[..., E]`."""
        weight = gathered(self.weight[...].astype(jnp.float32), "router", "embed")
        logits = jnp.einsum("...d,ed->...e", x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
        return logits if self.bias is None else logits + self.bias[...].astype(jnp.float32)


class Experts(nnx.Module):
    """Σ over the chosen experts e of share_e · down_e(act(gate_e(x)) · up_e(x)) (Shazeer et al. 2017)."""

    def __init__(self, config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs):
        """The router and the three projections of each expert."""
        assert config.experts is not None
        d, f = config.embed_dim, config.experts.width
        self.router = Router(config, rngs)
        self.gate = Stacked(f, d, ("mlp", "embed_of_expert"), config, rngs, name="gate")
        self.up = Stacked(f, d, ("mlp", "embed_of_expert"), config, rngs, name="up")
        self.down = Stacked(d, f, ("embed_of_expert", "mlp"), config, rngs, name="down")
        self.config = config
        self.activation: Activation = kind.activation

    def __call__(self, x: jax.Array, chosen: jax.Array | None = None) -> tuple[jax.Array, Routed]:
        """Maps `[B, ..., D]` to `[B, ..., D]`.

        Args:
            x: the tokens.
            chosen: `[B, ..., k]`: as of `top_experts`.
        """
        config = self.config.experts
        assert config is not None
        logits = self.router(operand(self.config.dtype, x))
        linear = {name: getattr(self, name).leaves for name in ("gate", "up", "down")}
        weights = {name: {key: leaf[...] for key, leaf in leaves.items()} for name, leaves in linear.items()}
        axes = {
            name: {key: leaf.get_metadata()["axes"] for key, leaf in leaves.items()} for name, leaves in linear.items()
        }
        mesh = jax.sharding.get_abstract_mesh()
        cut = {
            name: {key: spec(mesh, axes[name][key], leaf.shape) for key, leaf in leaves.items()}
            for name, leaves in weights.items()
        }
        gathers = {name: {key: gathers_of(one, mesh) for key, one in leaves.items()} for name, leaves in cut.items()}
        of_device = _OfDevice(config, self.config, self.activation, axes, gathers)
        y, experts = _over_mesh(of_device, x, logits, chosen, weights, cut)
        return y, Routed(experts, logits)


def _over_mesh(
    of_device: _OfDevice, x: jax.Array, logits: jax.Array, chosen: jax.Array | None, weights: Params, cut: Any
) -> tuple[jax.Array, jax.Array]:
    """Each device's experts, on those axes of the ambient mesh that no `shard_map` around the caller has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    free = set(MESH_AXES).intersection(mesh.auto_axes)
    if not free:
        return of_device(x, logits, chosen, weights)
    count, missing = len(x), -len(x) % row_shards(mesh)
    if missing:
        x, logits, chosen = jax.tree.map(
            lambda x: jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), mode="edge"), (x, logits, chosen)
        )
    rows = spec(mesh, ("rows", "time") if x.ndim > 2 else ("rows",))
    y, experts = jax.shard_map(
        of_device,
        in_specs=(rows, rows, rows if chosen is not None else PartitionSpec(), cut),
        out_specs=(rows, rows),
        axis_names=free,
        check_vma=False,  # a Pallas kernel does not tell over which axes its results differ
    )(x, logits, chosen, weights)
    return (y[:count], experts[:count]) if missing else (y, experts)


class _OfDevice(NamedTuple):
    """What one device does: all static."""

    experts: ExpertsConfig
    config: ModelConfig
    activation: Activation
    axes: dict[str, dict[str, tuple[str, ...]]]
    """Logical names of the axes of each weight."""
    gathers: dict[str, dict[str, Gathers]]
    """Of each weight."""

    def __call__(
        self, x: jax.Array, logits: jax.Array, chosen: jax.Array | None, weights: Params
    ) -> tuple[jax.Array, jax.Array]:
        """The experts' sum, of the shape of x, and the experts of each token."""
        experts, shares = top_experts(logits, self.experts, chosen)
        tokens, taken, shares = (part.reshape(-1, part.shape[-1]) for part in (x, experts, shares))
        shards = _size(_EXPERT)
        if shards > 1:
            tokens, taken, shares = (
                jax.lax.all_gather(part, _EXPERT, axis=0, tiled=True) for part in (tokens, taken, shares)
            )
        y = self._computed(tokens, taken, shares, weights)
        if _size("tensor") > 1:
            y = jax.lax.psum(y, "tensor")
        if shards > 1:
            y = jax.lax.psum_scatter(y, _EXPERT, scatter_dimension=0, tiled=True)
        return y.astype(x.dtype).reshape(x.shape), experts

    def _computed(self, x: jax.Array, experts: jax.Array, shares: jax.Array, weights: Params) -> jax.Array:
        """`[N, D]` float32 of tokens `[N, D]`: the sum over those of their experts that this device has."""
        own, (count, k) = len(weights["gate"]["weight"]), experts.shape
        first = jax.lax.axis_index(_EXPERT) * own if _size(_EXPERT) > 1 else 0
        group = experts.reshape(-1) - first
        group = jnp.where((group >= 0) & (group < own), group, own)  # those of other devices come last
        order = jnp.argsort(group, stable=True).astype(jnp.int32)
        inverse = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32), unique_indices=True)
        sizes = jnp.bincount(group, length=own + 1)[:own].astype(jnp.int32)
        rows: Any = _dealt(x, order, inverse, k)
        linear = functools.partial(self._linear, weights, sizes, group[order])
        made = linear("down", GATES[self.activation](linear("gate", rows), linear("up", rows)))
        of_token = _permuted(made, inverse, order).reshape(count, k, -1)
        return jnp.einsum("nk,nkd->nd", shares, of_token.astype(jnp.float32))

    def _linear(self, weights: Params, sizes: jax.Array, group: jax.Array, name: str, rows: jax.Array) -> jax.Array:
        leaves, gathers = weights[name], self.gathers[name]
        product = functools.partial(expert_product, self.config.dtype, self.config.gradient_sums)
        y = product(leaves, gathers, rows, sizes)
        if "lora_a" in leaves:
            assert self.config.lora is not None
            for adapter in ("lora_a", "lora_b"):
                rows = product({"weight": leaves[adapter]}, {"weight": gathers[adapter]}, rows, sizes)
            y = y + self.config.lora.scale * rows
        if "bias" in leaves:
            bias = self._bias(leaves["bias"], self.axes[name]["bias"], group)
            y = y + operand(self.config.dtype, bias.astype(y.dtype))
        return checkpoint_name(y, LINEAR)

    def _bias(self, bias: jax.Array, axes: tuple[str, ...], group: jax.Array) -> jax.Array:
        """That of each row's expert, float32; 0 of rows that are other devices', and of all where others add it."""
        bias = jnp.pad(bias.astype(jnp.float32), ((0, 1), (0, 0)))[group]
        if axes[-1] == "mlp" or _size("tensor") == 1:
            return bias
        return jnp.where(jax.lax.axis_index("tensor") == 0, bias, 0)


def _size(axis: str) -> int:
    """Devices along a mesh axis in the `shard_map` around; 1 without one, or where it was not free."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape.get(axis, 1) if axis in mesh.manual_axes else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dealt(x: jax.Array, order: jax.Array, inverse: jax.Array, k: int) -> jax.Array:
    """Tokens `[N, D]`, k times each, in an order `[N·k]`; its gradient is a gather and a sum, and no scatter."""
    return x[order // k]


def _dealt_forward(x: jax.Array, order: jax.Array, inverse: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    return _dealt(x, order, inverse, k), inverse


def _dealt_backward(k: int, inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    of_token = gradient[inverse].reshape(-1, k, gradient.shape[-1])
    return jnp.sum(of_token, axis=1, dtype=jnp.float32).astype(gradient.dtype), None, None


_dealt.defvjp(_dealt_forward, _dealt_backward)


@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """`x[order]`, whose gradient is a gather, too."""
    return x[order]


def _permuted_forward(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x[order], inverse


def _permuted_backward(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient[inverse], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
