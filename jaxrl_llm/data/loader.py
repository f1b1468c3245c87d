"""The order of prompts: deterministic, checkpointable, the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from jaxrl_llm.data.prompts import PromptBatch, PromptDataset


class PromptLoader(Iterator[PromptBatch]):
    """Endless batches of prompts, every epoch in another order.

    Batches run across the end of an epoch, so each prompt is served exactly once per epoch and all batches
    have one shape. A batch larger than the data set takes prompts of several epochs.

    Args:
        dataset: The prompts.
        batch_size: Prompts per step, of all processes together.
        seed: Seed of the order, 0 to 2³² - 1.
        process_index: Which block of each batch this process serves.
        process_count: Number of processes; the order of the whole does not depend on it.

    Raises:
        ValueError: A batch size that is not a positive multiple of `process_count`, or an impossible index or
            seed.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
        own = _own_block(batch_size, process_index, process_count)
        size = len(dataset)
        # (epoch, number of the prompt), read only after the batch has been cut to this process's block
        order = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
        order = order.map_with_index(lambda position, item: (position // size, int(item)))
        # Without drop_remainder Grain computes the length of endless data in floating point, which overflows.
        batches = order.batch(batch_size, drop_remainder=True, batch_fn=list).map(
            lambda pairs: dataset.batch([item for _, item in pairs[own]], epoch=pairs[0][0])
        )
        reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # tokens are in memory already
        self._iterator = iter(batches.to_iter_dataset(reading))
        self._fingerprint = {**dataset.fingerprint, "batch_size": batch_size, "seed": seed}

    def __next__(self) -> PromptBatch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns the position as a dict that JSON can hold, the same in every process."""
        return {"fingerprint": dict(self._fingerprint), "iterator": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position that `get_state` returned; the batches that followed it then follow again.

        Raises:
            ValueError: The position belongs to other data, another seed or another batch size; says what
                differs.
        """
        saved = state["fingerprint"]
        differences = [
            f"{name} was {saved.get(name)!r} and is {value!r}"
            for name, value in self._fingerprint.items()
            if saved.get(name) != value
        ]
        if differences:
            raise ValueError(
                "the saved data position belongs to another order of prompts: " + ", ".join(differences) + "; resume "
                "with the same data and settings, or start a new run"
            )
        self._iterator.set_state(state["iterator"])


def eval_batches(
    dataset: PromptDataset, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[PromptBatch]:
    """Yields every prompt once, in the order of the source, in batches of one shape.

    The last batch is filled up with repeats from the start, whose `valid` is False.

    Args:
        dataset: The prompts.
        batch_size: Prompts per batch, of all processes together.
        process_index: Which block of each batch this process serves.
        process_count: Number of processes; each yields the same number of batches.

    Raises:
        ValueError: A batch size that is not a positive multiple of `process_count`.
    """
    own = _own_block(batch_size, process_index, process_count)
    starts = range(0, len(dataset), batch_size)
    positions = (np.arange(start, start + batch_size)[own] for start in starts)
    return (dataset.batch(block % len(dataset), valid=block < len(dataset)) for block in positions)


def _own_block(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be a positive multiple of the number of processes, got batch_size={batch_size} "
            f"and process_count={process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be between 0 and {process_count - 1}, got {process_index}")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)
