"""The divergence of a language model from its former self, and products with its Fisher matrix, in bounded memory.

Both are over whole next-token distributions, Σ over tokens of weight × KL(old ‖ new), and are made from hidden states:
of some rows, the logits of some positions exist at a time. What is held is the activations of the rows, as their
gradient needs them, and logits `[rows, positions, V]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.algorithms.trust_region.fisher import (
    gauss_newton_vector_product,
    hessian_vector_product,
    sampled_fisher_vector_product,
)
from jaxrl_llm.logprobs import scores_from_logits
from jaxrl_llm.losses.kl import kl_exact
from jaxrl_llm.masking import as_float
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.rows import Layout, layout_of
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import context_shards, token_shards

FisherKind = Literal["gauss_newton", "hessian", "sampled"]
"""See `jaxrl_llm.algorithms.trust_region.fisher`."""

CHUNK_LOGITS = 2**24
"""Logits of one chunk of positions on one device: 64 MiB in float32."""


class DivergenceRows(NamedTuple):
    """Rows whose distributions are compared."""

    prompt: jax.Array
    """`[P, Tp]`."""
    prompt_lengths: jax.Array
    """`[P]`."""
    completion: jax.Array
    """`[P, G, Tc]`."""
    mask: jax.Array
    """`[P, G, Tc]` bool: the tokens that count."""
    weights: jax.Array
    """`[P, G, Tc]` float32: what each of them counts."""
    old_hidden: jax.Array | None = None
    """`[P, G, Tc, D]`: states of the old policy, in the model's compute type; only the divergence reads them."""


class PolicyDivergence:
    """KL(old ‖ new) of some rows, and Fisher-vector products, as functions of a tree of parameters.

    Args:
        policy: the model.
        temperature: the one that was sampled with; it divides the logits.
        join: from the tree that is differentiated (float32) to all parameters, with the values that are stored.
        chunk_size: positions whose logits exist at a time; `None` chooses by `CHUNK_LOGITS`.
    """

    def __init__(
        self,
        policy: Transformer,
        join: Callable[[Any], Params],
        *,
        temperature: float = 1.0,
        chunk_size: int | None = None,
    ):
        self.policy, self.join, self.temperature, self.chunk_size = policy, join, temperature, chunk_size

    def kl(self, part: Any, old_head: jax.Array, rows: DivergenceRows, texts: Any) -> jax.Array:
        """Σ weight × KL(old ‖ new), a scalar; differentiable in `part`, also twice.

        Args:
            part: the tree that is differentiated.
            old_head: the head that the old policy's states are read with.
            rows: some rows.
            texts: theirs; see `layout_of`.
        """
        layout = layout_of(texts)
        hidden, head = self._states(part, layout)

        def divergence(states: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            state, old_state, weights = states
            old = self._logits(old_state, old_head)
            kl = kl_exact(self._logits(state, head), old, direction="forward")
            return jnp.sum(jnp.where(weights > 0, weights * kl, 0.0)), None

        assert rows.old_hidden is not None
        old_hidden, weights = layout.pack((rows.old_hidden, _counted(rows)))
        return self._over_time(divergence, (hidden, old_hidden, weights))[0]

    def product(
        self, kind: FisherKind, part: Any, vector: Any, old_head: jax.Array, rows: DivergenceRows, texts: Any
    ) -> Any:
        """Σ weight × F v of some rows, in the structure of `part`; float32.

        The model's own derivative is taken backwards alone: J v is the transpose of the function v ↦ Jᵀ v, since its
        products have no rule for going forwards.
        """
        if kind == "hessian":
            return hessian_vector_product(lambda wide: self.kl(wide, old_head, rows, texts), part, vector)
        layout = layout_of(texts)
        outputs, pull = jax.vjp(lambda wide: self._states(wide, layout), part)
        hidden, head = outputs
        ((to_hidden, to_head),) = jax.linear_transpose(lambda cotangent: pull(cotangent)[0], outputs)(vector)

        def curved(states: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            state, tangent, tokens, weights = states
            at, along, mask = (state, head), (as_float(tangent), to_head), weights > 0
            if kind == "gauss_newton":
                product = gauss_newton_vector_product(lambda u: self._logits(*u), at, along, mask, weights=weights)
            else:
                product = sampled_fisher_vector_product(
                    lambda u: scores_from_logits(self._logits(*u), tokens).logprobs, at, along, mask, weights=weights
                )
            return product[1], product[0]

        weights = layout.pack(_counted(rows))
        of_head, of_hidden = self._over_time(curved, (hidden, to_hidden, layout.targets, weights))
        return pull((of_hidden.astype(hidden.dtype), of_head))[0]

    def _states(self, part: Any, layout: Layout) -> tuple[jax.Array, jax.Array]:
        """States `[…, D]` before the targets, and the head `[V, D]` in float32, in which its gradient is summed."""
        params = self.join(part)
        hidden = self.policy.hidden(params, layout)
        return hidden, as_float(self.policy.head(params))

    def _logits(self, hidden: jax.Array, head: jax.Array) -> jax.Array:
        """Logits `[..., V]` at the temperature."""
        return self.policy.project(head, hidden) / self.temperature

    def _over_time(
        self, function: Callable[[tuple[jax.Array, ...]], tuple[jax.Array, Any]], arrays: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, Any]:
        """Sums the first result of `function` over chunks of positions of `[…, T, …]`, and joins the second one's.

        What a chunk makes is made again for its gradient. Time is cut and not rows: those are what is spread over
        devices; where time is, too, each chunk has as many positions of every device. Weights, the last of the arrays,
        are 0 at what fills chunks up.
        """
        axis = arrays[-1].ndim - 1
        width = arrays[-1].shape[axis]
        size = self.chunk_size or max(1, CHUNK_LOGITS * token_shards() // self._logits_of_a_position(arrays[-1]))
        size += -size % context_shards()
        if size >= width:
            return function(arrays)
        chunks = -(-width // size)

        def cut(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, (*((0, 0),) * axis, (0, chunks * size - width), *((0, 0),) * (x.ndim - axis - 1)))
            return jnp.moveaxis(x.reshape(*x.shape[:axis], size, chunks, *x.shape[axis + 1 :]), axis + 1, 0)

        again = jax.checkpoint(function)
        parts = tuple(cut(x) for x in arrays)
        shape = jax.eval_shape(lambda: again(tuple(x[0] for x in parts))[0])

        def step(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
            summand, piece = again(part)
            return total + summand, piece

        total, pieces = jax.lax.scan(step, jnp.zeros(shape.shape, shape.dtype), parts)
        joined = jax.tree.map(
            lambda x: jax.lax.slice_in_dim(
                jnp.moveaxis(x, 0, axis + 1).reshape(*x.shape[1 : axis + 1], -1, *x.shape[axis + 2 :]),
                0,
                width,
                axis=axis,
            ),
            pieces,
        )
        return total, joined

    def _logits_of_a_position(self, weights: jax.Array) -> int:
        return max(1, math.prod(weights.shape[:-1])) * self.policy.config.vocab_size


def _counted(rows: DivergenceRows) -> jax.Array:
    return jnp.where(rows.mask, rows.weights, 0.0)
