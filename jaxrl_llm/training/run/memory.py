"""Memory: what surely does not fit is refused before it is allocated; what runs out of it says where."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxrl_llm.device_memory import device_memory, readable
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sharding import HOST
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
    parts = ", ".join(f"{what} {readable(size)}" for what, size in sorted(needs.items(), key=lambda item: -item[1]))
    raise ValueError(
        f"at least {readable(each)} are needed on each of {mesh.size} device(s), which have {readable(limit)} "
        f"({parts}, over all devices): lower {settings}"
    )


def rollout_bytes(sampler: Sampler, *, prompts: int, max_prompt_length: int) -> dict[str, int]:
    """What sampling surely needs, over all devices: keys and values of what is in flight, and the rollout itself.

    Where slots are chosen by memory, of one of them.

    Args:
        sampler: model, completions of a prompt, their longest, and slots.
        prompts: P.
        max_prompt_length: Tp.
    """
    slots = 1 if sampler.config.slots == "auto" else sampler.slots(prompts, max_prompt_length)
    caches = sampler.footprint(prompts, max_prompt_length).caches(slots)
    completions = sampler.group * sampler.config.max_tokens
    masks = 4 * sampler.mesh.size * sampler.kept * prompts * completions  # on every device
    return ({"the sampling mask": masks} if masks else {}) | {
        "keys and values of sampling": caches * sampler.mesh.size,
        "a step's tokens and log-probs": 4 * prompts * (max_prompt_length + 3 * completions),
    }
