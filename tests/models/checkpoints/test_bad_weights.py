"""Weights that cannot be right: values that are not finite, and indices that lead elsewhere."""

from __future__ import annotations

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_llm.models.checkpoints.hf import SafetensorsSource
from jaxrl_llm.models.checkpoints.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapters, save_adapters
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained, save_pretrained
from jaxrl_llm.models.checkpoints.score_pretrained import load_score_model, save_score_model
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import parameter_shardings

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("value", "stored", "param_dtype"),
    [
        (np.nan, np.float32, "float32"),
        (-np.inf, np.float32, "float32"),
        (1e300, np.float64, "float32"),
        (-1e39, np.float64, "bfloat16"),
        (3.4e38, np.float32, "bfloat16"),  # rounds up to infinity
        (1e5, np.float16, "float32"),  # infinite in float16 already
        (np.nan, ml_dtypes.bfloat16, "bfloat16"),
    ],
)
@pytest.mark.parametrize("name", ["lm_head.weight", QUERY])
def test_values_that_are_not_finite_are_named(name, value, stored, param_dtype, checkpoint, golden_tensors):
    with np.errstate(over="ignore"):
        tensors = {key: tensor.astype(stored) for key, tensor in golden_tensors("llama").items()}
        tensors[name][2, 3] = value
    message = rf"llama_checkpoint: tensor '{re.escape(name)}' holds .* at \[2, 3\], .* no finite {param_dtype} \(1 of"
    with pytest.raises(ValueError, match=message):
        from_pretrained(checkpoint("llama", tensors=tensors), param_dtype=param_dtype)


def test_the_largest_values_are_taken(checkpoint, golden_tensors):
    tensors = {**golden_tensors("llama"), "model.norm.weight": np.full(32, 3.4e38, np.float32)}
    _, params = from_pretrained(checkpoint("llama", tensors=tensors))
    np.testing.assert_array_equal(params["final_norm"]["scale"], tensors["model.norm.weight"])


def test_sharded_values_are_checked_without_a_second_reading(checkpoint, golden_tensors, mesh):
    """What is not finite lies with one device alone; good tensors are read once (see test_hf.py)."""

    def shardings(transformer):
        return parameter_shardings(mesh, transformer.logical_axes(), transformer.abstract_params())

    tensors = golden_tensors("llama")
    tensors[QUERY][-1, -1] = np.nan
    with pytest.raises(ValueError, match=re.escape(f"tensor '{QUERY}' holds nan at [31, 31]")):
        from_pretrained(checkpoint("llama", tensors=tensors), shardings=shardings)


def test_a_tied_head_that_is_not_finite_is_no_other_head(checkpoint, golden_tensors):
    tensors = golden_tensors("llama_tied_mha")
    tensors["model.embed_tokens.weight"][1, 1] = np.nan
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"tensor 'model\.embed_tokens\.weight' holds nan at \[1, 1\]"):
        from_pretrained(checkpoint("llama_tied_mha", tensors=tensors))


def test_gguf(tmp_path, gguf_writer, golden_config, golden_tensors):
    tensors = golden_tensors("llama")
    tensors[QUERY][0, 5] = np.inf
    path = gguf_writer(tmp_path / "model.gguf", golden_config("llama"), tensors)
    with pytest.raises(ValueError, match=r"model\.gguf: tensor 'blk\.1\.attn_q\.weight' holds inf at \[0, 5\]"):
        from_pretrained(path)


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_adapters(tiny_config, lively_params, tmp_path):
    model = Transformer(tiny_config(lora=LoraConfig(rank=2, targets=("query",))))
    params = lively_params(model)
    folder = save_adapters(tmp_path, model, params)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_tensors(folder / ADAPTER_WEIGHTS, lambda tensors: tensors[name].__setitem__((0, 0), np.nan))
    with pytest.raises(ValueError, match=re.escape(f"tensor '{name}' holds nan at [0, 0]")):
        load_adapters(folder, model, params)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("r", (0, -1, 2.0, "2", True, None, [2], 10**9)),
        ("lora_alpha", (0, -1, "16", True, None, 1e300)),
        ("use_rslora", ("false", 0, 1)),
        ("bias", ("all", 0, ["none"])),
        ("init_lora_weights", ("pissa", 1, [True])),
        ("peft_type", ("LOHA", None, ["LORA"])),
    ],
)
def test_settings_of_adapters(key, values, tiny_config, lively_params, tmp_path):
    model = Transformer(tiny_config(lora=LoraConfig(rank=2, targets=("query",))))
    path = save_adapters(tmp_path, model, lively_params(model)) / ADAPTER_CONFIG
    settings = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps({**settings, key: value}))
        with pytest.raises(ValueError, match=rf"adapter_config\.json: {key}=.* must be "):
            load_adapters(tmp_path, model, {})


def test_score_models(tiny_config, lively_params, tmp_path):
    model = ScoreModel(Transformer(tiny_config()))
    folder = save_score_model(tmp_path / "model", model, lively_params(model))
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors["score.weight"].fill(np.inf))
    with pytest.raises(ValueError, match=r"tensor 'score\.weight' holds inf at \[0, 0\]"):
        load_score_model(folder)
    for statistics in ({"count": 2, "mean": "0.1", "squares": 1}, {"count": -1, "mean": 0, "squares": 1}):
        (folder / "score_statistics.json").write_text(json.dumps(statistics))
        with pytest.raises(ValueError, match=r"score_statistics\.json: (mean='0\.1'|count=-1) must be a number"):
            load_score_model(folder)


# ---------------------------------------------------------------- the index


@pytest.fixture
def sharded(checkpoint, tmp_path):
    """A checkpoint in several files, and how its index is changed: tensor → file."""
    transformer, params = from_pretrained(checkpoint("llama"))
    folder = save_pretrained(tmp_path / "org" / "model", transformer, params, max_shard_bytes=16_000)
    index = folder / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]

    def write(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return placed, write


@pytest.mark.parametrize(
    "shard",
    [
        *("../other.safetensors", "sub/other.safetensors", "/tmp/other.safetensors", "./model.safetensors", ".."),
        *("", "model.bin", None, 1, True, ["model.safetensors"], {}),
    ],
)
def test_a_shard_is_the_name_of_a_file_of_the_folder(shard, sharded):
    placed, write = sharded
    folder = write({**placed, QUERY: shard})
    with pytest.raises(ValueError, match=rf"index\.json: weight_map\['{re.escape(QUERY)}'\]=.* must be the name of"):
        SafetensorsSource(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors", 1])
def test_an_index_without_tensors(weight_map, sharded):
    with pytest.raises(ValueError, match=r"index\.json: weight_map=.* must be an object"):
        SafetensorsSource(sharded[1](weight_map))


def test_links_lead_out_of_the_folder_in_the_cache_of_the_hub_alone(sharded, tmp_path):
    placed, write = sharded
    folder, shard = write(placed), sorted(set(placed.values()))[0]
    snapshot = tmp_path / "models--org--model" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    (snapshot / shard).rename(blobs / "abcd")
    (snapshot / shard).symlink_to("../../blobs/abcd")
    SafetensorsSource(snapshot)
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    SafetensorsSource(link)
    (blobs / "abcd").rename(tmp_path / "outside.safetensors")
    (snapshot / shard).unlink()
    (snapshot / shard).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match=rf"{shard} is a link to .*outside\.safetensors: a shard must lie in"):
        SafetensorsSource(snapshot)


def test_a_tensor_in_two_files(sharded):
    placed, write = sharded
    folder = write(placed)
    first, second = sorted(set(placed.values()))[:2]
    name = next(name for name, shard in placed.items() if shard == first)
    twice = load_file(folder / first)[name]
    edit_tensors(folder / second, lambda tensors: tensors.__setitem__(name, twice))
    with pytest.raises(ValueError, match=rf"{second}: tensor '{re.escape(name)}' is in {first}, too"):
        SafetensorsSource(folder)


def test_what_is_no_plain_file_is_not_waited_for(checkpoint):
    path = checkpoint("llama") / "model.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"model\.safetensors is no plain file"):
        SafetensorsSource(path.parent)
