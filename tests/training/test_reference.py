"""The reference of a run that starts from adapters: the model that it starts from, or the bare base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from jaxrl_llm.algorithms.offline import make_reference_pass
from jaxrl_llm.algorithms.preference.presets import dpo
from jaxrl_llm.algorithms.supervised import Demonstrations
from jaxrl_llm.data.preferences import PreferenceFormat
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.models.config import LoraConfig, ModelConfig, Params
from jaxrl_llm.models.lora import reference_of, split_adapters, start_reference, starting_adapters, without_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.offline import OfflineTrainer, OfflineTrainingConfig, OfflineUpdateConfig
from jaxrl_llm.training.run.setup import RunSetup

TOKENIZER = CharTokenizer("0123456789+=")
SIZE: dict[str, Any] = {
    "embed_dim": 16,
    "mlp_dim": 32,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
}
MODEL = Transformer(ModelConfig(vocab_size=len(TOKENIZER), **SIZE, remat="none", lora=LoraConfig(rank=2)))
ROWS = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": f"{n + 2}"} for n in range(8)]


@pytest.fixture(scope="module")
def fresh() -> Params:
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def tuned(fresh: Params) -> Params:
    """The same base with adapters that change what it says."""
    leaves = jax.tree.map_with_path(lambda path, leaf: leaf + 0.3 * (path[-1].key == "lora_b"), fresh)
    assert starting_adapters(fresh) is None and starting_adapters(leaves) is not None
    return leaves


def first_metrics(params: Params, folder: Path, reference: Any, **setup: Any) -> tuple[dict[str, float], str]:
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    trainer = OfflineTrainer(
        model=MODEL,
        params=params,
        objective=dpo(),
        dataset=PreferenceFormat().dataset(ROWS, TOKENIZER, max_prompt_length=4, max_completion_length=4),
        setup=RunSetup(folder, mesh, **setup),
        training=OfflineTrainingConfig(steps=1, rows_per_step=8, checkpoint_every=0),
        update=OfflineUpdateConfig(reference=reference),
    )
    trainer.run()
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]), trainer.what_a_step_is


@pytest.mark.parametrize("reference", ["in_step", "ahead"])
def test_a_run_from_adapters_begins_at_its_reference(tuned: Params, tmp_path: Path, reference: Any) -> None:
    metrics, said = first_metrics(tuned, tmp_path / "start", reference)
    assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(metrics["rewards/chosen"]) < 1e-5 and abs(metrics["rewards/margins"]) < 1e-5
    assert "The reference is the model that the run starts from" in said
    metrics, said = first_metrics(tuned, tmp_path / "bare", reference, bare_reference=True)
    assert abs(metrics["rewards/chosen"]) > 1e-3 and "The reference is the base, without adapters" in said


def test_what_is_kept_of_the_start(fresh: Params, tuned: Params) -> None:
    """Adapters alone, unless all is asked for; the base is shared, and what training changes is not."""
    places = jax.tree.map(lambda leaf: leaf.sharding, tuned)
    kept, _ = start_reference(tuned, places, "float32", with_adapters=True)
    assert kept is not None and jax.tree.structure(kept) == jax.tree.structure(split_adapters(tuned)[0])
    trained = jax.tree.map_with_path(lambda path, leaf: leaf + (path[-1].key in ("lora_a", "lora_b")), tuned)
    reference = reference_of(trained, kept)
    assert reference is not None
    chex.assert_trees_all_equal(reference, tuned)
    whole, _ = start_reference(tuned, places, "float32", with_adapters=True, whole=True)
    chex.assert_trees_all_equal(whole, tuned)
    for params, with_adapters in ((tuned, False), (fresh, True)):
        kept, said = start_reference(params, places, "float32", with_adapters=with_adapters)
        assert kept is None and "the base" in said
        chex.assert_trees_all_equal(reference_of(trained, kept), without_adapters(tuned))
        whole, _ = start_reference(params, places, "float32", with_adapters=with_adapters, whole=True)
        chex.assert_trees_all_equal(whole, without_adapters(tuned))
    plain = without_adapters(tuned)
    kept, said = start_reference(plain, places, "float32", with_adapters=True)
    assert said == "" and kept is not None and reference_of(plain, kept) is kept
    assert reference_of(plain, None) is None


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_reference_of_its_own_is_in_the_type_of_products(param_dtype: Any, tiny_config, lively_params) -> None:
    """In bfloat16 half of it, and its log-probs are bit-equal; in float32, and of bfloat16 parameters, it is shared."""
    config = tiny_config(dtype="bfloat16", param_dtype=param_dtype, qk_norm=True, attention_bias=True, remat="full")
    model = Transformer(dataclasses.replace(config, tie_embeddings=False))
    params = jax.device_put(lively_params(model), jax.devices()[0])
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    shared, _ = start_reference(params, places, "float32", with_adapters=True)
    assert all(one is other for one, other in zip(*map(jax.tree.leaves, (shared, params)), strict=True))
    kept, _ = start_reference(params, places, "bfloat16", with_adapters=True)
    assert kept is not None
    types = {path[-1].key: leaf.dtype.name for path, leaf in jax.tree.leaves_with_path(kept)}
    assert types == {"weight": "bfloat16", "bias": "bfloat16", "scale": param_dtype}
    rng = np.random.default_rng(0)
    rows = Demonstrations(
        prompt=rng.integers(0, 64, (3, 7)),
        prompt_lengths=np.array([7, 1, 4]),
        completion=rng.integers(0, 64, (3, 2, 5)),
        mask=np.ones((3, 2, 5), bool),
    )
    score = jax.jit(make_reference_pass(model))
    np.testing.assert_array_equal(score(kept, rows), score(params, rows))
