"""Heads that give numbers in place of tokens: critics, reward models, process reward models.

A `ScoreModel` is a transformer with a linear head beside (or in place of) its LM head. Where the head is read is all
that tells the three kinds apart.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_llm.losses.reward import last_token_score
from jaxrl_llm.models.config import ModelConfig, Params
from jaxrl_llm.models.rows import layout_of
from jaxrl_llm.models.tensor_heads import kv_heads_on
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import parameter_shardings

SCORE_HEAD, LM_HEAD = "score_head", "lm_head"


@dataclasses.dataclass(frozen=True)
class ScoreModel:
    """A transformer with a linear head, without its parameters: hashable, static under `jit`; every method is pure.

    Its parameters are the transformer's with `score_head` beside them, so that the same tree is valid for the
    transformer, too.

    >>> model = ScoreModel(transformer)
    >>> params = model.from_trunk(policy_params, jax.random.key(0))
    >>> scores = model.scores(params, rows, rows.mask)  # [P, G]
    """

    transformer: Transformer
    outputs: int = 1
    """C: 1 for a critic, a reward model or the logit of a correct step; 2 or 3 for classes of steps."""
    bias: bool = False
    """Whether the head adds a constant. Comparisons of two answers cannot teach it, and `transformers` has none in
    reward models but one in classifiers of tokens."""
    lm_head: bool = False
    """Whether a LM head that is not the embedding stays among the parameters: for a critic that shares the policy's
    trunk. Elsewhere it would be trained for nothing."""

    def __post_init__(self) -> None:
        """Rejects a head without outputs."""
        if self.outputs < 1:
            raise ValueError(f"outputs={self.outputs} must be at least 1")

    @property
    def config(self) -> ModelConfig:
        """The transformer's configuration."""
        return self.transformer.config

    # ---------------------------------------------------------------- parameters

    def init(self, key: jax.Array) -> Params:
        """Random parameters: the transformer's, and a head N(0, 1/(D + 1))."""
        trunk_key, head_key = jax.random.split(key)
        return self.from_trunk(self.transformer.init(trunk_key), head_key)

    def from_trunk(self, params: Params, key: jax.Array | None = None) -> Params:
        """The parameters of a transformer (the same arrays) with a new head.

        Args:
            params: the transformer's; a head among them is replaced.
            key: of the head's weights N(0, 1/(D + 1)) (Stiennon et al. 2020). `None`: zeros, of which every score is
                0 at first, and the trunk has no gradient in the first step.
        """
        width, dtype = self.config.embed_dim, jnp.dtype(self.config.param_dtype)
        weight = jnp.zeros((self.outputs, width), dtype)
        if key is not None:
            weight = (jax.random.normal(key, weight.shape) / jnp.sqrt(width + 1.0)).astype(dtype)
        head = {"weight": weight} | ({"bias": jnp.zeros((self.outputs,), dtype)} if self.bias else {})
        return {**self._trunk(params), SCORE_HEAD: head}

    def abstract_params(self) -> Params:
        """Shapes and types of the parameters."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def logical_axes(self) -> Params:
        """Logical axis names of each parameter: the tree of `init` with tuples as leaves."""
        head = {"weight": (None, "embed")} | ({"bias": (None,)} if self.bias else {})
        return {**self._trunk(self.transformer.logical_axes()), SCORE_HEAD: head}

    def shardings(self, mesh: Mesh) -> Params:
        """Where each parameter lies on a mesh; errors as in `Transformer.shardings`."""
        kv_heads_on(self.config, mesh)
        return parameter_shardings(mesh, self.logical_axes(), self.abstract_params())

    def _trunk(self, params: Params) -> Params:
        left_out = {SCORE_HEAD} if self.lm_head else {SCORE_HEAD, LM_HEAD}
        return {name: value for name, value in params.items() if name not in left_out}

    # ---------------------------------------------------------------- forward passes

    def head(self, params: Params, states: jax.Array) -> jax.Array:
        """What the head makes of normed states `[..., D]`: `[..., C]`, computed in float32."""
        weight = params[SCORE_HEAD]["weight"].astype(jnp.float32)
        out = jnp.einsum("...d,cd->...c", states.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
        return out + params[SCORE_HEAD]["bias"].astype(jnp.float32) if self.bias else out

    def values(self, params: Params, texts: Any) -> jax.Array:
        """A critic's Vₜ: what is expected before completion token t is written, from the state that predicts it.

        Arguments as for `Transformer.hidden`.

        Returns:
            `[P, G, Tc]`, float32.

        Raises:
            ValueError: the head has more than one output.
        """
        layout = layout_of(texts)
        return layout.unpack(one_output(self.head(params, self.transformer.hidden(params, layout))))

    def values_around(self, params: Params, texts: Any) -> tuple[jax.Array, jax.Array]:
        """`values`, and those of the states after completion token t was written, in one pass.

        Arguments as for `Transformer.hidden`.

        Returns:
            `[P, G, Tc]` each, float32.

        Raises:
            ValueError: the head has more than one output.
        """
        layout = layout_of(texts)
        states = self.transformer.norm(params, self.transformer.read(params, layout.rows).states)
        values = one_output(self.head(params, states))[..., None]
        before, after = layout.unpack((layout.before(values), layout.at(values)))
        return before[..., 0], after[..., 0]

    def token_scores(self, params: Params, texts: Any) -> jax.Array:
        """The head at every completion token, after it was read: the logits of a process reward model.

        Arguments as for `Transformer.hidden`.

        Returns:
            `[P, G, Tc, C]`, float32.
        """
        layout = layout_of(texts)
        return layout.unpack(self.head(params, self.transformer.states(params, layout)))

    def scores(self, params: Params, texts: Any, mask: jax.Array) -> jax.Array:
        """A reward model's score of each completion: the head at its last token.

        Args:
            params: parameters.
            texts: as for `Transformer.hidden`.
            mask: `[P, G, Tc]` bool, True on real tokens: they, and not padding ids, say which is the last one.

        Returns:
            `[P, G]`, float32; 0 for a completion without tokens.

        Raises:
            ValueError: the head has more than one output.
        """
        return last_token_score(one_output(self.token_scores(params, texts)), mask)


def one_output(outputs: jax.Array) -> jax.Array:
    """`[…, 1]` → `[…]`.

    Raises:
        ValueError: there are more.
    """
    if outputs.shape[-1] != 1:
        raise ValueError(f"a head of {outputs.shape[-1]} outputs gives no single number: make it with outputs=1")
    return outputs[..., 0]
