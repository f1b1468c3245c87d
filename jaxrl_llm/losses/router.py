"""Auxiliary losses of mixtures of experts: what keeps a router from sending all tokens to a few of them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.masking import as_float, check_mask, count_true, fill_masked, masked_mean, masked_sum, safe_divide
from jaxrl_llm.records import Max, Mean, Metrics


class RouterTokens(NamedTuple):
    """What routers did with tokens, the mean over a model's layers with experts; all float32."""

    probs: Array
    """`[..., T, E]`: the softmax of the router's logits."""
    load: Array
    """`[..., T, E]`: 1 for each of the k experts that computed the token, 0 for the others."""
    z: Array
    """`[..., T]`: the squares of the log-normalizers of the softmax."""
    entropy: Array
    """`[..., T]`: of the softmax, in nats."""
    differs: Array
    """`[..., T]`: 1 where the set of the k likeliest experts is not that of another program; 0 without one."""


def router_tokens(logits: ArrayLike, experts: ArrayLike, others: ArrayLike | None = None) -> RouterTokens:
    """What one layer's router did: softmax, load, log-normalizer squared and entropy of each token.

        probs = softmax(logits)
        z = (log Σₑ exp(logitsₑ))²
        entropy = −Σₑ probsₑ log(probsₑ)

    Unlike the losses it reduces nothing: of several layers they take the mean.

    Args:
        logits: Of the router, `[..., T, E]`.
        experts: Integers `[..., T, k]`: those that computed the token.
        others: Integers `[..., T, k]`: those that computed it in another program, such as the sampler; −1: not known.

    Returns:
        `RouterTokens`; gradients flow through all but `load` and `differs`.

    Source: Fedus et al. 2021, "Switch transformers" (2101.03961); Zoph et al. 2022, "ST-MoE" (2202.08906).
    """
    logits, experts = as_float(logits), jnp.asarray(experts)
    logs = jax.nn.log_softmax(logits)
    probs = jnp.exp(logs)
    load = jnp.sum(jax.nn.one_hot(experts, logits.shape[-1], dtype=logits.dtype), axis=-2)
    differs = jnp.zeros(logits.shape[:-1], logits.dtype)
    if others is not None:
        others = jnp.asarray(others)
        likeliest = jax.lax.top_k(jax.lax.stop_gradient(logits), others.shape[-1])[1]
        same = jnp.all(jnp.sort(likeliest) == jnp.sort(others.astype(likeliest.dtype)), axis=-1)
        differs = (~same & jnp.all(others >= 0, axis=-1)).astype(logits.dtype)
    return RouterTokens(
        probs=probs,
        load=load,
        z=jax.nn.logsumexp(logits, axis=-1) ** 2,
        entropy=-jnp.sum(probs * logs, axis=-1),
        differs=differs,
    )


def load_balance_loss(
    probs: ArrayLike, load: ArrayLike, mask: ArrayLike, *, normalizer: ArrayLike | None = None
) -> Array:
    """The load-balancing loss: the share of tokens that experts get times the probability that they get them.

        E Σₑ (Σₜ loadₜₑ / n) (Σₜ probsₜₑ / n)

    It is k, its least value, where all experts get as much as any other. Over layers it is taken as `transformers`
    does, of the means of all of them. Unlike other losses it is no sum over tokens: of a batch that is computed in
    parts it is the mean of the parts' losses, each weighted by its tokens, and each part is to be balanced by itself.

    Args:
        probs: Softmax of the router's logits, `[..., T, E]`.
        load: 1 for the experts that computed the token, `[..., T, E]`.
        mask: Bool `[..., T]`, True on the tokens that count: no padding.
        normalizer: Number of tokens of the whole batch, if these are a part of it.

    Returns:
        A float32 scalar; 0 where no token counts.

    Raises:
        ValueError: On shapes that do not fit, or a mask that is not bool.

    Source: Fedus et al. 2021, "Switch transformers" (2101.03961), equations 4 to 6; for k > 1 as in Mixtral.
    """
    probs, load = as_float(probs), jax.lax.stop_gradient(as_float(load))
    mask = check_mask(mask, probs=probs[..., 0], load=load[..., 0])
    whole = jnp.broadcast_to(mask[..., None], probs.shape)
    tokens, axes = count_true(mask), tuple(range(mask.ndim))
    loads = safe_divide(masked_sum(load, whole, axes), tokens)
    shares = safe_divide(masked_sum(probs, whole, axes), tokens if normalizer is None else normalizer)
    return probs.shape[-1] * jnp.sum(loads * shares)


def router_loss(
    tokens: RouterTokens,
    mask: ArrayLike,
    *,
    balance_coef: float = 0.0,
    z_coef: float = 0.0,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """What is added to the loss of a mixture of experts: load balance, and the z-loss of its routers.

        balance_coef load_balance_loss + z_coef Σₜ zₜ / n

    The z-loss, the mean of the squared log-normalizers, keeps the router's logits small, and with them the error that
    rounding makes. Unlike `load_balance_loss` it returns metrics, too.

    Args:
        tokens: As of `router_tokens`, the mean over layers.
        mask: Bool `[..., T]`, True on the tokens that count: no padding.
        balance_coef: Weight of the load-balancing loss; 0.001 to 0.01 in pre-training.
        z_coef: Weight of the z-loss; 0.001 in ST-MoE.
        normalizer: Number of tokens of the whole batch, if these are a part of it.

    Returns:
        The loss, a float32 scalar, and the metrics `router/balance_loss` and `router/z_loss`, both without weights,
        `router/entropy`, and `router/max_load`: how many times an even share the expert with most tokens gets.

    Raises:
        ValueError: On shapes that do not fit, or a mask that is not bool.

    Source: z-loss: Zoph et al. 2022, "ST-MoE" (2202.08906), equation 5.
    """
    mask = check_mask(mask, z=tokens.z, entropy=tokens.entropy)
    count = count_true(mask)
    balance = load_balance_loss(tokens.probs, tokens.load, mask, normalizer=normalizer)
    z = safe_divide(masked_sum(tokens.z, mask), count if normalizer is None else normalizer)
    own = jax.lax.stop_gradient(load_balance_loss(tokens.probs, tokens.load, mask))
    whole, axes = jnp.broadcast_to(mask[..., None], tokens.load.shape), tuple(range(mask.ndim))
    loads = masked_mean(jax.lax.stop_gradient(tokens.load), whole, axes)
    even = jnp.maximum(jnp.mean(loads), jnp.finfo(loads.dtype).tiny)
    metrics: Metrics = {
        "router/balance_loss": Mean(own * count, count),
        "router/z_loss": Mean.of(jax.lax.stop_gradient(fill_masked(tokens.z, mask)), mask),
        "router/entropy": Mean.of(jax.lax.stop_gradient(fill_masked(tokens.entropy, mask)), mask),
        "router/max_load": Max(jnp.max(loads) / even),
    }
    return balance_coef * balance + z_coef * z, metrics
