"""The decoder-only transformer: its blocks, run by `jax.lax.scan` over stacked layers.

Parameters are a plain nested dict of arrays, the leaves under `layers` stacked on a leading axis; every
function is pure in them. Weights are `[out, in]`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxrl_llm.logprobs import IMPOSSIBLE
from jaxrl_llm.losses.router import RouterTokens, router_tokens
from jaxrl_llm.models import batch_invariant as invariant
from jaxrl_llm.models.attention import KeyValue, Visibility
from jaxrl_llm.models.blocks import Attend, Block, Frame, RMSNorm
from jaxrl_llm.models.config import BaseDType, LayerKind, ModelConfig, Params, RopeConfig
from jaxrl_llm.models.experts import Routed
from jaxrl_llm.models.kernels.seam import attention
from jaxrl_llm.models.lookup import look_up
from jaxrl_llm.models.lora import has_adapters, join
from jaxrl_llm.models.operands import times_transposed
from jaxrl_llm.models.remat import rematerialised
from jaxrl_llm.models.rope import Rotation, rotation
from jaxrl_llm.models.rows import TokenRows, layout_of
from jaxrl_llm.models.stack import Layer, Stack, flat
from jaxrl_llm.models.tensor_heads import kv_heads_on, with_whole_parts
from jaxrl_llm.models.time_shards import dealt_order
from jaxrl_llm.sharding import constrain, context_shards, on_cpu, parameter_shardings


class Read(NamedTuple):
    """What a pass over rows of tokens makes."""

    states: jax.Array
    """`[B, T, D]`: the residual stream after the last layer."""
    memory: KeyValue | None = None
    """Keys and values of all layers, stacked on axis 0; `None`: they were not asked for."""
    experts: jax.Array | None = None
    """`[L, B, T, k]` int16: those that computed each token, −1 in layers that have none; with `memory`."""
    router: RouterTokens | None = None
    """`[B, T]`: what routers did with each token, the mean over the layers that have one; `None`: as `memory`."""


@functools.lru_cache(maxsize=1024)
def _abstract_block(config: ModelConfig, kind: LayerKind) -> Block:
    return nnx.eval_shape(lambda: Block(config, kind, nnx.Rngs(0)))


@functools.lru_cache(maxsize=1024)
def _definition(config: ModelConfig, kind: LayerKind) -> nnx.GraphDef:
    return nnx.split(_abstract_block(config, kind))[0]


@functools.lru_cache(maxsize=1024)
def _abstract_params(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0)))


@functools.lru_cache(maxsize=1024)
def _abstract_frame(config: ModelConfig) -> Frame:
    return nnx.eval_shape(lambda: Frame(config, nnx.Rngs(0)))


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A transformer without its parameters: hashable, static under `jit`; every method is pure.

    >>> model = Transformer(config)
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> hidden = model.hidden(params, rows)  # [P, G, Tc, D]
    """

    config: ModelConfig

    # ---------------------------------------------------------------- parameters

    def init(self, key: jax.Array) -> Params:
        """Random parameters: weights N(0, 0.02²), norms one, biases zero; adapters as `Linear` says."""
        frame_key, layers_key = jax.random.split(key)

        def one_layer(kind: LayerKind, layer_key: jax.Array) -> Params:
            # Adapters draw from a stream of their own, so that the base is that of the model without them.
            rngs = nnx.Rngs(layer_key, lora=jax.random.fold_in(layer_key, 1))
            return nnx.to_pure_dict(nnx.state(Block(self.config, kind, rngs)))

        keys = jax.random.split(layers_key, self.config.num_layers)
        layers = self.stack.build(lambda kind, some: jax.vmap(functools.partial(one_layer, kind))(some), keys)
        frame = nnx.to_pure_dict(nnx.state(Frame(self.config, nnx.Rngs(frame_key))))
        return {**frame, "layers": layers}

    def abstract_params(self) -> Params:
        """Shapes and types of the parameters."""
        return jax.tree.map(lambda leaf: leaf, _abstract_params(self.config))  # dicts of the caller's own

    def abstract_params_on(self, mesh: Mesh) -> Params:
        """Shapes, types and shardings of the parameters on a mesh.

        Raises:
            ValueError: as `shardings`.
        """
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.abstract_params(),
            self.shardings(mesh),
        )

    def logical_axes(self) -> Params:
        """Logical axis names of each parameter: the tree of `init` with tuples as leaves."""

        def names(module: nnx.Module, prefix: tuple[str, ...]) -> Params:
            axes = jax.tree.map(
                lambda leaf: prefix + leaf.get_metadata()["axes"],
                nnx.state(module),
                is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
            )
            return nnx.to_pure_dict(axes)

        blocks = [names(_abstract_block(self.config, kind), ("layers",)) for kind in self.config.layer_kinds]
        return {**names(_abstract_frame(self.config), ()), "layers": functools.reduce(join, blocks)}

    def shardings(self, mesh: Mesh) -> Params:
        """Where each parameter lies on a mesh.

        Raises:
            ValueError: the mesh does not divide a parameter, or its `tensor` axis not the query heads; names both.
        """
        kv_heads_on(self.config, mesh)
        if self.config.batch_invariant:
            invariant.check_mesh(mesh)
        return parameter_shardings(mesh, self.logical_axes(), self.abstract_params())

    # ---------------------------------------------------------------- layers

    @functools.cached_property
    def stack(self) -> Stack:
        """Which layers are scanned together, and where the parameters of each lie."""

        def paths(kind: LayerKind) -> tuple[str, ...]:
            return tuple(flat(nnx.to_pure_dict(nnx.state(_abstract_block(self.config, kind)))))

        return Stack(self.config.kinds, {kind: paths(kind) for kind in self.config.layer_kinds})

    def with_known_tokens(self, count: int) -> Transformer:
        """The model that gives ids from `count` on, which its tokenizer has not, no probability."""
        if count >= self.config.vocab_size:
            return self
        return Transformer(dataclasses.replace(self.config, known_tokens=count))

    @functools.cached_property
    def plain(self) -> Transformer:
        """The model whose programs are free in the order of sums."""
        return Transformer(dataclasses.replace(self.config, batch_invariant=False))

    @functools.cached_property
    def base(self) -> Transformer:
        """The model without adapters."""
        return Transformer(dataclasses.replace(self.config, lora=None))

    @functools.cached_property
    def floats(self) -> Transformer:
        """The model as checkpoints have it: without adapters, and no weight rounded to integers."""
        return Transformer(dataclasses.replace(self.config, lora=None, base_dtype=None))

    def rounded(self, dtype: BaseDType) -> Transformer:
        """The model without adapters whose layers' linear maps are integers."""
        return Transformer(dataclasses.replace(self.config, lora=None, base_dtype=dtype))

    def layers(self, params: Params) -> list[Params]:
        """The parameters of each layer, cut out of the stacked ones."""
        return self.stack.each(params["layers"])

    def block(self, layer_params: Params, kind: LayerKind) -> Block | invariant.TiledBlock:
        """The block of a layer of some kind, its parameters in it, on each device whole heads.

        Without adapters it is the base's.
        """
        if self.config.batch_invariant:
            block = self.plain.block(self._in_compute_type(layer_params), kind)
            assert isinstance(block, Block)
            return invariant.TiledBlock(block, self.config.dtype)
        plain = self.config.lora is not None and not has_adapters(layer_params)
        return nnx.merge(
            _definition((self.base if plain else self).config, kind), with_whole_parts(layer_params, self.config)
        )

    def norm(self, params: Params, x: jax.Array) -> jax.Array:
        """The last norm, after the layers."""
        if self.config.batch_invariant:
            return invariant.token_by_token(self.plain.norm)({"final_norm": params["final_norm"]}, x)
        return nnx.merge(nnx.split(nnx.eval_shape(lambda: RMSNorm(x.shape[-1], self.config)))[0], params["final_norm"])(
            x
        )

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Embeddings of `tokens` `[..., T]` in the compute type, `[..., T, D]`."""
        # A device looks up its part of the embedding for all rows of its replica, and rows are dealt after that. Else
        # XLA gathers the table or, in the backward pass, the gradient of all rows on every device.
        between, splits_time = (None,) * (tokens.ndim - 1), context_shards() > 1
        if splits_time:
            tokens = constrain(tokens, "rows_of_replica", *between)
        x = self._scaled(look_up(params["embed"]["weight"], tokens).astype(self.config.dtype))
        x = constrain(x, "rows_of_replica", *between, "embed")
        if splits_time:  # dealt first, since XLA does not deal both at once
            between = ("time", *between[1:])
            x = constrain(x, "rows_of_replica", *between, "embed_of_context")
        return constrain(x, "rows", *between, None)

    def _scaled(self, x: jax.Array) -> jax.Array:
        """Embeddings as layers read them."""
        if not self.config.scale_embeddings:
            return x
        narrow = jnp.finfo(self.config.dtype)
        factor = jnp.asarray(self.config.embed_dim**0.5, self.config.dtype).astype(jnp.float32)
        # The product rounded for certain: XLA may leave out a rounding that it finds between two of its loops.
        return jax.lax.reduce_precision(x.astype(jnp.float32) * factor, narrow.nexp, narrow.nmant).astype(x.dtype)

    def rotations(self, positions: jax.Array) -> dict[RopeConfig | None, Rotation | None]:
        """Rotary angles of `positions` for each rotary embedding that layers have."""
        ropes = dict.fromkeys(kind.rope for kind in self.config.layer_kinds)

        def one(rope: RopeConfig) -> Rotation:
            of_positions = functools.partial(rotation, rope, self.config.head_dim)
            if self.config.batch_invariant:
                return invariant.numbers_by_tile(of_positions, positions)
            return of_positions(positions)

        return {rope: None if rope is None else one(rope) for rope in ropes}

    def residual(self, x: jax.Array) -> jax.Array:
        """Embeddings in the type that the residual stream has: on CPUs float32, see `run_layers`."""
        return x.astype(jnp.float32) if on_cpu() else x

    def run_layers(
        self,
        params: Params,
        x: jax.Array,
        positions: jax.Array,
        make_attention: Callable[[int | None], Attend],
        *,
        collect: bool = False,
        experts: jax.Array | None = None,
        replay: bool = True,
        watch: bool = False,
    ) -> Read:
        """Scans the blocks over the residual stream.

        On CPUs that is float32 between products in bfloat16: XLA has no arithmetic of bfloat16 there. It converts back
        and forth around each operation, and of a stack, which a loop fills with what the backward pass needs, the whole
        stack at each layer.

        Args:
            params: all parameters.
            x: `[B, T, D]`.
            positions: `[B, T]`, each below T.
            make_attention: the layer's window → its attention.
            collect: also return the keys and values of all layers, and their experts.
            experts: `[B, T, L, k]`: those that computed the tokens elsewhere, or `None`; as of `TokenRows`.
            replay: let them compute the tokens here, too; else these are only compared.
            watch: also return what routers did.
        """
        turn = self._turns(positions, x.shape[1])

        def step(
            carry: tuple[jax.Array, RouterTokens | None], params: Params, layer: Layer
        ) -> tuple[tuple[jax.Array, RouterTokens | None], tuple[KeyValue | None, jax.Array | None]]:
            (x, watched), kind, others = carry, layer.kind, None
            if experts is not None and kind.experts:
                others = jax.lax.dynamic_index_in_dim(experts, layer.index, axis=2, keepdims=False)
            attention, chosen = make_attention(kind.window), others if replay else None
            x, memory, routed = self._layer(params, kind, x, turn[kind.rope], attention, collect, chosen)
            if watched is not None and routed is not None:
                one = router_tokens(routed.logits, routed.experts, others)
                watched = jax.tree.map(lambda so_far, new: so_far + new / self._routers, watched, one)
            return (x, watched), (memory, self.told_experts(routed, x.shape[:-1]) if collect else None)

        wrap, given, x = functools.partial(rematerialised, self.config.remat), x.dtype, self.residual(x)
        carry = x, self._nothing_watched(x.shape[:-1]) if watch else None
        in_loops = self.config.scan_layers
        (x, watched), (memory, told) = self.stack.scan(step, carry, params["layers"], wrap, in_loops=in_loops)
        return Read(x.astype(given), jax.tree.map(lambda x: x.astype(given), memory), told, watched)

    @property
    def _routers(self) -> int:
        """Layers with experts."""
        return sum(kind.experts for kind in self.config.kinds)

    def _nothing_watched(self, shape: tuple[int, ...]) -> RouterTokens | None:
        if self.config.experts is None:
            return None
        of_token, of_expert = jnp.zeros(shape), jnp.zeros((*shape, self.config.experts.count))
        return RouterTokens(of_expert, of_expert, of_token, of_token, of_token)

    def told_experts(self, routed: Routed | None, shape: tuple[int, ...]) -> jax.Array | None:
        """A layer's experts of tokens of some shape as they are written down, `[..., k]`; `None`: no layer has some."""
        if self.config.experts is None:
            return None
        if routed is None:
            return jnp.full((*shape, self.config.experts.per_token), -1, jnp.int16)
        return routed.experts.astype(jnp.int16)

    def _turns(self, positions: jax.Array, length: int) -> dict[RopeConfig | None, Rotation | None]:
        """`rotations` of positions below `length`."""
        # A table, since XLA's CPU compiler takes sines into the loops of every layer, and then does not vectorise them.
        table = self.rotations(jnp.arange(length))
        turns = jax.tree.map(lambda angles: jnp.take(angles, positions, axis=0, mode="clip"), list(table.values()))
        return dict(zip(table, turns, strict=True))

    def _layer(
        self,
        params: Params,
        kind: LayerKind,
        x: jax.Array,
        turn: Rotation | None,
        attention: Attend,
        collect: bool,
        chosen: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValue | None, Routed | None]:
        x, projected, routed = self.block(params, kind)(x, turn, attention, chosen)
        x = constrain(x, "rows", "time", None)
        return x, KeyValue.of(*projected) if collect else None, routed

    def _run_alike(self, params: Params, rows: TokenRows, visible: Visibility, *, collect: bool) -> Read:
        """`run_layers` with numbers that do not depend on the rows, and the gradient that `plain` has at them."""

        def of_kind(kind: LayerKind) -> Callable[..., tuple[jax.Array, KeyValue | None]]:
            attend = {"window": kind.window, "softcap": self.config.attention_softcap}

            def on_device(
                params: Params, x: jax.Array, depth: jax.Array, visible: Visibility
            ) -> tuple[jax.Array, KeyValue | None]:
                turn = self._turns(depth, x.shape[1])[kind.rope]
                attention = functools.partial(invariant.attend_rows, visible=visible, **attend)
                return self._layer(params, kind, x, turn, attention, collect)[:2]

            def exact(trained: Any, depth: jax.Array, visible: Visibility) -> tuple[jax.Array, KeyValue | None]:
                params, x = trained
                return invariant.of_rows(on_device, self._in_compute_type(params), x, depth, visible)

            def plain(trained: Any, depth: jax.Array, visible: Visibility) -> tuple[jax.Array, KeyValue | None]:
                params, x = trained
                turn = self.plain._turns(depth, x.shape[1])[kind.rope]
                usual = functools.partial(attention, visible=visible, shared=rows.shared, **attend)
                return self.plain._layer(params, kind, x, turn, usual, collect)[:2]

            return invariant.with_plain_backward(exact, plain)

        def step(x: jax.Array, params: Params, layer: Layer) -> tuple[jax.Array, KeyValue | None]:
            return of_kind(layer.kind)((params, x), rows.depth, visible)

        x = self.embed(params, rows.tokens)
        made, memory = self.stack.scan(
            step, self.residual(x), params["layers"], lambda layer, **_: layer, in_loops=self.config.scan_layers
        )
        return Read(made.astype(x.dtype), memory)

    def _in_compute_type(self, params: Params) -> Params:
        """Parameters as products read them; scales of norms in float32."""

        def one(path: Any, leaf: jax.Array) -> jax.Array:
            return leaf.astype(jnp.float32 if path[-1].key == "scale" else self.config.dtype)

        return jax.tree_util.tree_map_with_path(one, params)

    # ---------------------------------------------------------------- forward passes

    def read(
        self, params: Params, rows: TokenRows, *, collect: bool = False, replay: bool = True, watch: bool = False
    ) -> Read:
        """A pass over rows, to whose states the last `norm` is yet to be applied.

        Args:
            params: parameters.
            rows: trees of tokens. The states of padding are meaningless.
            collect: as of `run_layers`.
            replay: as of `run_layers`.
            watch: as of `run_layers`.
        """
        if rows.place is None and (shards := context_shards()) > 1:
            order = dealt_order(rows.tokens.shape[1], shards)
            back = np.argsort(order)[: rows.tokens.shape[1]]
            x, memory, experts, router = self.read(
                params, rows.dealt(order), collect=collect, replay=replay, watch=watch
            )
            return Read(
                x[:, back],
                memory and KeyValue(memory.key[..., back], memory.value[..., back, :]),
                None if experts is None else experts[:, :, back],
                jax.tree.map(lambda tokens: tokens[:, back], router),
            )
        visible = Visibility.of_rows(rows.depth, rows.end, rows.place)
        if self.config.batch_invariant:
            return self._run_alike(params, rows, visible, collect=collect)

        def make_attention(window: int | None) -> Attend:
            return functools.partial(
                attention,
                visible=visible,
                window=window,
                softcap=self.config.attention_softcap,
                implementation=self.config.attention,
                shared=rows.shared,
            )

        return self.run_layers(
            *(params, self.embed(params, rows.tokens), rows.depth, make_attention),
            collect=collect,
            experts=None if self.config.experts is None else rows.experts,
            replay=replay,
            watch=watch,
        )

    def causal(self, params: Params, tokens: jax.Array, *, collect: bool = False) -> Read:
        """Plain causal pass over right-padded rows.

        Args:
            params: parameters.
            tokens: `[B, T]`.
            collect: also return the keys and values of all layers, and their experts.

        Returns:
            `Read` with normed hidden states.
        """
        read = self.read(params, TokenRows.causal(tokens), collect=collect)
        return read._replace(states=self.norm(params, read.states))

    def hidden(self, params: Params, texts: Any) -> jax.Array:
        """States that predict each completion token, each prompt computed once for its G completions.

        In every layer prompt tokens attend to the prompt; a completion's tokens attend to the prompt and,
        causally, to their own. Equal to running the G concatenated sequences, gradient included.

        Args:
            params: parameters.
            texts: a `Layout`, or any record with `prompt` `[P, Tp]`, `prompt_lengths` `[P]`, 1 to Tp, and `completion`
                `[P, G, Tc]`, both right-padded; padding content does not matter to real tokens.

        Returns:
            Normed hidden states `[…, D]` before the layout's targets. Of a record, `[P, G, Tc, D]`: entry t predicts
            completion token t; entry 0 is the prompt's last state, shared by the group.
        """
        layout = layout_of(texts)
        return self.norm(params, layout.before(self.read(params, layout.rows).states))

    def watched(self, params: Params, texts: Any, *, replay: bool = True) -> tuple[jax.Array, RouterTokens | None]:
        """`hidden`, and what routers did with the layout's targets.

        Args:
            params: parameters.
            texts: as for `hidden`; with `experts` and `prompt_experts` beside a record's tokens (see `Rollout`) these
                compute them, too.
            replay: whether they do; else they are only compared with the experts that do.

        Returns:
            Hidden states, and of each target `RouterTokens`; `None`: no layer has experts.
        """
        layout = layout_of(texts)
        read = self.read(params, layout.rows, replay=replay, watch=True)

        def at_targets(tokens: jax.Array) -> jax.Array:
            return layout.at(tokens) if tokens.ndim > 2 else layout.at(tokens[..., None])[..., 0]

        return self.norm(params, layout.before(read.states)), jax.tree.map(at_targets, read.router)

    def states(self, params: Params, texts: Any) -> jax.Array:
        """States at the completions' own tokens: what heads read that judge a text and not what comes next.

        Arguments as for `hidden`, which has the same states one place later.

        Returns:
            Normed hidden states `[…, D]` at the layout's targets. Of a record, `[P, G, Tc, D]`: entry t has read
            completion token t.
        """
        layout = layout_of(texts)
        return self.norm(params, layout.at(self.read(params, layout.rows).states))

    # ---------------------------------------------------------------- head

    def head(self, params: Params) -> jax.Array:
        """Weight of the LM head, `[V, D]` (the embedding when tied)."""
        return params["embed" if self.config.tie_embeddings else "lm_head"]["weight"]

    def head_logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits `[..., V]` of normed states `[..., D]`, float32."""
        return self.project(self.head(params), hidden)

    def project(self, head: jax.Array, hidden: jax.Array) -> jax.Array:
        """`head_logits` with the weight `[V, D]` itself."""
        if self.config.batch_invariant:
            project = functools.partial(self.plain.project, head.astype(hidden.dtype))
            return invariant.numbers_by_tile(project, hidden, axes=1)
        logits = times_transposed(hidden, head.astype(hidden.dtype), dtype="float32")
        cap, known = self.config.logit_softcap, self.config.known_tokens
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        return logits if known is None else jnp.where(jnp.arange(head.shape[0]) < known, logits, IMPOSSIBLE)

    def logits(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Logits `[B, T, V]` of a plain causal pass: for checks, not for training."""
        return self.head_logits(params, self.causal(params, tokens).states)
