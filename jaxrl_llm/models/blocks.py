"""Flax NNX definitions of a transformer's parts: what parameters each has, and what it computes with them.

Weights are `[out, in]`; each parameter bears the logical names of its axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxrl_llm.logprobs import outer_product
from jaxrl_llm.models.config import Activation, DType, LayerKind, LoraTarget, ModelConfig, Norms
from jaxrl_llm.models.experts import Experts, Routed
from jaxrl_llm.models.integers import Blocks, blocks_product
from jaxrl_llm.models.operands import GATES, LINEAR, operand, times_transposed
from jaxrl_llm.models.rope import Rotation, rotate
from jaxrl_llm.sharding import blocks_of, constrain, dealt_again, gathered

Attend = Callable[..., jax.Array]
"""Queries `[..., N, H]`, keys and values `[..., K, H]` of the same tokens and, as `sinks`, the heads' `[N]` float32 or
`None` → mixed values `[..., N, H]`."""
Projected = tuple[jax.Array, jax.Array]
"""Keys (rotated) and values of some tokens, both `[..., K, H]`."""

RESIDUAL = "residual"
"""Name, for policies of rematerialisation, of the residual stream where it enters a block."""


_Axes = tuple[str, str]
"""Logical names of a weight's axes."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(dtype: DType, sums: DType, axes: _Axes, x: jax.Array, weight: jax.Array) -> jax.Array:
    """x·Wᵀ, whose factors are numbers of `dtype` and whose weight's gradient leaves its product in the type `sums`.

    It is summed over tokens there, and after it over devices and micro-batches: of bfloat16 numbers that sum is worth
    little. A weight in float32 has it as it is, which is why gradients are taken at float32 copies of parameters.

    The result is of the type of x: `dtype`, or float32 (`Transformer.run_layers` says where).

    The backward pass transposes the narrower operand of the weight's gradient.
    XLA's CPU products want their left operand transposed for it, and fuse that with the pointwise arithmetic that
    makes the operand: on the wide side of an MLP this is the activation's derivative, element by element in the
    wrong order, a fifth of an update's time.
    """
    return _product_forward(dtype, sums, axes, x, weight)[0]


def _product_forward(
    dtype: DType, sums: DType, axes: _Axes, x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = operand(dtype, x)
    return times_transposed(x, _factor(dtype, axes, weight, x)), (x, weight)


def _factor(dtype: DType, axes: _Axes, weight: jax.Array, x: jax.Array) -> jax.Array:
    """What of a weight is multiplied with x, or with the gradient of x·Wᵀ."""
    return gathered(operand(dtype, weight.astype(x.dtype)), *axes)


def _product_backward(
    dtype: DType, sums: DType, axes: _Axes, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    gradient = operand(dtype, gradient)
    to_x = jnp.einsum("...o,oi->...i", gradient, _factor(dtype, axes, weight, x))
    narrow = weight.shape[0] < weight.shape[1]
    to_weight = outer_product(gradient, x, dtype=sums) if narrow else outer_product(x, gradient, dtype=sums).T
    return to_x, dealt_again(to_weight, *axes).astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shift(dtype: DType, y: jax.Array, bias: jax.Array) -> jax.Array:
    """Y + b in the type of y, b a number of `dtype`; its gradient is summed in float32."""
    return y + operand(dtype, bias.astype(y.dtype))


def _shift_forward(dtype: DType, y: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _shift(dtype, y, bias), bias


def _shift_backward(dtype: DType, bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.sum(gradient.astype(jnp.float32), axis=range(gradient.ndim - 1))
    return gradient, total.astype(bias.dtype)


_shift.defvjp(_shift_forward, _shift_backward)


class Linear(nnx.Module):
    """y = x·Wᵀ + b, and (alpha / rank)·(x·Aᵀ)·Bᵀ where it has an adapter."""

    def __init__(
        self,
        out: int,
        inner: int,
        axes: tuple[str, str],
        bias: bool,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        name: LoraTarget | None = None,
    ):
        """Weight `[out, inner]` from N(0, 0.02²), bias zero; `axes` are the logical names of both.

        Where `config.lora` targets `name`: A `[rank, inner]` uniform in ±1/√inner, as PEFT draws it, and B
        `[out, rank]` zero, so that the output is that of the weight alone.
        """
        dtype = jnp.dtype(config.param_dtype)
        weight = 0.02 * jax.random.normal(rngs.params(), (out, inner), dtype)
        rounded = None if config.base_dtype is None or name is None else Blocks.of(weight, config.base_dtype)
        weight, scale, offset = (weight, None, None) if rounded is None else rounded
        in_blocks = axes if rounded is None else (blocks_of(axes[1]), axes[0])
        self.weight = nnx.Param(weight, axes=in_blocks)
        self.weight_scale = None if scale is None else nnx.Param(scale, axes=in_blocks)
        self.weight_offset = None if offset is None else nnx.Param(offset, axes=in_blocks)
        self.bias = nnx.Param(jnp.zeros((out,), dtype), axes=axes[:1]) if bias else None
        lora = config.lora if config.lora is not None and name in config.lora.targets else None
        self.scale = 0.0 if lora is None else lora.scale
        self.dtype, self.gradient_sums, self.axes = config.dtype, config.gradient_sums, axes
        if lora is None:
            self.lora_a = self.lora_b = None
        else:
            bound = inner**-0.5
            a = jax.random.uniform(rngs.lora(), (lora.rank, inner), jnp.float32, -bound, bound)
            self.lora_a = nnx.Param(a, axes=("lora_rank", axes[1]))
            self.lora_b = nnx.Param(jnp.zeros((out, lora.rank), jnp.float32), axes=(axes[0], "lora_rank"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., inner]` to `[..., out]`."""
        product = functools.partial(_product, self.dtype, self.gradient_sums)
        if self.weight_scale is None:
            y = product(self.axes, x, self.weight[...])
        else:
            offset = None if self.weight_offset is None else self.weight_offset[...]
            axes = blocks_of(self.axes[1]), self.axes[0]
            y = blocks_product(self.dtype, axes, x, Blocks(self.weight[...], self.weight_scale[...], offset))
        if self.lora_a is not None and self.lora_b is not None:
            (out, inner), rank = self.axes, "lora_rank"
            narrow = product((rank, inner), x, self.lora_a[...])
            y = y + self.scale * product((out, rank), narrow, self.lora_b[...])
        return checkpoint_name(y if self.bias is None else _shift(self.dtype, y, self.bias[...]), LINEAR)


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + ε) · (scale + offset), in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, config: ModelConfig):
        """Scale `[width]` such that the factor is one."""
        ones = jnp.full((width,), 1 - config.norm_offset, jnp.dtype(config.param_dtype))
        self.scale = nnx.Param(ones, axes=("norm",))
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return ((scale + self.offset if self.offset else scale) * wide).astype(x.dtype)


class Attention(nnx.Module):
    """Projections of grouped-query attention; the attention itself is passed in."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Query, key, value and output projections, and norms on queries and keys where configured."""
        d, h = config.embed_dim, config.head_dim
        n, k = config.num_heads * h, config.num_kv_heads * h
        self.query = Linear(n, d, ("heads", "embed"), config.attention_bias, config, rngs, name="query")
        self.key = Linear(k, d, ("kv_heads", "embed"), config.attention_bias, config, rngs, name="key")
        self.value = Linear(k, d, ("kv_heads", "embed"), config.attention_bias, config, rngs, name="value")
        self.output = Linear(d, n, ("embed", "heads"), config.output_bias, config, rngs, name="output")
        self.over_heads = config.qk_norm_over_heads
        self.query_norm = RMSNorm(n if self.over_heads else h, config) if config.qk_norm else None
        self.key_norm = RMSNorm(k if self.over_heads else h, config) if config.qk_norm else None
        self.query_factor = 1.0 if config.query_scalar is None else (h / config.query_scalar) ** 0.5
        sinks = jnp.zeros((config.num_heads,), jnp.dtype(config.param_dtype)) if config.attention_sinks else None
        self.sinks = None if sinks is None else nnx.Param(sinks, axes=("sinks",))
        self.head_dim = h

    def project(self, x: jax.Array, turn: Rotation | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[..., N, H]`, keys and values `[..., K, H]` of `[..., D]`.

        Without a rotation neither queries nor keys know their position. Where `tensor_heads` has repeated the weights
        of keys and values, K counts the repeated heads.
        """
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.over_heads:
            query, key = _normed(query, self.query_norm), _normed(key, self.key_norm)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if not self.over_heads:
            query, key = _normed(query, self.query_norm), _normed(key, self.key_norm)
        if self.query_factor != 1:  # attention divides by √H whatever the model
            query = query * self.query_factor
        if turn is not None:
            key, query = rotate(key, turn), rotate(query, turn)
        return query, key, value

    @property
    def sink_logits(self) -> jax.Array | None:
        """What stands beside the scores of each query head, `[N]` float32, if the model has that."""
        return None if self.sinks is None else self.sinks[...].astype(jnp.float32)

    def gather(self, mixed: jax.Array) -> jax.Array:
        """Maps what the heads give, `[..., N, H]`, to `[..., D]`."""
        return self.output(mixed.reshape(*mixed.shape[:-2], -1))

    def _heads(self, x: jax.Array) -> jax.Array:
        """`[..., N·H]` → `[..., N, H]`, whole heads on each device."""
        x = x.reshape(*x.shape[:-1], -1, self.head_dim)
        between = ("time", *(None,) * (x.ndim - 4)) if x.ndim > 3 else ()
        return constrain(x, "rows", *between, "heads_activation", None)


class MLP(nnx.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs, *, width: int | None = None):
        """The three projections; `width`: F, if it is not that of the model."""
        d, f, bias = config.embed_dim, width or config.mlp_dim, config.mlp_bias
        self.gate = Linear(f, d, ("mlp", "embed"), bias, config, rngs, name="gate")
        self.up = Linear(f, d, ("mlp", "embed"), bias, config, rngs, name="up")
        self.down = Linear(d, f, ("embed", "mlp"), bias, config, rngs, name="down")
        self.activation: Activation = kind.activation
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., D]` to `[..., D]`."""
        gated = GATES[self.activation]
        if self.config.remat == "none":  # no layer is computed again, but this, which is little work, is
            gated = jax.checkpoint(gated, prevent_cse=not self.config.scan_layers)
        return self.down(gated(self.gate(x), self.up(x)))


class Block(nnx.Module):
    """Residual block: x + a(x), then x + m(x), where a is attention and m the MLP or a mixture of them.

    Each has the norms of its kind.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs):
        """Parameters of one layer."""

        def norm(*kinds: Norms) -> RMSNorm | None:
            return RMSNorm(config.embed_dim, config) if kind.norms in kinds else None

        self.attention_norm = norm("pre", "sandwich")
        self.attention = Attention(config, rngs)
        self.attention_post_norm = norm("post", "sandwich")
        self.mlp_norm = norm("pre", "sandwich")
        self.mlp = None if kind.experts else MLP(config, kind, rngs)
        self.experts = Experts(config, kind, rngs) if kind.experts else None
        if not kind.experts or config.experts is None or config.experts.shared is None:
            self.shared = self.shared_gate = None
        else:
            self.shared = MLP(config, kind, rngs, width=config.experts.shared)
            self.shared_gate = Linear(1, config.embed_dim, ("shared_gate", "embed"), False, config, rngs)
        self.mlp_post_norm = norm("post", "sandwich")

    def __call__(
        self, x: jax.Array, turn: Rotation | None, attention: Attend, chosen: jax.Array | None = None
    ) -> tuple[jax.Array, Projected, Routed | None]:
        """Maps the residual stream `[..., D]` to itself, and returns the layer's keys and values, and its experts.

        Args:
            x: the residual stream.
            turn: rotations of its tokens.
            attention: that of this layer.
            chosen: `[..., k]`: as of `top_experts`, where the layer has experts.
        """
        x = checkpoint_name(x, RESIDUAL)
        query, key, value = self.project(x, turn)
        x, routed = self.finish(x, attention(query, key, value, sinks=self.attention.sink_logits), chosen)
        return x, (key, value), routed

    def project(self, x: jax.Array, turn: Rotation | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What comes before the attention, token by token: queries, keys and values."""
        return self.attention.project(_normed(x, self.attention_norm), turn)

    def finish(
        self, x: jax.Array, mixed: jax.Array, chosen: jax.Array | None = None
    ) -> tuple[jax.Array, Routed | None]:
        """What comes after it: the residual stream with what attention `[..., N, H]` and MLP or experts add to it."""
        x = x + _normed(self.attention.gather(mixed), self.attention_post_norm)
        read, routed = _normed(x, self.mlp_norm), None
        if self.experts is not None:
            given, routed = self.experts(read, chosen)
            if self.shared is not None and self.shared_gate is not None:
                given += jax.nn.sigmoid(self.shared_gate(read)) * self.shared(read)
        else:
            assert self.mlp is not None
            given = self.mlp(read)
        return x + _normed(given, self.mlp_post_norm), routed


def _normed(x: jax.Array, norm: RMSNorm | None) -> jax.Array:
    return x if norm is None else norm(x)


class Frame(nnx.Module):
    """Parameters outside the layers: embedding, last norm, LM head (absent when tied)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Embedding and head `[V, D]`."""
        v, d = config.vocab_size, config.embed_dim
        self.embed = Linear(v, d, ("vocab", "embed"), False, config, rngs)
        self.final_norm = RMSNorm(d, config)
        self.lm_head = None if config.tie_embeddings else Linear(v, d, ("vocab", "embed"), False, config, rngs)
