"""What decoding a token reads, beside a loop over slots and their pages."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling import traffic as module
from jaxrl_llm.sampling.caches import Sizes
from jaxrl_llm.sampling.in_pages import neighbours
from jaxrl_llm.sampling.layout import sampling_mesh
from jaxrl_llm.sampling.traffic import spread, traffic
from jaxrl_llm.sharding import MeshConfig, make_mesh

PAGE, SLOTS = 8, 12
SHAPE: dict[str, Any] = {"group": 3, "prompt_width": 20, "tokens": 64}


def pages_of(slot: int, written: np.ndarray, window: int | None) -> tuple[set[Any], set[Any]]:
    """Those of its prompt and of its own tokens, by the clock, in which a slot sees something."""
    width = SHAPE["prompt_width"]
    position = width + written[slot] - 1
    seen = range(max(0, position - (window or 999) + 1), position + 1)
    first = written.max() + 1 - written[slot]
    return {(slot // 3, t // PAGE) for t in seen if t < width}, {
        (first + t - width) // PAGE for t in seen if t >= width
    }


@pytest.mark.parametrize(
    ("implementation", "windows", "cache_dtype", "of_head"),
    [("xla", (None, None), "int8", 4 + 4), ("pallas_interpret", (13, None), None, 4 * 4)],
    ids=["xla", "pallas"],
)
def test_traffic_is_that_of_weights_and_pages(implementation, windows, cache_dtype, of_head, tiny_config, monkeypatch):
    """Of plain JAX what any slot of a block sees, of the kernel what each sees, and prompts once for neighbours.

    A head has four entries, of int8 with a scale.
    """
    monkeypatch.setattr(module, "page_tokens", lambda: PAGE)
    model = Transformer(tiny_config(num_heads=8, num_kv_heads=4, sliding_windows=windows))
    config, written = model.config, spread(SLOTS, 32)
    mesh = sampling_mesh(make_mesh(MeshConfig(fsdp=2, tensor=4)))
    found = traffic(model, mesh, implementation, written, **SHAPE, cache_dtype=cache_dtype)

    sizes = Sizes.of(slots=SLOTS, prompts=4, page=PAGE, token_bytes=4 * of_head, **SHAPE)
    assert sizes.slots == SLOTS
    assert sizes.block > 1
    pages, kernel = 0, implementation != "xla"
    for window in windows:
        prompt, own = zip(*(pages_of(slot, written, window) for slot in range(SLOTS)), strict=True)
        of_near, of_block = neighbours(SLOTS, 2) if kernel else sizes.alike, 1 if kernel else sizes.block
        shared = [len(set().union(*prompt[at : at + of_near])) for at in range(0, SLOTS, of_near)]
        turns = sizes.block // sizes.alike  # neighbours of a block take turns together
        pages += (
            sum(shared) if kernel else sum(max(shared[at : at + turns]) * turns for at in range(0, len(shared), turns))
        )
        pages += of_block * sum(len(set().union(*own[at : at + of_block])) for at in range(0, SLOTS, of_block))
    assert found.pages == pages * 2 * PAGE * of_head

    whole = model.abstract_params()
    sizes_of_layers = [math.prod(leaf.shape) for leaf in jax.tree.leaves(whole["layers"])]
    norms = sum(size for size in sizes_of_layers if size == config.num_layers * config.embed_dim)
    assert norms
    assert found.weights == 4 * ((sum(sizes_of_layers) - norms + config.vocab_size * config.embed_dim) // 4 + norms)


@pytest.mark.parametrize("slots", [1, 2, 7, 32])
def test_lengths_are_spread_evenly(slots):
    written = spread(slots, 100)
    assert len(set(written)) == slots
    assert 1 <= written.min() <= written.max() <= 200
    assert written.mean() == pytest.approx(100, abs=1)
