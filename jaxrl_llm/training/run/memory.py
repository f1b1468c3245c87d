"""Memory: what surely does not fit is refused before it is allocated; what runs out of it says where."""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import HOST, row_shards, sampling_mesh
from jaxrl_llm.training.run.errors import RunError

ROWS = "training.prompts_per_step, training.samples_per_prompt, sampling.max_tokens or data.max_prompt_length"
_PIECES = "raise update.micro_batches, or lower update.tokens_per_micro_batch where it is set"
_LOWERS = {
    "sample": f"lower {ROWS}, or set sampling.slots",
    "update": f"{_PIECES}; raise mesh.fsdp or mesh.context, set model.remat=full or offload, set optimizer.offload, "
    f"or lower {ROWS}",
    "iteration": f"{_PIECES}; set sampling.slots, or lower {ROWS}",
    "evaluate": "lower evaluation.batch_size or evaluation.samples",
    "reference": f"lower evaluation.batch_size; {_PIECES}",
    "generate": "lower star.problems_per_batch or star.samples",
    "rationalize": "lower star.problems_per_batch or star.samples",
    "train": f"{_PIECES}; or lower star.rows_per_step",
}
_LEAST = "raise mesh.fsdp, take a smaller model, or lower training.*_per_step and the lengths in data and sampling"


class OutOfMemoryError(RunError):
    """A device or the host had no memory left."""

    status = 1


@contextlib.contextmanager
def naming_phase(phase: str) -> Iterator[None]:
    """Turns what JAX and NumPy raise for want of memory into `OutOfMemoryError`, which names phase and settings."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        text = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", text):
            raise
        raise OutOfMemoryError(
            f"out of memory in the phase {phase!r}: {_LOWERS.get(phase, _LEAST)} ({text or 'MemoryError'!s:.160})"
        ) from error


def bytes_of(tree: Any) -> int:
    """Bytes of a tree's arrays, abstract or not, each counted once; what lies in the host's memory is left out."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if not _is_far(leaf))


def _is_far(leaf: Any) -> bool:
    return getattr(getattr(leaf, "sharding", None), "memory_kind", None) == HOST


def check_memory(mesh: jax.sharding.Mesh, needs: Mapping[str, int], settings: str) -> None:
    """Checks that what is needed at the same time could fit, were it split evenly over all devices.

    What is left out (activations, copies, the compiler's buffers) may still not fit.

    Args:
        mesh: the devices.
        needs: bytes by what they are for, over all devices.
        settings: what to change where they do not fit.

    Raises:
        ValueError: they surely cannot; names each part.
    """
    limit = device_memory(mesh)
    each = sum(needs.values()) / mesh.size
    if limit is None or each <= limit:
        return
    parts = ", ".join(f"{what} {_readable(size)}" for what, size in sorted(needs.items(), key=lambda item: -item[1]))
    raise ValueError(
        f"at least {_readable(each)} are needed on each of {mesh.size} device(s), which have {_readable(limit)} "
        f"({parts}, over all devices): lower {settings}"
    )


def rollout_bytes(
    config: ModelConfig,
    sampling: SamplingConfig,
    mesh: jax.sharding.Mesh,
    *,
    prompts: int,
    group: int,
    max_prompt_length: int,
    kept: int = 0,
) -> dict[str, int]:
    """What sampling surely needs: keys and values of all tokens in flight, and the rollout itself.

    Args:
        config: of the model.
        sampling: longest completion, and slots.
        mesh: the learner's devices.
        prompts: P.
        group: G.
        max_prompt_length: Tp.
        kept: ids that are written down of what each token was drawn from, on every device.
    """
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    in_flight = prompts * group
    if sampling.slots is not None:
        in_flight = min(in_flight, sampling.slots * row_shards(sampling_mesh(mesh, sampling.tensor)))
    cached = min(prompts, in_flight) * max_prompt_length + in_flight * sampling.max_tokens
    mask = {"the sampling mask": 4 * mesh.size * kept * prompts * group * sampling.max_tokens} if kept else {}
    return mask | {
        "keys and values of sampling": cached * token,
        "a step's tokens and log-probs": 4 * prompts * (max_prompt_length + 3 * group * sampling.max_tokens),
    }


def device_memory(mesh: jax.sharding.Mesh) -> float | None:
    """Bytes that one of the mesh's devices can hold, or `None` where it does not say; CPUs share the host's."""
    local = mesh.local_devices
    if local[0].platform == "cpu":
        host = host_memory()
        return None if host is None else host / len(local)
    stats = local[0].memory_stats() or {}
    return stats.get("bytes_limit")


def host_memory() -> int | None:
    """Bytes that this process can have: of the machine with its swap, of its control group, of its own limit."""
    limits = [resource.getrlimit(resource.RLIMIT_AS)[0]]
    with contextlib.suppress(OSError, ValueError):
        swap = re.search(r"SwapTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + 1024 * int(swap[1] if swap else 0))
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min((limit for limit in limits if limit > 0), default=None)


def _readable(size: float) -> str:
    power = min(max(int(math.log10(max(size, 1)) // 3), 0), 6)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"
