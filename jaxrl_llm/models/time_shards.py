"""How the places of a row are dealt to the devices that split its time, so that all have as much to attend to.

What a query sees grows with its place. Chunks of the row are dealt to the devices from the first to the last, then from
the last to the first, and so on (the zigzag of Zhu 2024 and of Llama 3, 2024, arXiv:2407.21783, which stop after one
round there and back). With many rounds the devices share not one long text alone evenly, but also whatever trees lie in
the row: each has a sample of all places. Tokens keep the places that they have in their row (`TokenRows.place`), which
is all that attention asks for.
"""

from __future__ import annotations

import functools

import numpy as np

_CHUNKS = (512, 256, 128, 64, 32, 16, 8, 4, 2)
"""Tokens of a chunk; from 128 on what kernels take for a block, or several, so that no block spans two chunks."""

_ROUNDS = 8
"""From so many on, one that is not followed by its reverse weighs little."""


@functools.lru_cache(maxsize=64)
def dealt_order(tokens: int, shards: int) -> np.ndarray:
    """The places of a row in the order in which the devices hold them, `[T']`: T'/C after T'/C.

    T' is T filled up to whole rounds, of the largest chunks that add no more than a sixteenth.

    Args:
        tokens: T.
        shards: C, devices that split the row.
    """

    def rounds(chunk: int) -> int:
        least = -(-tokens // (shards * chunk))
        return least if least >= _ROUNDS else least + least % 2

    chunk = next((chunk for chunk in _CHUNKS if 16 * rounds(chunk) * shards * chunk <= 17 * tokens), 1)
    places = np.arange(rounds(chunk) * shards * chunk, dtype=np.int32).reshape(-1, shards, chunk)
    places[1::2] = places[1::2, ::-1]
    order = places.swapaxes(0, 1).reshape(-1)
    order.flags.writeable = False
    return order
