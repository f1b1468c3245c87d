"""Adapters in PEFT's format without PEFT: names and entries, the way there and back, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_llm.models.checkpoints.peft import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    load_adapters,
    load_lora_config,
    save_adapters,
)
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained, load_params, save_pretrained
from jaxrl_llm.models.config import LoraConfig, Params
from jaxrl_llm.models.lora import add_adapters, merge_adapters, split_adapters, without_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh, parameter_shardings

LORA = LoraConfig(rank=3, alpha=6.0, targets=("query", "value", "down"))
Adapted = tuple[Transformer, Params]


@pytest.fixture(scope="module")
def adapted(tiny_config: Callable[..., Any], lively_params: Callable[..., Params]) -> Adapted:
    model = Transformer(tiny_config(lora=LORA))
    return model, lively_params(model)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_files_are_as_peft_writes_them(adapted, tmp_path):
    model, params = adapted
    folder = save_adapters(tmp_path / "adapters", model, params, base_name="some/base")
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    prefix = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    places = {"self_attn.q_proj": "query", "self_attn.v_proj": "value", "mlp.down_proj": "down"}
    assert sorted(tensors) == sorted(
        prefix.format(layer, place, ab) for layer in "01" for place in places for ab in "AB"
    )
    for place, target in places.items():
        leaf = params["layers"]["mlp" if target == "down" else "attention"][target]
        for layer in (0, 1):
            np.testing.assert_array_equal(tensors[prefix.format(layer, place, "A")], leaf["lora_a"][layer])
            np.testing.assert_array_equal(tensors[prefix.format(layer, place, "B")], leaf["lora_b"][layer])
    assert json.loads((folder / ADAPTER_CONFIG).read_text()) == {
        "base_model_name_or_path": "some/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 3,
        "target_modules": ["down_proj", "q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


@pytest.mark.parametrize("lora", [LORA, LoraConfig(rank=2, alpha=0.5, use_rslora=True)], ids=["some", "all_rslora"])
def test_there_and_back(tiny_config, lively_params, tmp_path, lora):
    model = Transformer(tiny_config(lora=lora))
    params = lively_params(model)
    save_adapters(tmp_path, model, params)
    assert load_lora_config(tmp_path, model.base.config) == lora
    base = lively_params(model.base, seed=1)
    loaded = load_adapters(tmp_path, model, base)
    chex.assert_trees_all_equal(split_adapters(loaded)[0], split_adapters(params)[0])
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, without_adapters(loaded), base))


def test_home_folder(tiny_config, lively_params, tmp_path, monkeypatch):
    """Of adapters, and of a model that is saved."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = Transformer(tiny_config(lora=LORA))
    params = lively_params(model)
    assert save_adapters("~/adapters", model, params) == tmp_path / "adapters"
    assert load_lora_config("~/adapters", model.base.config) == LORA
    load_adapters("~/adapters", model, lively_params(model.base))
    assert save_pretrained("~/model", model.base, lively_params(model.base)) == tmp_path / "model"
    assert not (tmp_path / "~").exists()


def test_onto_a_mesh(adapted, tmp_path):
    model, params = adapted
    save_adapters(tmp_path, model, params)
    shardings = parameter_shardings(
        make_mesh(MeshConfig(fsdp=2, tensor=4)), model.logical_axes(), model.abstract_params()
    )
    placed = jax.device_put(params, shardings)
    loaded = load_adapters(tmp_path, model, without_adapters(placed), shardings)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, loaded, shardings))
    save_adapters(tmp_path / "again", model, loaded)
    assert (tmp_path / "again" / ADAPTER_WEIGHTS).read_bytes() == (tmp_path / ADAPTER_WEIGHTS).read_bytes()


def test_model_folders_hold_the_base_or_the_merged_model(adapted, tmp_path):
    """`load_params` reads a base for a model with adapters; `save_pretrained` merges them."""
    model, params = adapted
    merged = merge_adapters(params, model.config)
    folder = save_pretrained(tmp_path / "merged", model, params)
    plain, loaded = from_pretrained(folder)
    assert plain.config.lora is None
    chex.assert_trees_all_close(loaded, merged, rtol=1e-6, atol=0)
    again = load_params(folder, Transformer(dataclasses.replace(plain.config, lora=LORA)))
    chex.assert_trees_all_equal(again, loaded)


def test_only_folders_of_adapters_are_replaced(adapted, tmp_path):
    model, params = adapted
    folder = save_adapters(tmp_path / "adapters", model, params)
    with pytest.raises(ValueError, match="exists already"):
        save_adapters(folder, model, params)
    save_adapters(folder, model, params, overwrite=True)
    (folder / ADAPTER_CONFIG).unlink()
    with pytest.raises(ValueError, match="no folder of adapters"):
        save_adapters(folder, model, params, overwrite=True)
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapters(tmp_path / "new", model, without_adapters(params))
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapters(tmp_path / "new", model.base, params)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"something_new": 1}, "something_new=1"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, r"target_parameters=\['mlp.*for \w+, which has none"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"r": None}, "r=None must be a whole number"),
    ],
)
def test_other_kinds_are_refused(adapted, tmp_path, changes, message):
    model, params = adapted
    save_adapters(tmp_path, model, params)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_adapters(tmp_path, model, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, r"\.lora_A\.weight has shape \[3, 32\], the configuration says \[4, 32\]"),
        ({"lora_alpha": 12}, "alpha is 12.0 there and 6.0"),
        ({"use_rslora": True}, "use_rslora is True there"),
    ],
)
def test_adapters_of_another_configuration(adapted, tmp_path, changes, message):
    model, params = adapted
    save_adapters(tmp_path, model, params)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_adapters(tmp_path, model, params)


def test_adapters_of_another_model(adapted, tmp_path):
    model, params = adapted
    save_adapters(tmp_path, model, params)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

    def loading(changed: dict[str, np.ndarray]) -> Params:
        save_file(changed, tmp_path / ADAPTER_WEIGHTS)
        return load_adapters(tmp_path, model, params)

    with pytest.raises(ValueError, match=r"1 missing tensors: .*layers\.1\.self_attn\.q_proj\.lora_A"):
        loading({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"1 unexpected tensors: .*lm_head"):
        loading({**tensors, "base_model.model.lm_head.lora_A.weight": tensors[name]})
    with pytest.raises(ValueError, match=r"shape \[3, 31\], the configuration says \[3, 32\]"):
        loading({**tensors, name: np.ascontiguousarray(tensors[name][:, :31])})
    with pytest.raises(ValueError, match="no adapters of this model; its first tensor is transformer"):
        loading({"transformer.h.0.lora_A": tensors[name]})
    with pytest.raises(ValueError, match=r"set ModelConfig\.lora"):
        load_adapters(tmp_path, model.base, params)


def test_adding_replaces_those_that_are_there(adapted):
    model, params = adapted
    fresh = add_adapters(params, model, jax.random.key(0))
    assert not np.any(fresh["layers"]["mlp"]["down"]["lora_b"])
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
