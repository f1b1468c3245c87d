"""How parameters that are stored in bfloat16 keep what small updates add up to.

bfloat16 has eight bits of precision. An update of less than a 2⁻⁹th of a parameter is lost if the sum is rounded to the
nearest, and at the learning rates of this field that is nearly every one: of AdamW at 1e-6, all for parameters above
0.0005. A float32 copy in the optimizer's state keeps them; rounding at random keeps them on average.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.models.config import Params

Rounding = Literal["master", "stochastic", "nearest"]
"""What updates are added to, and how the sum becomes a stored parameter; see `OptimizerConfig.rounding`."""


class MasterCopy(NamedTuple):
    """The state of an optimizer beside a float32 copy of what it trains; what is stored is that copy, rounded."""

    master: Params
    optimizer: optax.OptState


class RandomRounding(NamedTuple):
    """The state of an optimizer beside the key of the noise that decides which way parameters are rounded."""

    key: jax.Array
    """uint32 key data; another one after each step."""
    optimizer: optax.OptState


def optimizer_state(params: Params, optimizer: optax.GradientTransformation, rounding: Rounding, key: jax.Array) -> Any:
    """The state of an optimizer before the first step.

    Args:
        params: what is trained. Where all of it is float32, nothing is rounded, and the state is the optimizer's own.
        optimizer: its moments are float32.
        rounding: the choice.
        key: of the noise.

    Raises:
        ValueError: parameters of a type that cannot be rounded at random.
    """
    wide = widen(params)
    state = optimizer.init(wide)
    narrow = {leaf.dtype.name for leaf in jax.tree.leaves(params)} - {"float32"}
    if not narrow or rounding == "nearest":
        return state
    if rounding == "master":
        return MasterCopy(jax.tree.map(functools.partial(jnp.array, copy=True), wide), state)  # both may be donated
    if narrow != {"bfloat16"}:
        raise ValueError(f"parameters of type {sorted(narrow)} cannot be rounded at random: pass 'master'")
    return RandomRounding(jax.random.key_data(key), state)


def unrounded(params: Params, state: Any) -> tuple[Params, optax.OptState]:
    """What an update is to be added to, float32, and the optimizer's own part of its state."""
    match state:
        case MasterCopy(master, optimizer):
            return master, optimizer
        case RandomRounding(_, optimizer):
            return widen(params), optimizer
        case _:
            return widen(params), state


def rounded(moved: Any, optimizer: optax.OptState, params: Params, state: Any) -> tuple[Params, Any]:
    """Parameters in their stored types after a step, and the state with what is kept beside them.

    Args:
        moved: parameters after the step, float32.
        optimizer: the optimizer's own part of the state after it.
        params: parameters before it, for their types.
        state: the whole state before it.
    """
    match state:
        case MasterCopy():
            return _nearest(moved, params), MasterCopy(moved, optimizer)
        case RandomRounding(data, _):
            key, own = jax.random.split(jax.random.wrap_key_data(data))

            def one(path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
                # By its name, so that it is the same whichever other parameters are moved along.
                number = zlib.crc32(jax.tree_util.keystr(path).encode())
                return new if new.dtype == old.dtype else _at_random(new, jax.random.fold_in(own, number))

            stored = jax.tree_util.tree_map_with_path(one, moved, params)
            return stored, RandomRounding(jax.random.key_data(key), optimizer)
        case _:
            return _nearest(moved, params), optimizer


def widen(tree: Any) -> Any:
    """Float32 copies of parameters or gradients that are stored in less; the rest as it is."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def as_stored(x: jax.Array, dtype: Any) -> jax.Array:
    """The float32 value that `x` has once it is stored; its derivative is that of `x` itself, in float32."""
    if jnp.dtype(dtype) == x.dtype:
        return x
    kind = jnp.finfo(dtype)  # XLA may leave out a cast there and back
    return jax.lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)


as_stored.defvjp(lambda x, dtype: (as_stored(x, dtype), None), lambda dtype, _, gradient: (gradient,))


def _nearest(moved: Params, params: Params) -> Params:
    return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, params)


def _at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """`x`, float32, as bfloat16: one of its two neighbours, the nearer the likelier, so that the mean is `x`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16)
    upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))
