"""Score models survive the trip to a folder, with their statistics; test_torch_heads.py compares with PyTorch."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.models.checkpoints.pretrained import save_pretrained
from jaxrl_llm.models.checkpoints.score_pretrained import load_score_model, save_score_model
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.lora import merge_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Moments
from jaxrl_llm.sharding import make_mesh, parameter_shardings


@pytest.mark.parametrize(
    ("outputs", "bias", "architecture"),
    [(1, False, "LlamaForSequenceClassification"), (2, True, "LlamaForTokenClassification")],
)
def test_a_folder_gives_back_the_same_bits(outputs, bias, architecture, tiny_config, lively_params, tmp_path):
    """Untied, so that there could have been a LM head; sharded on the way in."""
    model = ScoreModel(Transformer(tiny_config(tie_embeddings=False)), outputs=outputs, bias=bias)
    params, tokenizer = lively_params(model), CharTokenizer("0123")
    statistics = Moments.of(jnp.array([0.1, 0.7, -3.2]))
    folder = save_score_model(tmp_path / "model", model, params, statistics=statistics, tokenizer=tokenizer)
    description = json.loads((folder / "config.json").read_text())
    assert description["architectures"] == [architecture]
    assert len(description["id2label"]) == outputs and description["pad_token_id"] == 0
    mesh = make_mesh()
    loaded, arrays, read = load_score_model(
        folder,
        shardings=lambda m: parameter_shardings(mesh, m.logical_axes(), m.abstract_params()),
        remat="none",
    )
    assert loaded == model
    chex.assert_trees_all_equal(arrays, params)
    assert arrays["score_head"]["weight"].sharding.mesh == mesh
    assert read == statistics
    assert CharTokenizer.from_pretrained(folder) == tokenizer
    with pytest.raises(ValueError, match="exists already"):
        save_score_model(folder, model, params)
    assert load_score_model(save_score_model(folder, model, params, overwrite=True))[2] is None


def test_adapters_are_merged(tiny_config, lively_params, tmp_path):
    model = ScoreModel(Transformer(tiny_config(lora=LoraConfig(rank=2))))
    params = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.01, params)  # else the adapters do nothing
    loaded, arrays, _ = load_score_model(save_score_model(tmp_path / "model", model, params), remat="none")
    assert loaded.config == dataclasses.replace(model.config, lora=None)
    chex.assert_trees_all_equal(arrays, jax.jit(merge_adapters, static_argnums=1)(params, model.config))


def test_what_is_no_score_model_raises(tiny_config, tmp_path):
    trunk = Transformer(tiny_config())
    params = jax.jit(trunk.init)(jax.random.key(0))
    folder = save_pretrained(tmp_path / "policy", trunk, params)
    with pytest.raises(
        ValueError, match=r"no tensor 'score\.weight': it is no score model, but \['LlamaForCausalLM'\]"
    ):
        load_score_model(folder)
    with pytest.raises(ValueError, match="shares a policy's trunk"):
        save_score_model(tmp_path / "shared", ScoreModel(trunk, lm_head=True), params)
    folder = save_score_model(tmp_path / "broken", ScoreModel(trunk), ScoreModel(trunk).from_trunk(params))
    (folder / "score_statistics.json").write_text('{"mean": 1.0}')
    with pytest.raises(ValueError, match=r"score_statistics\.json: 'count' is missing"):
        load_score_model(folder)
