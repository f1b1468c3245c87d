"""What the accelerator can do, what the compiled programs take of it, and what they compute."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measure import Shape, Work

from jaxrl_llm.launch.plan.work import forward
from jaxrl_llm.models.config import DType, ModelConfig

_SMALLEST, _LARGEST = 512, 16_384


def matmul_peak(mesh: Mesh, dtype: DType, *, seconds: float = 0.3, repeats: int = 3) -> dict[str, float]:
    """The best rate of square matrix products, rows split over all devices, at JAX's default precision.

    Sizes double until one product takes longer than `seconds`.

    Returns:
        `gflops` per second, and the `size` that reached it.
    """
    best, size = {"gflops": 0.0, "size": 0}, _SMALLEST
    multiply = jax.jit(jnp.matmul)
    while size <= _LARGEST:
        rows = -(-size // mesh.size) * mesh.size
        by_rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        left = jax.device_put(jnp.full((rows, size), 0.5, dtype), by_rows)
        right = jax.device_put(jnp.full((size, size), 0.5, dtype), NamedSharding(mesh, PartitionSpec()))
        multiply(left, right).block_until_ready()
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            multiply(left, right).block_until_ready()
            taken.append(time.perf_counter() - began)
        rate = 2e-9 * rows * size**2 / min(taken)
        if rate > best["gflops"]:
            best = {"gflops": round(rate, 1), "size": size}
        if min(taken) > seconds:
            break
        size *= 2
    return best


def computed_flops(work: Work, config: ModelConfig, shape: Shape, *, reference: bool) -> int:
    """Matrix products of the shared-prompt computation: each prompt once, the head on completions only.

    Causal attention included, a backward pass twice its forward pass; what is computed again in a backward pass
    to save memory, and masked parts of attention, are not counted.
    """

    def count(unfed: int, scored: int) -> int:
        return forward(config, shape.prompt_tokens, shape.completion_lengths, unfed=unfed, scored=scored).total

    # A group's first token is drawn from one distribution; the last token is drawn and not fed.
    sampling = count(1, shape.prompts + shape.sampled_tokens - shape.prompts * shape.samples)
    learning = count(0, shape.sampled_tokens)
    update = 3 * learning + (learning if reference else 0)
    return {"W1": sampling, "W2": update, "W3": sampling + update}[work]


def temporaries_gib() -> dict[str, float]:
    """Memory that each compiled program of this process needs beside its arguments and results, on one device."""
    sizes: dict[str, float] = {}
    for program in jax.devices()[0].client.live_executables():
        name = program.hlo_modules()[0].name.removeprefix("jit_").strip("_")
        size = program.get_compiled_memory_stats().temp_size_in_bytes / 2**30
        if size > 1e-3:
            sizes[name] = round(max(size, sizes.get(name, 0.0)), 3)
    return sizes


def device_peak_gib() -> float | None:
    """The most memory that was in use on the first device; `None` where the backend does not count, as on CPUs."""
    counted = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if counted is None else round(counted / 2**30, 3)


def copy_bandwidth(gib: float, *, copies: int = 8, repeats: int = 5) -> float:
    """GB per second that the first device reads and writes: of an array of so many GiB, to which one is added."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jax.block_until_ready(add(jnp.zeros(max(1, round(gib * 2**28)), jnp.float32)))
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(copies):  # one after another, so that starting them takes no time
            array = add(array)
        array.block_until_ready()
        taken.append(time.perf_counter() - began)
    return round(2e-9 * array.nbytes * copies / min(taken), 1)
