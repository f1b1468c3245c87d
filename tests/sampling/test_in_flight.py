"""Completions in flight: what slots, pages and the clock do to them, which is nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxrl_llm.logprobs import token_scores
from jaxrl_llm.models.config import LayerKind, RopeConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling import caches, flight
from jaxrl_llm.sampling.decode import Loop, row_keys, sample
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.in_flight import sample_in_flight
from jaxrl_llm.sampling.logits import SamplingConfig, uniforms
from jaxrl_llm.sampling.sampled import Wanted
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.types import Rollout

PAGE = 8
TOKENS = 44
STOP_TOKENS = (3, 9)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"num_layers": 3, "sliding_windows": (5, None, 20)},
    "caps_kinds": {
        "tie_embeddings": False,
        "num_layers": 3,
        "attention_softcap": 1.5,
        "layer_kinds": (
            LayerKind(window=9),
            LayerKind(rope=None, norms="sandwich"),
            LayerKind(rope=RopeConfig(theta=1e6)),
        ),
    },
    "bias_norms": {"qk_norm": True, "attention_bias": True, "num_heads": 8, "num_kv_heads": 2},
}


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short completion has several, and the clock comes round."""
    monkeypatch.setattr(flight, "page_tokens", lambda: PAGE)


@pytest.fixture(scope="module")
def long_prompts() -> tuple[np.ndarray, np.ndarray]:
    """Six prompts of 1 to 19 tokens."""
    tokens = np.random.default_rng(3).integers(10, 64, (6, 19)).astype(np.int32)
    return tokens, np.array([3, 16, 1, 19, 8, 9], np.int32)


def sampler(model: Transformer, mesh: Mesh, *, slots: int | None, group: int = 3, **settings: Any) -> Sampler:
    config = SamplingConfig(**{"max_tokens": TOKENS, "slots": slots, **settings})
    return Sampler(model, config, group=group, stop_tokens=STOP_TOKENS, mesh=mesh)


@pytest.mark.parametrize(
    ("asked", "together"),
    [({}, True), ({"scan_layers": True}, False), ({"attention": "xla"}, False), ({"cache_dtype": "bfloat16"}, False)],
)
def test_what_only_this_loop_can_do_is_done_by_it(asked, together, tiny_config):
    """Where the other would be faster, too."""
    model = Transformer(tiny_config())
    loop = Loop.of(model, {"weight": jnp.zeros((8, 8))}, SamplingConfig(max_tokens=8, **asked), slots=4, completions=4)
    assert loop.together == together


def test_a_kernel_of_another_platform_is_refused_at_once(tiny_config, one_device):
    with pytest.raises(ValueError, match=r"sampling\.attention='pallas' .* on cpu .* choose auto, or xla"):
        sampler(Transformer(tiny_config()), one_device, slots=None, attention="pallas")


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [("plain", False), ("windows", True), ("caps_kinds", False), ("caps_kinds", True), ("bias_norms", True)],
)
def test_logprobs_are_those_of_the_learner(
    name, scan_layers, tiny_config, lively_params, one_device, long_prompts, key
):
    """Seven slots decode completions of six prompts, of which several are read by neighbours."""
    model = Transformer(tiny_config(**ARCHITECTURES[name]))
    params = lively_params(model)
    rollout = sampler(model, one_device, slots=7, temperature=0.8, scan_layers=scan_layers)(
        params, *long_prompts, key, 0
    )

    @jax.jit
    def expected(rollout: Rollout) -> jax.Array:
        hidden = model.hidden(params, rollout)
        return token_scores(hidden, model.head(params), rollout.completion, temperature=0.8).logprobs

    mask = np.asarray(rollout.mask)
    assert 0.2 < mask.mean() < 0.9
    assert (np.asarray(rollout.completion_lengths) > 3 * PAGE).any()
    np.testing.assert_allclose(rollout.sampler_logprobs[mask], expected(rollout)[mask], atol=1e-4)
    assert (np.asarray(rollout.sampler_logprobs)[~mask] == 0).all()


@pytest.mark.parametrize(
    ("slots", "block_bytes"),
    [(1, 2**20), (5, 1), (5, 2**12), (17, 2**12), (17, 2**20)],
    ids=["one", "one a block", "one block, one idle slot", "blocks of six, one idle slot", "all in one block"],
)
def test_slots_and_blocks_change_nothing(
    slots, block_bytes, tiny_config, lively_params, one_device, long_prompts, key, assert_same, monkeypatch
):
    """As all of them together, one after another, or with slots beyond what a block can hold."""
    model = Transformer(tiny_config(sliding_windows=(6, None)))
    params = lively_params(model)
    expected = sampler(model, one_device, slots=None)(params, *long_prompts, key, 3)
    assert len(np.unique(np.asarray(expected.completion_lengths))) > 8
    monkeypatch.setattr(caches, "_BLOCK_BYTES", block_bytes)
    assert_same(sampler(model, one_device, slots=slots)(params, *long_prompts, key, 3), expected)


def test_the_kernel_samples_the_same_on_a_mesh(tiny_config, lively_params, long_prompts, key, assert_same):
    """Each device has one of the heads of keys and values, and some of the prompts."""
    model = Transformer(tiny_config(num_heads=8, num_kv_heads=4, sliding_windows=(20, None)))
    params, mesh = lively_params(model), make_mesh(MeshConfig(fsdp=2, tensor=4))
    expected, found = (
        sampler(model, mesh, slots=5, group=2, attention=kernel, scan_layers=True)(params, *long_prompts, key, 3)
        for kernel in ("xla", "pallas_interpret")
    )
    assert len(np.unique(np.asarray(expected.completion_lengths))) > 6
    assert_same(found, expected)


@pytest.mark.parametrize("most", [1, 4, 5, 12, 200])
@pytest.mark.parametrize("group", [1, 3, 8, 12, 100])
def test_few_slots_stay_idle(group, most):
    """A sixth, one, or what makes blocks equal."""
    for slots in (1, 5, 16, 17, 31, 64, 128, 255):
        shape = {"slots": slots, "prompts": 64, "group": group, "prompt_width": 64, "tokens": 64, "page": 64}
        sizes = caches.Sizes.of(**shape, token_bytes=caches._BLOCK_BYTES // 64 // most)
        assert sizes.slots % sizes.block == sizes.block % sizes.alike == 0
        assert sizes.block <= most
        assert slots <= sizes.slots <= slots + max(1, slots // 6, sizes.slots // sizes.block - 1)
        assert sizes.alike > 1 or min(group, most, slots) == 1


def test_limits_end_completions(tiny_config, lively_params, one_device, long_prompts, key):
    """Of both loops; what was sampled before the limit stays."""
    model, (prompt, lengths) = Transformer(tiny_config()), long_prompts
    params = lively_params(model)
    limits = np.random.default_rng(0).integers(1, TOKENS + 1, (6, 3)).astype(np.int32)
    keys = row_keys(jax.random.key(1), jnp.arange(6), 3)

    def sampled(slots: int | None, limits: np.ndarray | None) -> Rollout:
        config = SamplingConfig(max_tokens=TOKENS, slots=slots)
        with jax.set_mesh(one_device):
            return jax.jit(
                lambda: sample(
                    model, params, prompt, lengths, keys, mesh=one_device, config=config, stop_tokens=(), limits=limits
                )
            )()

    whole = np.asarray(sampled(None, None).completion)
    for slots in (None, 4):
        part = sampled(slots, limits)
        np.testing.assert_array_equal(part.completion_lengths, limits)
        assert not np.asarray(part.finished).any()
        np.testing.assert_array_equal(part.completion, np.where(part.mask, whole, 0))


def test_the_greedy_one_of_each_prompt(tiny_config, lively_params, one_device, long_prompts, key, assert_same):
    model = Transformer(tiny_config())
    params = lively_params(model)

    def with_greedy(slots: int | None) -> Rollout:
        config = SamplingConfig(max_tokens=TOKENS, slots=slots)
        ours = Sampler(model, config, group=2, stop_tokens=STOP_TOKENS, mesh=one_device, greedy=True)
        return ours(params, *long_prompts, key, 0)

    assert_same(with_greedy(4), with_greedy(None))


def test_memory_follows_slots_and_not_the_batch(tiny_config, one_device):
    """Of twice the prompts, less is added than twice what the rollout and its randomness take."""
    model = Transformer(tiny_config(max_position_embeddings=512, num_layers=4, num_heads=8, num_kv_heads=8))

    def temporaries(prompts: int, slots: int) -> int:
        ours = sampler(model, one_device, slots=slots, max_tokens=256, group=4)
        arguments = model.abstract_params(), jnp.zeros((prompts, 16), jnp.int32), jnp.ones(prompts, jnp.int32)
        with jax.set_mesh(one_device):
            lowered = jax.jit(ours.sample).lower(*arguments, jnp.zeros(2, jnp.uint32), jnp.int32(0))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    token = 2 * 4 * 8 * model.config.head_dim * 4
    small, more_prompts, more_slots = temporaries(8, 4), temporaries(16, 4), temporaries(8, 12)
    assert more_prompts - small < 2 * 8 * 4 * 256 * 8 * 4
    assert 0.8 < (more_slots - small) / (8 * (256 + 16) * token) < 1.4


@pytest.mark.parametrize("slots", [8, 16])
def test_slots_are_filled_as_soon_as_they_are_free(slots, tiny_config, lively_params, one_device):
    """Of heavy-tailed lengths a quarter more turns, at most, than the longest of them or all over all slots."""
    model = Transformer(tiny_config(num_layers=1, max_position_embeddings=512))
    drawn = np.random.default_rng(0).lognormal(0, 1, (32, 8))
    limits = np.clip(drawn / drawn.mean() * 64, 1, 256).astype(np.int32)
    keys = row_keys(jax.random.key(1), jnp.arange(32), 8)
    wanted = Wanted(jnp.zeros((32, 4), jnp.int32), jnp.full(32, 4), uniforms(keys, 256), None, jnp.asarray(limits))
    config = SamplingConfig(max_tokens=256)
    end = jax.jit(
        lambda params: sample_in_flight(
            model, params, wanted, slots=slots, in_loops=False, config=config, stop_tokens=()
        )
    )(lively_params(model))
    np.testing.assert_array_equal(end.sampled.lengths.reshape(limits.shape), limits)
    assert end.clock <= 1.25 * max(limits.max(), limits.sum() / slots)
