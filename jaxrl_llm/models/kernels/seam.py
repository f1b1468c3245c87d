"""Which attention a forward pass uses: one signature, several implementations, chosen by platform and length."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jaxrl_llm.models.attention import SharedPrompt, Visibility, dense_attention, dense_shared_attention
from jaxrl_llm.models.config import AttentionKernel
from jaxrl_llm.models.kernels.blockwise import blockwise_attention
from jaxrl_llm.models.kernels.sharded import over_mesh
from jaxrl_llm.models.kernels.splash import splash_attention
from jaxrl_llm.sharding import platform

DENSE_TOKENS = 128
"""Longest text whose scores `auto` keeps in memory, all of them."""

_KERNELS = {
    "blockwise": blockwise_attention,
    "splash": splash_attention,
    "splash_interpret": functools.partial(splash_attention, interpret=True),
}


def choose(implementation: AttentionKernel, tokens: int) -> AttentionKernel:
    """What `auto` stands for with texts of so many tokens, on what is traced for; others stand for themselves.

    Raises:
        ValueError: a kernel for TPUs, and that is something else.
    """
    if implementation == "splash" and platform() != "tpu":
        raise ValueError(
            f"model.attention='splash' is a kernel for TPUs, and this is to run on {platform()}: choose auto, or "
            "blockwise, which is as sparing of memory; splash_interpret is the kernel as plain JAX, slowly"
        )
    if implementation != "auto":
        return implementation
    if tokens <= DENSE_TOKENS:
        return "dense"
    return "splash" if platform() == "tpu" else "blockwise"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visibility,
    *,
    sinks: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: AttentionKernel = "auto",
    shared: SharedPrompt | None = None,
) -> jax.Array:
    """softmax(q·k/√H)·v over the keys that each query sees.

    Args:
        query: As `dense_attention`; `[B, T, N, H]`.
        key: As `dense_attention`; of the same tokens, `[B, T, K, H]`.
        value: As `dense_attention`.
        visible: As `dense_attention`.
        sinks: As `dense_attention`.
        window: As `dense_attention`.
        softcap: As `dense_attention`.
        implementation: which kernel.
        shared: the shape of the rows, where it is known when the program is compiled.

    Returns:
        As `dense_attention`.

    Raises:
        ValueError: as `choose`.
    """
    longest = query.shape[1] if shared is None else shared.prompt_width + shared.width
    chosen = choose(implementation, longest)
    ways: Any = {"sinks": sinks, "window": window, "softcap": softcap}
    if chosen != "dense":
        return over_mesh(_KERNELS[chosen], query, key, value, visible, **ways)
    if shared is not None:
        return dense_shared_attention(query, key, value, visible, shared, **ways)
    return dense_attention(query, key, value, visible, **ways)
