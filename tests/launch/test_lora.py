"""Adapters from the command line: trained by flags, exported merged and alone, begun with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import chex
import jax
import numpy as np
import pytest

from jaxrl_llm import cli
from jaxrl_llm.config import DataConfig, Experiment, ModelSource
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.models.checkpoints.peft import save_adapters
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.models.lora import merge_adapters, without_adapters
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.on_policy import TrainingConfig

ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])
FLAGS = ["--model.lora.rank=2", "--model.lora.alpha=4", "--model.lora.targets", "query", "down"]


def length(prompts: list[Any], completions: list[Any]) -> list[float]:
    return [float(len(str(completion))) for completion in completions]


@pytest.fixture(scope="module")
def checkpoint(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("\n".join(json.dumps({"question": f"{n}+1?"}) for n in range(8)))
    return Experiment(
        name="test",
        rewards=(length,),
        model=ModelSource(path=str(checkpoint), remat="none"),
        data=DataConfig(train="train.jsonl", max_prompt_length=48, format=PromptFormat(prompt_column="question")),
        sampling=SamplingConfig(max_tokens=4),
        training=TrainingConfig(steps=1, prompts_per_step=8, samples_per_prompt=2, checkpoint_every=0),
        mesh=MeshConfig(fsdp=4, tensor=2),
        run_dir="run",
    )


def test_flags_say_which_adapters(config: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    lora = cli.parse(config, FLAGS).model.lora
    assert lora == LoraConfig(rank=2, alpha=4.0, targets=("query", "down"))
    model, params = cli.load_model(cli.parse(config, FLAGS).model, ONE_DEVICE)
    assert model.config.lora == lora
    plain, base = cli.load_model(config.model, ONE_DEVICE)
    assert plain.config.lora is None
    chex.assert_trees_all_equal(without_adapters(params), base)
    seeds = [cli.load_model(cli.parse(config, FLAGS).model, ONE_DEVICE, seed=seed)[1] for seed in (0, 1)]
    drawn = [tree["layers"]["mlp"]["down"]["lora_a"] for tree in (params, *seeds)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    for flag, message in (("--model.lora.rank=-1", "lora.rank=-1"), ("--model.lora.targets=head", "head")):
        with pytest.raises(SystemExit):
            cli.parse(config, [flag])
        assert message in capsys.readouterr().err


def test_a_run_exports_its_adapters_and_the_merged_model(
    config: Experiment, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = cli.run(config, FLAGS)
    assert "adapters" in capsys.readouterr().out
    written = json.loads(Path("run/config.json").read_text())
    assert (written["model.lora.rank"], written["model.lora.targets"]) == (2, ["query", "down"])
    assert json.loads(Path("run/adapters/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        checkpoint
    )
    begun = dataclasses.replace(config.model, adapters="run/adapters")
    model, params = cli.load_model(begun, ONE_DEVICE)
    chex.assert_trees_all_equal(params, jax.device_get(result.params))
    assert np.any(params["layers"]["mlp"]["down"]["lora_b"])
    merged = cli.load_model(dataclasses.replace(config.model, path="run/model"), ONE_DEVICE)[1]
    expected = merge_adapters(params, model.config)
    chex.assert_trees_all_close(merged, expected, rtol=1e-6, atol=1e-8)


def test_adapters_that_do_not_fit(config: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    model, params = cli.load_model(cli.parse(config, FLAGS).model, ONE_DEVICE)
    save_adapters("saved", model, params)
    for flags, message in (
        (["--model.adapters=nowhere"], "nowhere/adapter_config.json does not exist"),
        (["--model.adapters=saved", "--model.lora.rank=3"], "rank is 2 there and 3 in the model"),
        (
            ["--model.lora.rank=17"],
            "model.lora.rank=17 is more than the rank of any matrix of this model: give at most 16",
        ),
        (["--model.lora.rank=100000"], "model.lora.rank=100000 is more than the rank of any"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.run(config, flags)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
