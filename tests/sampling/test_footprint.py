"""Bytes of sampling in closed form, beside the arrays and the programs that are really made; slots chosen by them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxrl_llm.models.config import LayerKind, LoraConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling import flight
from jaxrl_llm.sampling.caches import Memory, as_kept
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.footprint import MARGIN
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh

PROMPTS, WIDTH, GROUP = 8, 24, 4


def sampler(
    model: Transformer, mesh: Mesh, *, tokens: int = 200, memory: float | None = None, **settings: Any
) -> Sampler:
    config = SamplingConfig(max_tokens=tokens, **settings)
    return Sampler(model, config, group=GROUP, stop_tokens=(1,), mesh=mesh, memory=memory)


@pytest.fixture
def model(tiny_config) -> Transformer:
    """One whose layers are too large for the loop in which all march together."""
    return Transformer(tiny_config(embed_dim=256, mlp_dim=1280, num_layers=4, max_position_embeddings=512))


# ---- Bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 5, 11, 29])
@pytest.mark.parametrize("cache_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("windows", [(None,), (40, None, 150)])
def test_caches_are_those_that_are_made(tiny_config, one_device, windows, cache_dtype, slots):
    """Idle slots, rings of windows, places of prompts and scales are counted."""
    model = Transformer(tiny_config(num_layers=4, sliding_windows=windows, max_position_embeddings=512))
    footprint = sampler(model, one_device, slots=slots, cache_dtype=cache_dtype).footprint(PROMPTS, WIDTH)
    value = as_kept(flight._value_of_a_token(model, model.init(jax.random.key(0))), cache_dtype)
    sizes = flight.sizes_of(value, slots=slots, prompts=PROMPTS, group=GROUP, prompt_width=WIDTH, tokens=200)
    made = jax.eval_shape(lambda: [Memory.empty(sizes, 1, kind.window, value) for kind in model.config.kinds])
    assert footprint.caches(slots) == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))


def test_heads_are_split_and_repeated(tiny_config):
    """Along `tensor`, of which there are more than heads of keys and values: each device has one of these."""
    model = Transformer(tiny_config(num_kv_heads=2))
    whole, split = (
        sampler(model, make_mesh(MeshConfig(fsdp=2, tensor=tensor), jax.devices()[: 2 * tensor]), slots=3)
        .footprint(PROMPTS, WIDTH)
        .caches(3)
        for tensor in (1, 4)
    )
    assert split == whole // 2


@pytest.mark.parametrize(
    ("changes", "settings", "mesh"),
    [
        ({}, {"slots": 7}, {}),
        ({"embed_dim": 512, "vocab_size": 4096}, {"slots": 16, "scan_layers": True, "top_p": 0.9}, {}),
        ({"dtype": "bfloat16", "sliding_windows": (40, None)}, {"slots": 6}, {}),
        ({"num_heads": 8, "num_kv_heads": 8}, {"slots": 9, "cache_dtype": "int8"}, {}),
        pytest.param({"lora": LoraConfig(rank=4)}, {"slots": None}, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        ({"embed_dim": 64, "mlp_dim": 128, "num_layers": 8}, {"slots": None}, {}),
    ],
    ids=["in slots", "in loops", "bfloat16 and windows", "caches in int8", "merged on a mesh", "all together"],
)
def test_programs_take_what_is_foretold(model, changes, settings, mesh):
    """Within a tenth, arguments and results counted; of few layers, the one that computes would weigh more."""
    model = Transformer(dataclasses.replace(model.config, head_dim=32, **_kinds(changes)))
    devices = make_mesh(MeshConfig(**mesh), jax.devices()[: int(np.prod(list(mesh.values()) or [1]))])
    ours = sampler(model, devices, **settings)
    arguments = model.abstract_params_on(devices), jnp.zeros((PROMPTS, WIDTH), jnp.int32), jnp.ones(PROMPTS, jnp.int32)
    with jax.set_mesh(devices):
        lowered = jax.jit(ours.sample).lower(*arguments, jnp.zeros(2, jnp.uint32), jnp.int32(0))
    found = lowered.compile().memory_analysis()
    takes = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    needs = ours.footprint(PROMPTS, WIDTH).needs(ours.slots(PROMPTS, WIDTH))
    assert sum(needs.values()) == pytest.approx(takes, rel=0.1), (needs, found)


def _kinds(changes: dict[str, Any]) -> dict[str, Any]:
    windows = changes.get("sliding_windows")
    if windows is None:
        return changes
    rest = {name: value for name, value in changes.items() if name != "sliding_windows"}
    return rest | {"layer_kinds": tuple(LayerKind(window) for window in windows)}


# ---- Slots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.71, 0.99])
def test_as_many_as_fit_are_chosen(model, one_device, share):
    """And with one more the room would not suffice."""
    footprint = sampler(model, one_device, slots=None).footprint(PROMPTS, WIDTH)
    least, most = (sum(footprint.needs(slots).values()) for slots in (1, PROMPTS * GROUP))
    room = least + share * (most - least)
    slots = sampler(model, one_device, slots="auto", memory=room / (1 - MARGIN) + 1).slots(PROMPTS, WIDTH)
    assert 1 <= slots < PROMPTS * GROUP
    assert sum(footprint.needs(slots).values()) <= room < sum(footprint.needs(slots + 1).values())


def test_with_room_for_all_a_small_model_marches(tiny_config, one_device):
    small = Transformer(tiny_config(max_position_embeddings=512))
    footprint = sampler(small, one_device, slots="auto", memory=1e9).footprint(PROMPTS, WIDTH)
    assert footprint.most_slots(1e9) == PROMPTS * GROUP
    assert footprint._loop(PROMPTS * GROUP).together
    needed = sum(footprint.needs(PROMPTS * GROUP).values())
    assert footprint.most_slots(needed) < PROMPTS * GROUP


def test_what_stays_in_memory_is_counted(model, one_device):
    """The optimizer's state and a reference leave less for slots."""
    footprint = sampler(model, one_device, slots="auto", memory=1e9).footprint(PROMPTS, WIDTH)
    memory = sum(footprint.needs(20).values()) / (1 - MARGIN) + 1
    more = dataclasses.replace(footprint, resident=footprint.needs(1)["parameters and what else stays there"] + 10**6)
    assert more.most_slots(memory) < footprint.most_slots(memory)


def test_what_is_sampled_does_not_depend_on_it(tiny_config, lively_params, one_device, prompts, key, assert_same):
    small = Transformer(tiny_config(max_position_embeddings=512))
    params = lively_params(small)

    def sampled(**settings: Any) -> Any:
        return sampler(small, one_device, tokens=40, **settings)(params, *prompts, key, 0)

    width = prompts[0].shape[1]
    footprint = sampler(small, one_device, tokens=40, slots=None).footprint(4, width)
    memory = sum(footprint.needs(5).values()) / (1 - MARGIN) + 1
    chosen = sampler(small, one_device, tokens=40, slots="auto", memory=memory)
    assert 1 < chosen.slots(4, width) < 16
    assert_same(sampled(slots="auto", memory=memory), sampled(slots=None))


def test_not_one_is_an_error_that_says_what_to_lower(model, one_device):
    few = sampler(model, one_device, slots="auto", memory=10**6)
    with pytest.raises(ValueError, match=r"slots=auto: one completion at a time needs .* which has 1 MB: raise sampl"):
        few.slots(PROMPTS, WIDTH)


def test_the_choice_is_told(model, one_device):
    plenty = sampler(model, one_device, slots="auto", memory=1e9).how_slots_are_chosen(PROMPTS, WIDTH)
    assert plenty.startswith(" sampling.slots=auto: all 32 completions of a device at a time, which need ")
    assert plenty.endswith(" of its 1 GB.")
    footprint = sampler(model, one_device, slots=None).footprint(PROMPTS, WIDTH)
    memory = sum(footprint.needs(9).values()) / (1 - MARGIN) + 1
    told = sampler(model, one_device, slots="auto", memory=memory).how_slots_are_chosen(PROMPTS, WIDTH)
    assert " of the 32 completions of a device at a time" in told and "keys and values" in told
    assert sampler(model, one_device, slots=4).how_slots_are_chosen(PROMPTS, WIDTH) == ""
