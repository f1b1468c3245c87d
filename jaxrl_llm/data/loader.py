"""The order of prompts and rows: deterministic, checkpointable, the same in every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import grain
import numpy as np

from jaxrl_llm.data.prompts import PromptBatch, PromptDataset

ServedT = TypeVar("ServedT")


class ShuffledLoader(Iterator[ServedT]):
    """Endless batches of a data set's items, every epoch in another order.

    Batches run across the end of an epoch, so each item is served exactly once per epoch and all batches
    have one shape. A batch larger than the data set takes items of several epochs.

    Args:
        serve: Makes a batch of the numbers of its items and the epoch of the first one, from 0.
        size: Number of items.
        fingerprint: Of the data; a flat JSON-able record.
        batch_size: Items per step.
        seed: Seed of the order, 0 to 2³² - 1.

    Raises:
        ValueError: A batch size below 1, or an impossible seed.
    """

    def __init__(
        self,
        serve: Callable[[list[int], int], ServedT],
        size: int,
        fingerprint: Mapping[str, Any],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
        _check(batch_size)
        # (epoch, number of the item)
        order = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
        order = order.map_with_index(lambda position, item: (position // size, int(item)))
        # Without drop_remainder Grain computes the length of endless data in floating point, which overflows.
        batches = order.batch(batch_size, drop_remainder=True, batch_fn=list).map(
            lambda pairs: serve([item for _, item in pairs], pairs[0][0])
        )
        reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # tokens are in memory already
        self._iterator = iter(batches.to_iter_dataset(reading))
        self._fingerprint = {**fingerprint, "batch_size": batch_size, "seed": seed}

    def __next__(self) -> ServedT:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns the position as a dict that JSON can hold."""
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


class PromptLoader(ShuffledLoader[PromptBatch]):
    """Endless batches of prompts, every epoch in another order; see `ShuffledLoader`.

    Args:
        dataset: The prompts.
        batch_size: Prompts per step.
        seed: Seed of the order, 0 to 2³² - 1.
    """

    def __init__(self, dataset: PromptDataset, *, batch_size: int, seed: int) -> None:
        super().__init__(
            lambda items, epoch: dataset.batch(items, epoch=epoch),
            len(dataset),
            dataset.fingerprint,
            batch_size=batch_size,
            seed=seed,
        )


def eval_batches(dataset: PromptDataset, *, batch_size: int) -> Iterator[PromptBatch]:
    """Yields every prompt once, in the order of the source, in batches of one shape.

    The last batch is filled up with repeats from the start, whose `valid` is False.

    Args:
        dataset: The prompts.
        batch_size: Prompts per batch.

    Raises:
        ValueError: A batch size below 1.
    """
    _check(batch_size)
    positions = (np.arange(start, start + batch_size) for start in range(0, len(dataset), batch_size))
    return (dataset.batch(block % len(dataset), valid=block < len(dataset)) for block in positions)


def _check(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
