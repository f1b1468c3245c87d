"""Compiles attention, forward and backward, for a TPU that is not there: temporaries and time of each implementation.

    pip install -e '.[train,tpu]'
    python tpu_scripts/compile_attention.py
    python tpu_scripts/compile_attention.py --slice v6e:2x4 --head-dim 256 --softcap 50 --implementations splash

One row: a prompt and the completions that share it. Layouts of queries, keys, values and their gradients are the
compiler's choice, as in a model, where products give them. Nothing is run.

Hardware: any x86-64 Linux machine. Time: a minute; dense attention takes the most.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl_llm.cli import plain_errors
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.launch.plan.slices import slice_devices
from jaxrl_llm.models.attention import Visibility, dense_attention
from jaxrl_llm.models.kernels.blockwise import blockwise_attention
from jaxrl_llm.models.kernels.splash import splash_attention

Implementation = Literal["splash", "blockwise", "dense"]
ATTENTIONS: dict[Implementation, Callable[..., jax.Array]] = {
    "splash": splash_attention,
    "blockwise": blockwise_attention,
    "dense": dense_attention,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One layer's attention over a prompt and its completions, on one chip."""

    slice: str = "v5e:2x4"
    """Generation and chips of a slice, of which one is compiled for."""
    prompt_tokens: int = 4096
    """Tp, tokens of the prompt."""
    samples: int = 8
    """G, completions."""
    completion_tokens: int = 2048
    """Tc, tokens of each completion."""
    heads: int = 16
    """N, query heads."""
    kv_heads: int = 8
    """K, key and value heads."""
    head_dim: int = 128
    """H, entries of a head."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of queries, keys and values."""
    window: int | None = None
    """Levels that a query sees; `None`: all."""
    softcap: float | None = None
    """c in c·tanh(·/c) on the scores, or `None`."""
    implementations: tuple[Implementation, ...] = ("splash", "blockwise", "dense")
    """Which to compile."""

    @property
    def tokens(self) -> int:
        """Of the row."""
        return self.prompt_tokens + self.samples * self.completion_tokens


class Report(NamedTuple):
    """What the compiler tells."""

    temporaries: int
    """Bytes, besides inputs, output and gradients."""
    seconds: float
    """Processor time to trace, lower and compile."""


def compile_attention(plan: Plan, implementation: Implementation) -> Report:
    """Compiles output and gradients.

    Raises:
        ValueError: there is no such slice.
        ImportError: libtpu is not installed.
        jax.errors.JaxRuntimeError: the compiler refuses; RESOURCE_EXHAUSTED if the memory does not suffice.
    """
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=slice_devices(plan.slice)[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    chosen = Format(Layout.AUTO, whole)

    def run(query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, visible: Visibility) -> Any:
        def attend(*arrays: jax.Array) -> jax.Array:
            return ATTENTIONS[implementation](*arrays, visible, window=plan.window, softcap=plan.softcap)

        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(d_out)

    def array(heads: int) -> Any:
        return jax.ShapeDtypeStruct((1, plan.tokens, heads, plan.head_dim), jnp.dtype(plan.dtype))

    query, key = array(plan.heads), array(plan.kv_heads)
    places: Any = [jax.ShapeDtypeStruct((1, plan.tokens), jnp.int32)] * 5
    began = time.process_time()
    with jax.set_mesh(mesh):
        program = jax.jit(run, in_shardings=(chosen, chosen, chosen, chosen, whole), out_shardings=chosen)
        memory = program.lower(query, key, key, query, Visibility(*places)).compile().memory_analysis()
    assert memory is not None
    return Report(memory.temp_size_in_bytes, time.process_time() - began)


def main(args: list[str] | None = None) -> None:
    """Compiles and reports."""
    with plain_errors():
        plan = read_flags(Plan(), args, __doc__ or "")
        kind = slice_devices(plan.slice)[0].device_kind
    heads = f"{plan.heads} heads, {plan.kv_heads} of keys, of {plan.head_dim}"
    print(f"{kind}: {plan.tokens} tokens, {heads}, {plan.dtype}; JAX {jax.__version__}", flush=True)
    for implementation in plan.implementations:
        try:
            report = compile_attention(plan, implementation)
            told = f"temporaries {report.temporaries / 2**20:,.1f} MiB; compiled in {report.seconds:.0f} s of CPU"
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            told = f"DOES NOT FIT: {str(error).splitlines()[0]}"
        print(f"{implementation:<10} {told}", flush=True)


if __name__ == "__main__":
    main()
