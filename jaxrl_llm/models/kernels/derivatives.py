"""Derivatives of attention of which a kernel gives the output and the gradient, so that these can be differentiated.

A kernel, or a loop of unknown length, has no rule for going backwards, so that JAX is told the derivatives: the pull
Jᵀ g, its transpose (the push J v), and the derivative of the pull, H w, where H, being the Hessian of ⟨g, out⟩, is its
own transpose. Push and H w are those of plain operations, differentiated forwards by JAX. `linear_call` joins what are
each other's transposes; it transposes in all of its arguments or none, and hence is given one array of all tangents.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import linear_call
from jax.flatten_util import ravel_pytree

from jaxrl_llm.models.attention import ATTENTION, Visibility


class Inputs(NamedTuple):
    """What attention is differentiated in."""

    query: jax.Array
    """`[B, Tq, N, H]`."""
    key: jax.Array
    """`[B, Tk, K, H]`."""
    value: jax.Array
    """`[B, Tk, K, H]`."""
    sinks: jax.Array | None = None
    """`[N]` float32: a score of each head beside those of the keys, whose value is 0; `None`: there is none."""


class Output(NamedTuple):
    """What attention gives, and what its gradient needs beside the inputs."""

    mixed: jax.Array
    """`[B, Tq, N, H]`."""
    normalizer: jax.Array
    """Float32 of each query and head, laid out as the method wants it: log Σ exp s, sinks included."""


class Method(Protocol):
    """A way to compute attention; static, that is hashable."""

    def forward(self, inputs: Inputs, visible: Visibility) -> Output:
        """Attention."""
        ...

    def pull(self, inputs: Inputs, visible: Visibility, output: Output, cotangent: jax.Array) -> Inputs:
        """Jᵀ g of the mixed values, g = `cotangent`; `output` is that of `forward`."""
        ...

    def plain(self) -> Method:
        """The same function of operations that JAX differentiates forwards."""
        ...


_Saved = tuple[Inputs, Visibility, Output]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(method: Method, inputs: Inputs, visible: Visibility) -> Output:
    """Attention, whose mixed values can be differentiated twice, backwards; the normalizer passes no gradient on.

    Output and normalizer bear the name `ATTENTION` for policies of `jax.checkpoint`.
    """
    return method.forward(inputs, visible)


def _attend_forward(method: Method, inputs: Inputs, visible: Visibility) -> tuple[Output, _Saved]:
    # Itself, so that the gradient can be differentiated. Where `visible` is the same for all steps of a scan, JAX would
    # take it out of the call and then mistake its residuals for others, were it not tied to the inputs.
    inputs, visible = jax.lax.optimization_barrier((inputs, visible))
    output: Output = attend(method, inputs, visible)
    output = Output(checkpoint_name(output.mixed, ATTENTION), checkpoint_name(output.normalizer, ATTENTION))
    return output, (inputs, visible, output)


def _attend_backward(method: Method, saved: _Saved, cotangent: Output) -> tuple[Inputs, None]:
    return _pull(method, *saved, cotangent.mixed), None


attend.defvjp(_attend_forward, _attend_backward)


def _push(method: Method, saved: _Saved, tangent: Inputs) -> jax.Array:
    """J v of the mixed values."""
    inputs, visible, _ = saved
    return jax.jvp(lambda inputs: method.plain().forward(inputs, visible).mixed, (inputs,), (tangent,))[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pull(method: Method, inputs: Inputs, visible: Visibility, output: Output, cotangent: jax.Array) -> Inputs:
    """Jᵀ g as a function that can be transposed in g, and differentiated in inputs and g."""

    def pull(saved: _Saved, cotangent: jax.Array) -> Inputs:
        return method.pull(*saved, cotangent)

    def push(saved: _Saved, tangent: Inputs) -> jax.Array:
        return _push(method, saved, tangent)

    return linear_call(pull, push, (inputs, visible, output), cotangent)


@_pull.defjvp
def _differentiate_pull(method: Method, primals: tuple, tangents: tuple) -> tuple[Inputs, Inputs]:
    flat, unflatten = ravel_pytree((tangents[0], tangents[3]))  # the output is a function of the inputs
    *saved, cotangent = primals

    def curved(saved: _Saved, cotangent: jax.Array, tangent: Inputs) -> Inputs:
        """H w."""
        plain = method.plain()

        def pull(inputs: Inputs) -> Inputs:
            return plain.pull(inputs, saved[1], plain.forward(inputs, saved[1]), cotangent)

        return jax.jvp(pull, (saved[0],), (tangent,))[1]

    def push(at: tuple[_Saved, jax.Array], flat: jax.Array) -> Inputs:
        (saved, cotangent), (along_inputs, along_cotangent) = at, unflatten(flat)
        return jax.tree.map(jnp.add, curved(saved, cotangent, along_inputs), method.pull(*saved, along_cotangent))

    def pull(at: tuple[_Saved, jax.Array], tangent: Inputs) -> jax.Array:
        return ravel_pytree((curved(*at, tangent), _push(method, at[0], tangent)))[0]

    return _pull(method, *primals), linear_call(push, pull, (tuple(saved), cotangent), flat)
