"""Hugging Face folders: reading by slice, errors, and export."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_llm.models.checkpoints import locate as locate_module
from jaxrl_llm.models.checkpoints import pretrained
from jaxrl_llm.models.checkpoints.hf import SafetensorsSource
from jaxrl_llm.models.checkpoints.locate import locate
from jaxrl_llm.models.checkpoints.pretrained import (
    from_pretrained,
    load_config,
    load_generation_config,
    load_params,
    save_pretrained,
)
from jaxrl_llm.models.checkpoints.weights import load_weights
from jaxrl_llm.models.families import PHI3, QWEN3, family_of
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import parameter_shardings

CASES = sorted(path.stem for path in (Path(__file__).parents[1] / "golden").glob("*.npz"))


def write_shards(folder, tensors, parts=3):
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    placed = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        save_file({name: tensors[name] for name in names[part::parts]}, folder / file)
        placed |= dict.fromkeys(names[part::parts], file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return placed


# ---------------------------------------------------------------- reading


def test_layers_are_stacked(checkpoint, golden_tensors):
    _, params = from_pretrained(checkpoint("qwen3"))
    tensors = golden_tensors("qwen3")
    query = np.stack([tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in range(2)])
    np.testing.assert_array_equal(params["layers"]["attention"]["query"]["weight"], query)
    norm = np.stack([tensors[f"model.layers.{layer}.self_attn.k_norm.weight"] for layer in range(2)])
    np.testing.assert_array_equal(params["layers"]["attention"]["key_norm"]["scale"], norm)
    np.testing.assert_array_equal(params["embed"]["weight"], tensors["model.embed_tokens.weight"])


def test_sharded_files_are_read(checkpoint, golden_tensors):
    _, whole = from_pretrained(checkpoint("llama"))
    folder = checkpoint("llama")
    write_shards(folder, golden_tensors("llama"))
    chex.assert_trees_all_equal(from_pretrained(folder)[1], whole)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_values_are_cast(stored, param_dtype, checkpoint, golden_tensors):
    tensors = {name: value.astype(stored) for name, value in golden_tensors("llama").items()}
    transformer, params = from_pretrained(checkpoint("llama", tensors=tensors), param_dtype=param_dtype)
    assert transformer.config.param_dtype == param_dtype
    expected = tensors["model.embed_tokens.weight"].astype(param_dtype)
    assert params["embed"]["weight"].dtype == param_dtype
    np.testing.assert_array_equal(params["embed"]["weight"], expected)


def test_sharded_arrays_hold_the_same_values(checkpoint, mesh):
    folder = checkpoint("llama")

    def shardings(transformer):
        return parameter_shardings(mesh, transformer.logical_axes(), transformer.abstract_params())

    _, whole = from_pretrained(folder)
    transformer, params = from_pretrained(folder, shardings=shardings)
    chex.assert_trees_all_equal(params, whole)
    jax.tree.map(
        lambda array, place: array.sharding == place or pytest.fail(str(place)),
        params,
        shardings(transformer),
    )
    assert params["layers"]["mlp"]["gate"]["weight"].addressable_shards[0].data.shape == (2, 28, 16)
    chex.assert_trees_all_equal(load_params(folder, transformer, shardings(transformer)), whole)


@pytest.mark.parametrize(
    ("case", "family", "tensor", "pieces"),
    [
        ("qwen3", QWEN3, "q_proj", [48 * 32 // 4] * 4),
        ("phi3", PHI3, "qkv_proj", [32 * 32 // 4] * 12),  # three parameters
    ],
)
def test_only_the_slices_of_the_devices_are_read(case, family, tensor, pieces, checkpoint, mesh):
    """Each value is read once, in pieces no larger than a device's share, though two devices hold each."""
    folder = checkpoint(case)
    source = SafetensorsSource(folder)
    transformer = Transformer(load_config(folder))
    shardings = parameter_shardings(mesh, transformer.logical_axes(), transformer.abstract_params())
    read = {}

    class Recorder:
        shapes = source.shapes

        def read(self, name, index):
            piece = source.read(name, index)
            read.setdefault(name, []).append(piece.size)
            return piece

    load_weights(Recorder(), family.tensor_names, transformer, shardings, where="test")
    assert {name: sum(sizes) for name, sizes in read.items()} == {
        name: int(np.prod(shape)) for name, shape in source.shapes.items()
    }
    assert read[f"model.layers.0.self_attn.{tensor}.weight"] == pieces


def test_loaded_parameters_can_be_donated(checkpoint):
    _, params = from_pretrained(checkpoint("llama"))
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(params)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"])
def test_harmless_tensors_are_ignored(name, checkpoint, golden_tensors):
    tensors = golden_tensors("llama_tied_mha")
    extra = {name: tensors["model.embed_tokens.weight"]}
    _, params = from_pretrained(checkpoint("llama_tied_mha", tensors={**tensors, **extra}))
    assert "lm_head" not in params


# ---------------------------------------------------------------- errors


def test_tied_head_that_differs_is_refused(checkpoint, golden_tensors):
    tensors = golden_tensors("llama_tied_mha")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][-1, -1] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        from_pretrained(checkpoint("llama_tied_mha", tensors=tensors))


def test_missing_unexpected_and_misshapen_tensors_are_all_named(checkpoint, golden_tensors):
    tensors = golden_tensors("llama")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    with pytest.raises(ValueError) as error:
        from_pretrained(checkpoint("llama", tensors=tensors))
    message = str(error.value)
    assert "1 missing tensors: model.layers.1.mlp.up_proj.weight" in message
    assert "1 unexpected tensors: model.layers.0.self_attn.q_norm.weight" in message
    assert "model.norm.weight has shape [31], the configuration says [32]" in message
    assert "llama_checkpoint" in message


def test_missing_head_suggests_tying(checkpoint, golden_tensors):
    tensors = golden_tensors("llama")
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight.*tie_word_embeddings"):
        from_pretrained(checkpoint("llama", tensors=tensors))


def test_too_few_layers_in_the_configuration(checkpoint):
    with pytest.raises(ValueError, match=r"9 unexpected tensors: model\.layers\.1.* and 3 more"):
        from_pretrained(checkpoint("llama", config={"num_hidden_layers": 1}))


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_file(keep, checkpoint):
    folder = checkpoint("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt"):
        from_pretrained(folder)


def test_missing_shard_and_wrong_index(checkpoint, golden_tensors):
    folder = checkpoint("llama")
    placed = write_shards(folder, golden_tensors("llama"))
    assert placed["model.norm.weight"] != placed["lm_head.weight"]
    for name in ("other", "model.norm.weight"):
        index = {"weight_map": {**placed, name: placed["lm_head.weight"]}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=rf"00001-of-00003\.safetensors has no tensor '{name}'"):
            from_pretrained(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors is missing.*incomplete"):
        from_pretrained(folder)


def test_quantised_tensors_are_refused(checkpoint, golden_tensors):
    tensors = {**golden_tensors("llama"), "model.norm.weight": np.ones(32, np.int8)}
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is I8"):
        from_pretrained(checkpoint("llama", tensors=tensors))


def test_folder_without_weights_or_config(checkpoint, tmp_path):
    folder = checkpoint("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model\.safetensors.*pytorch_model\.bin: pickled"):
        from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        from_pretrained(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["./missing", "/missing/model", "missing.gguf", "org/model.gguf", "~/missing", "missing"]
)
def test_missing_local_path_does_not_reach_for_the_network(name, monkeypatch):
    monkeypatch.setattr(locate_module, "_download", lambda *_, **__: pytest.fail("network"))
    with pytest.raises(ValueError, match="does not exist"):
        from_pretrained(name)


def test_misspelt_path_below_an_existing_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(locate_module, "_download", lambda *_, **__: pytest.fail("network"))
    with pytest.raises(ValueError, match="folder 'models' does"):
        locate("models/smollm")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match="neither a model folder nor"):
        locate(tmp_path / "weights.bin")


def test_hub_id_is_downloaded(checkpoint, monkeypatch):
    import huggingface_hub

    folder, asked = checkpoint("llama"), []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    from_pretrained("org/model", revision="main")
    assert asked[0][0] == "org/model" and asked[0][1]["revision"] == "main"
    assert "*.safetensors" in asked[0][1]["allow_patterns"]
    load_config("org/model")
    assert "*.safetensors" not in asked[-1][1]["allow_patterns"]

    def offline(name, **options):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"org/model is no local folder.*offline"):
        from_pretrained("org/model")


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_exact(case, checkpoint, golden_tensors, tmp_path):
    transformer, params = from_pretrained(checkpoint(case))
    folder = save_pretrained(tmp_path / "export", transformer, params)
    exported, original = load_file(folder / "model.safetensors"), golden_tensors(case)
    assert exported.keys() == original.keys()
    for name, value in original.items():
        assert exported[name].dtype == np.float32
        np.testing.assert_array_equal(exported[name].view(np.uint32), value.view(np.uint32))
    assert load_config(folder) == transformer.config
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [family_of(config).architecture]
    assert config["eos_token_id"] is None and config["dtype"] == "float32"


def test_round_trip_of_random_parameters_in_bfloat16(checkpoint, tmp_path):
    config = load_config(checkpoint("qwen3"))
    transformer = Transformer(pretrained.dataclasses.replace(config, param_dtype="bfloat16"))
    params = jax.jit(transformer.init)(jax.random.key(3))
    folder = save_pretrained(tmp_path / "export", transformer, params)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == ml_dtypes.bfloat16
    chex.assert_trees_all_equal(from_pretrained(folder, param_dtype="bfloat16")[1], params)


@pytest.mark.parametrize("case", ["llama", "phi3"])
def test_large_models_are_split_and_sharded_parameters_gathered(case, checkpoint, tmp_path, mesh):
    def shardings(transformer):
        return parameter_shardings(mesh, transformer.logical_axes(), transformer.abstract_params())

    transformer, params = from_pretrained(checkpoint(case), shardings=shardings)
    folder = save_pretrained(tmp_path / "export", transformer, params, max_shard_bytes=16_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [sum(value.nbytes for value in load_file(folder / file).values()) for file in files]
    assert max(sizes) <= 16_000 and sum(sizes) == index["metadata"]["total_size"]
    chex.assert_trees_all_equal(from_pretrained(folder)[1], params)


def test_generation_config_is_written_and_read(checkpoint, tmp_path):
    transformer, params = from_pretrained(checkpoint("llama"))
    given = {"eos_token_id": [2, 5], "pad_token_id": 0, "temperature": 0.7}
    folder = save_pretrained(tmp_path / "export", transformer, params, generation_config=given)
    assert load_generation_config(folder) == given
    (folder / "generation_config.json").unlink()
    assert load_generation_config(folder) == {"eos_token_id": [2, 5], "pad_token_id": 0}


def test_existing_folders_are_safe(checkpoint, tmp_path):
    transformer, params = from_pretrained(checkpoint("llama"))
    folder = tmp_path / "export"
    folder.mkdir()
    save_pretrained(folder, transformer, params)  # empty: nothing to lose
    with pytest.raises(ValueError, match="overwrite=True"):
        save_pretrained(folder, transformer, params)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    save_pretrained(folder, transformer, doubled, overwrite=True)
    chex.assert_trees_all_equal(from_pretrained(folder)[1], doubled)

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").touch()
    with pytest.raises(ValueError, match="no model folder"):
        save_pretrained(other, transformer, params, overwrite=True)
    assert (other / "chapter.tex").exists()


def test_failed_export_leaves_the_old_folder_and_no_litter(checkpoint, tmp_path):
    transformer, params = from_pretrained(checkpoint("llama"))
    folder = save_pretrained(tmp_path / "export", transformer, params)

    class Broken:
        def save_pretrained(self, folder):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        save_pretrained(folder, transformer, jax.tree.map(jnp.zeros_like, params), tokenizer=Broken(), overwrite=True)
    chex.assert_trees_all_equal(from_pretrained(folder)[1], params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "llama_checkpoint"]


_PROCESS = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
port, rank, source, target = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained, save_pretrained
from jaxrl_llm.sharding import MeshConfig, make_mesh, parameter_shardings
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
transformer, params = from_pretrained(
    source, shardings=lambda t: parameter_shardings(mesh, t.logical_axes(), t.abstract_params())
)
assert not params["embed"]["weight"].is_fully_addressable
save_pretrained(target, transformer, params, max_shard_bytes=16_000)
try:
    save_pretrained(target, transformer, params)
except ValueError as error:
    print("refused", error)
"""


def test_two_processes_load_and_save(checkpoint, tmp_path):
    """Neither process holds all parameters; process 0 writes all of them; both learn of a refusal."""
    folder = checkpoint("llama")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    arguments = [port, "{rank}", str(folder), str(tmp_path / "export")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, *(argument.format(rank=rank) for argument in arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all("refused" in output for output in outputs)
    chex.assert_trees_all_equal(from_pretrained(tmp_path / "export")[1], from_pretrained(folder)[1])
