"""Architecture of a decoder-only transformer as one frozen, hashable record."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal, get_args

from jaxrl_llm.checks import check_fields, one_of, positive

RopeScaling = Literal["none", "linear", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
Norms = Literal["pre", "post", "sandwich"]
DType = Literal["float32", "bfloat16"]
BaseDType = Literal["int8", "int4"]
AttentionKernel = Literal["auto", "dense", "blockwise", "splash", "splash_interpret"]
Remat = Literal["none", "full", "dots", "attention", "offload"]
LoraTarget = Literal["query", "key", "value", "output", "gate", "up", "down"]
Params = dict[str, Any]
"""A tree of arrays: of a whole model, or of a part of it."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and the scalings in use.

    The meaning of the scaling parameters is that of `transformers`' `rope_parameters`.
    """

    theta: float = 10_000.0
    """Base of the geometric progression of wavelengths."""
    scaling: RopeScaling = "none"
    """`linear` (Chen et al. 2023), `llama3` (Llama 3.1), `yarn` (Peng et al. 2023), `longrope` (Ding et al. 2024)."""
    factor: float = 1.0
    """Context extension factor (all scalings)."""
    original_max_position_embeddings: int | None = None
    """Context length before the extension (llama3, yarn, longrope)."""
    low_freq_factor: float = 1.0
    """Wavelengths above original length / this factor are scaled fully (llama3)."""
    high_freq_factor: float = 4.0
    """Wavelengths below original length / this factor are kept (llama3)."""
    beta_fast: float = 32.0
    """Rotations above which a frequency is kept (yarn)."""
    beta_slow: float = 1.0
    """Rotations below which a frequency is interpolated (yarn)."""
    attention_factor: float | None = None
    """Multiplier of cos and sin; `None` derives it from `factor` (yarn, longrope) or the mscales (yarn)."""
    mscale: float | None = None
    """Numerator's coefficient of the derived attention factor (yarn)."""
    mscale_all_dim: float | None = None
    """Denominator's coefficient of the derived attention factor (yarn)."""
    truncate: bool = True
    """Round the correction range to whole dimensions (yarn)."""
    short_factors: tuple[float, ...] = ()
    """What the wavelength of each plane is multiplied by in texts of the original context (longrope)."""
    long_factors: tuple[float, ...] = ()
    """The same in longer texts (longrope)."""
    long: bool = False
    """Turn all texts by the long factors, whatever their length, so that they may be longer than the original context
    (longrope): a position is then turned alike in every text, as sampling and learning need it."""
    partial: float = 1.0
    """Share of each head that is turned, its first numbers; the others do not know their position (Phi-4-mini)."""

    def __post_init__(self) -> None:
        """Rejects scalings that cannot be computed."""
        if self.scaling not in get_args(RopeScaling):
            raise ValueError(f"rope scaling {self.scaling!r} is not one of {get_args(RopeScaling)}")
        if self.scaling in ("llama3", "yarn", "longrope") and not self.original_max_position_embeddings:
            raise ValueError(f"rope scaling {self.scaling!r} needs original_max_position_embeddings")
        check_fields(
            "rope",
            self,
            theta=(1 < self.theta < math.inf, "be above 1: wavelengths are powers of it"),
            factor=(1 <= self.factor < math.inf, "be at least 1: it extends the context"),
            high_freq_factor=(
                self.scaling != "llama3" or 0 < self.low_freq_factor < self.high_freq_factor,
                f"be above low_freq_factor={self.low_freq_factor}",
            ),
            beta_fast=(
                self.scaling != "yarn" or 0 < self.beta_slow < self.beta_fast,
                f"be above beta_slow={self.beta_slow}",
            ),
            long=(not self.long or self.scaling == "longrope", "be False: only longrope has long factors"),
            long_factors=(
                (self.scaling == "longrope") == bool(self.long_factors)
                and len(self.long_factors) == len(self.short_factors),
                f"be as many as short_factors={self.short_factors}, and none without scaling='longrope'",
            ),
            partial=(0 < self.partial <= 1, "be above 0 and at most 1"),
        )

    def planes(self, head_dim: int) -> int:
        """Planes of a head that are turned: half of the numbers that are.

        Raises:
            ValueError: they are no whole number, or another than there are factors.
        """
        turned = int(head_dim * self.partial)
        if turned < 2 or turned % 2:
            raise ValueError(
                f"rope.partial={self.partial} of head_dim={head_dim} is {turned}: it must be even, as planes"
            )
        if self.scaling == "longrope" and len(self.short_factors) != turned // 2:
            raise ValueError(
                f"rope has {len(self.short_factors)} short_factors for the {turned // 2} planes of head_dim={head_dim}"
            )
        return turned // 2


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What one layer may have otherwise than its neighbours: static, so that its mask and its kernel are."""

    window: int | None = None
    """Positions that a token sees, itself included; `None`: all before it."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary position embedding; `None`: queries and keys are not turned (NoPE, SmolLM3)."""
    activation: Activation = "silu"
    """Nonlinearity of the MLP's gate; `clamped_swiglu` is one of gate and up together (`operands.py`)."""
    norms: Norms = "pre"
    """Where RMS norms are: on what attention and MLP read (`pre`), on what they give, before it is added to the
    residual stream (`post`, OLMo 2), or both (`sandwich`, Gemma 2 and 3)."""
    experts: bool = False
    """Whether it has `ModelConfig.experts` in place of the MLP."""

    def __post_init__(self) -> None:
        """Rejects layers that cannot be."""
        check_fields(
            "LayerKind",
            self,
            window=(self.window is None or self.window >= 1, "be at least 1, or None for full attention"),
            activation=one_of(self.activation, Activation),
            norms=one_of(self.norms, Norms),
        )


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts: gated MLPs, of which a router chooses some for each token."""

    count: int
    """E."""
    per_token: int
    """k, experts that compute a token."""
    width: int
    """F of each."""
    normalize: bool = True
    """Whether the shares of the k add up to 1 (Mixtral; Qwen3-MoE's `norm_topk_prob`), or are what softmax over all
    experts gives them."""
    shared: int | None = None
    """F of one more, which computes every token, and of which a sigmoid says how much is taken (Qwen2-MoE); `None`:
    there is none."""
    bias: bool = False
    """Biases on the router and on the projections of each expert (GPT-OSS)."""

    def __post_init__(self) -> None:
        """Rejects mixtures that cannot be."""
        check_fields(
            "experts",
            self,
            count=positive(self.count),
            per_token=(1 <= self.per_token <= self.count, f"be 1 to count={self.count}"),
            width=positive(self.width),
            shared=positive(self.shared, optional=True),
        )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: W·x + (alpha / rank)·B·A·x, of which A and B alone are trained (Hu et al. 2021).

    Adapters are float32 whatever the type of the parameters.
    """

    rank: int = 8
    """Rows of A and columns of B; 0: no adapters."""
    alpha: float = 16.0
    """What the adapters' output is multiplied by, over the rank."""
    targets: tuple[LoraTarget, ...] = get_args(LoraTarget)
    """Which linear layers of a block have adapters."""
    use_rslora: bool = False
    """Scale by alpha / √rank instead, so that a higher rank learns as fast (Kalajdzievski 2023)."""

    def __post_init__(self) -> None:
        """Rejects adapters that cannot be meant."""
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} must be positive, or 0 for no adapters")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha} must be positive: at 0, adapters have no effect")
        unknown = [target for target in self.targets if target not in get_args(LoraTarget)]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets={self.targets} must be some of {get_args(LoraTarget)}, each once")

    @property
    def scale(self) -> float:
        """What B·A·x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: residual blocks of kinds, grouped-query attention, gated MLP, RMS norms."""

    vocab_size: int
    """V, rows of the embedding."""
    embed_dim: int
    """D, width of the residual stream."""
    mlp_dim: int
    """F, width of the gated MLP, in layers that have no experts."""
    num_layers: int
    """L."""
    num_heads: int
    """N, query heads."""
    num_kv_heads: int
    """K, key and value heads; N is a multiple of it."""
    head_dim: int
    """H; N·H need not equal D."""
    max_position_embeddings: int = 2048
    """Longest sequence the checkpoint was made for."""
    norm_eps: float = 1e-5
    """ε of the RMS norms."""
    norm_offset: float = 0.0
    """Added to the scales of the RMS norms, which are stored without it (Gemma: 1)."""
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)
    """The kinds of the layers: of each, or of the first few, after which they begin again. Kept as the shortest such
    period: `kinds` has that of each layer."""
    experts: ExpertsConfig | None = None
    """What layers have whose kind says `experts`."""
    qk_norm: bool = False
    """RMS norm over H on queries and keys, before the rotation (Qwen3)."""
    qk_norm_over_heads: bool = False
    """That norm is over all heads at once, N·H numbers of queries and K·H of keys (OLMo 2)."""
    query_scalar: float | None = None
    """s in the scores q·k/√s; `None`: H, the head size (Gemma's `query_pre_attn_scalar`)."""
    attention_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Bias on the MLP's projections."""
    attention_sinks: bool = False
    """A learned number of each query head stands beside the scores of the keys, in the softmax's sum alone: it takes
    weight to itself and gives no value (GPT-OSS)."""
    tie_embeddings: bool = False
    """Use the embedding as the LM head."""
    scale_embeddings: bool = False
    """Multiply the embeddings of tokens by √D, rounded to the type of activations, and not the LM head (Gemma)."""
    attention_softcap: float | None = None
    """c in c·tanh(logits/c) of the attention."""
    logit_softcap: float | None = None
    """c in c·tanh(logits/c) of the LM head."""
    dtype: DType = "float32"
    """Type of activations and matrix products; norms, softmax and logits are float32 always."""
    param_dtype: DType = "float32"
    """Type in which parameters are stored."""
    base_dtype: BaseDType | None = None
    """Type of integers as which the weights of the layers' linear maps are kept (`integers.py`), in place of
    `param_dtype`: they are not trained, adapters beside them are."""
    gradient_sums: DType = "float32"
    """Type in which gradients of the layers' weights leave their products, to be summed over devices. In bfloat16,
    where activations are, half as much is moved, and a gradient is off by 0.4 % on 8 devices, by 1.6 to 1.9 % on 256
    (which sum one after another); embedding and head keep float32, and CPUs sum the rounded numbers in it."""
    scan_layers: bool = True
    """Run the layers as one compiled loop, so that compile time does not grow with depth. Unrolled, a small
    model on a CPU is up to twice as fast."""
    remat: Remat = "full"
    """What the backward pass finds of each layer, in numbers of the compute type per token, and what it does again:
    `full`: D, the layer's input, all is done again. `attention`: D + N·H, the output of attention, too (of kernels
    also N log-sum-exps in float32), so that kernels do not attend twice. `dots`: 2·D + 2·F + (N + 2·K)·H, what linear
    maps give. `none`: everything, and only the MLP's activation is done again: fastest, where memory allows. `offload`:
    as `full`, with the layers' inputs in the memory of the host, and one or two of them at a time on the device."""
    attention: AttentionKernel = "auto"
    """How attention is computed in training: with all scores in memory (`dense`: fastest on short texts), in blocks in
    plain JAX (`blockwise`), by a TPU kernel (`splash`; `splash_interpret` runs it anywhere, slowly). `auto` chooses by
    platform and length."""
    batch_invariant: bool = False
    """Compute each token by itself, in the same order of sums in sampler and learner (`batch_invariant.py`): then the
    log-probs of both are the same numbers, to the last bit, in whatever batch. Slower; gradients are the usual ones."""
    known_tokens: int | None = None
    """Ids from here on are impossible: the embedding is longer than the tokenizer. `None`: all V are possible."""
    family: str | None = dataclasses.field(default=None, compare=False)
    """`model_type` of the checkpoint that the model came from, as which it is exported if that can express it. Models
    are equal whatever they came from."""
    lora: LoraConfig | None = None
    """Adapters beside the weights of each block, or none; parameters that lack them are those of the base alone."""

    def __post_init__(self) -> None:
        """Rejects sizes that do not fit together."""
        sizes = ("vocab_size", "embed_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        positives = (*sizes, "max_position_embeddings", "norm_eps")
        check_fields("ModelConfig", self, **{field: positive(getattr(self, field)) for field in positives})
        optional = ("attention_softcap", "logit_softcap", "query_scalar")
        check_fields("ModelConfig", self, **{name: positive(getattr(self, name), optional=True) for name in optional})
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        for kind in self.layer_kinds:
            if kind.rope is not None:
                kind.rope.planes(self.head_dim)
        if self.qk_norm_over_heads and not self.qk_norm:
            raise ValueError("qk_norm_over_heads=True is of the norm on queries and keys: set qk_norm=True, too")
        if not 1 <= len(self.layer_kinds) <= self.num_layers:
            raise ValueError(
                f"layer_kinds has {len(self.layer_kinds)} entries for num_layers={self.num_layers}: give that of each "
                "layer, or a period of them"
            )
        object.__setattr__(self, "layer_kinds", _shortest_period(self.layer_kinds, self.num_layers))
        if (self.experts is not None) != any(kind.experts for kind in self.layer_kinds):
            raise ValueError(
                f"experts={self.experts}, but {'no kind of layer has some' if self.experts else 'a kind of layer has'} "
                "(LayerKind.experts): set both or none"
            )
        choices = {"dtype": DType, "param_dtype": DType, "gradient_sums": DType}
        for field, options in (choices | {"remat": Remat, "attention": AttentionKernel}).items():
            if getattr(self, field) not in get_args(options):
                raise ValueError(f"ModelConfig.{field}={getattr(self, field)!r} is not one of {get_args(options)}")
        if self.base_dtype not in (None, *get_args(BaseDType)):
            raise ValueError(f"ModelConfig.base_dtype={self.base_dtype!r} is not one of {get_args(BaseDType)}, or None")
        if (self.gradient_sums, self.dtype) == ("bfloat16", "float32"):
            raise ValueError(
                "gradient_sums=bfloat16 would round gradients that dtype=float32 asks to be exact: set dtype=bfloat16, "
                "or leave it out"
            )
        if self.batch_invariant:
            self._check_batch_invariant()
        if self.experts is not None and self.lora is not None and self.lora.use_rslora:
            alpha = self.lora.scale * self.lora.rank
            raise ValueError(
                "lora.use_rslora=True with experts: PEFT joins the adapters of gate and up to one of twice the rank, "
                f"and would scale them by √2 too much; set use_rslora=False and alpha={alpha:g}"
            )
        if self.lora is not None and not self.lora.rank:
            raise ValueError("ModelConfig.lora has rank 0: give adapters a rank, or set lora=None")

    def _check_batch_invariant(self) -> None:
        """Raises where numbers could not be the same, or a setting would have no effect."""
        way_out = "leave out one of them and model.batch_invariant"
        if self.lora is not None:
            raise ValueError(
                f"model.batch_invariant=True with adapters (rank {self.lora.rank}): the sampler merges them into the "
                f"weights, and the learner does not; {way_out}"
            )
        if self.experts is not None:
            raise ValueError(
                f"model.batch_invariant=True with {self.experts.count} experts: what their products sum depends on the "
                f"batch; {way_out.replace('one of them and ', '')}, and let the learner replay the sampler's choice"
            )
        if self.base_dtype is not None:
            raise ValueError(f"model.batch_invariant=True with base_dtype={self.base_dtype}: {way_out}")
        if self.attention_sinks:
            raise ValueError(f"model.batch_invariant=True with attention_sinks is not implemented: {way_out}")
        if self.remat != "full":
            raise ValueError(
                f"model.remat={self.remat!r} would have no effect: with model.batch_invariant the backward pass finds "
                "the layers' inputs alone; pass --model.remat=full"
            )
        if self.attention != "auto":
            raise ValueError(
                f"model.attention={self.attention!r}: with model.batch_invariant attention has an order of its own; "
                "pass --model.attention=auto"
            )

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, from the first to the last."""
        return tuple(itertools.islice(itertools.cycle(self.layer_kinds), self.num_layers))

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that the model reads as it was trained to.

        That is `max_position_embeddings`; with longrope's short factors, the original context.
        """
        short = [
            kind.rope.original_max_position_embeddings or 0
            for kind in self.layer_kinds
            if kind.rope is not None and kind.rope.scaling == "longrope" and not kind.rope.long
        ]
        return min(self.max_position_embeddings, *short) if short else self.max_position_embeddings

    @property
    def way_to_longer(self) -> str:
        """How texts may be longer than `longest_text`, for errors; empty where they may not."""
        most = self.max_position_embeddings
        return "" if self.longest_text == most else f" (model.long_rope=True: {most}, with longrope's long factors)"

    def with_long_rope(self) -> ModelConfig:
        """The model whose layers turn all texts by longrope's long factors.

        Raises:
            ValueError: no layer has them.
        """

        def one(kind: LayerKind) -> LayerKind:
            if kind.rope is None or kind.rope.scaling != "longrope":
                return kind
            return dataclasses.replace(kind, rope=dataclasses.replace(kind.rope, long=True))

        kinds = tuple(map(one, self.layer_kinds))
        if kinds == self.layer_kinds:
            raise ValueError("model.long_rope=True would have no effect: this model has no longrope; leave it out")
        return dataclasses.replace(self, layer_kinds=kinds)

    @property
    def num_parameters(self) -> int:
        """Number of scalars, a tied embedding counted once, adapters left out."""
        d, f, h = self.embed_dim, self.mlp_dim, self.head_dim
        qkv = (self.num_heads + 2 * self.num_kv_heads) * h
        attention = d * (qkv + self.num_heads * h)
        normed = self.num_heads + self.num_kv_heads if self.qk_norm_over_heads else 2
        attention += normed * h * self.qk_norm + qkv * self.attention_bias + d * self.output_bias
        attention += self.num_heads * self.attention_sinks
        dense = sum(not kind.experts for kind in self.kinds)
        mlps = dense * (2 * f + d) * self.mlp_bias + sum(self.mlp_weights(kind) for kind in self.kinds)
        if self.experts is not None and self.experts.bias:
            mlps += (self.num_layers - dense) * self.experts.count * (2 * self.experts.width + d + 1)
        norms = sum(4 if kind.norms == "sandwich" else 2 for kind in self.kinds)
        embeddings = self.vocab_size * d * (2 - self.tie_embeddings)
        return embeddings + self.num_layers * attention + mlps + (norms + 1) * d

    def mlp_weights(self, kind: LayerKind, *, active: bool = False) -> int:
        """Entries of the matrices of a layer's MLP or experts, router included; `active`: those that a token meets."""
        if not kind.experts:
            return 3 * self.embed_dim * self.mlp_dim
        assert self.experts is not None
        experts = self.experts.per_token if active else self.experts.count
        shared = 0 if self.experts.shared is None else 3 * self.experts.shared + 1
        return self.embed_dim * (3 * experts * self.experts.width + self.experts.count + shared)


def _shortest_period(kinds: tuple[LayerKind, ...], layers: int) -> tuple[LayerKind, ...]:
    """The fewest kinds that, begun again and again, give those of the layers: equal models have equal records."""
    kinds = tuple(itertools.islice(itertools.cycle(kinds), layers))
    period = next(period for period in range(1, layers + 1) if kinds[period:] == kinds[: layers - period])
    return kinds[:period]
