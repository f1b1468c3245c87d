"""Checkpoints of runs as models: the parameters of that step, with all that the run itself says of its model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from jaxrl_llm.cli import load_policy
from jaxrl_llm.config import DataConfig, Experiment, ModelSource
from jaxrl_llm.launch.on_policy import make_trainer, start
from jaxrl_llm.models.checkpoints.pretrained import save_pretrained
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.on_policy import TrainingConfig

ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize(
    ("rank", "base_dtype", "sizes"), [(0, None, {"fsdp": 8}), (2, "int4", {"fsdp": 8})], ids=["all", "int4"]
)
def test_the_parameters_of_a_step(
    rank, base_dtype, sizes, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also of adapters, whose base, here of integers, no checkpoint holds, and onto another mesh."""
    monkeypatch.setitem(tiny.SIZES, "embed_dim", 64)
    checkpoint = tiny.save_checkpoint(tmp_path / "tiny")
    config = Experiment(
        name="run",
        rewards=(tiny.shared_characters,),
        model=ModelSource(
            str(checkpoint),
            base_dtype=base_dtype,
            lora=LoraConfig(rank=rank),
            template_arguments={"assistant": "a"},
        ),
        data=DataConfig(max_prompt_length=40),
        sampling=SamplingConfig(max_tokens=4),
        training=TrainingConfig(steps=1, prompts_per_step=4, samples_per_prompt=2, checkpoint_every=1),
        run_dir=str(tmp_path / "run"),
    )
    policy = load_policy(config, ONE_DEVICE)
    trainer = make_trainer(start(config), policy, ONE_DEVICE, train_rows=tiny.TRAIN_ROWS)
    trainer.run()
    saved = ModelSource(str(tmp_path / "run" / "checkpoints" / "1"))
    loaded = load_policy(saved, make_mesh(MeshConfig(**sizes)))
    assert loaded.model.config == policy.model.config
    assert loaded.stop_tokens == policy.stop_tokens
    changed = 0
    for ours, theirs, before in zip(
        *map(jax.tree.leaves, (loaded.params, trainer.state.params, policy.params)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        changed += not np.array_equal(ours, before)
    assert changed


def test_what_is_no_checkpoint_of_a_run_raises(tiny: ModuleType, tmp_path: Path):
    step = tmp_path / "checkpoints" / "7"
    source = ModelSource(str(step))
    with pytest.raises(ValueError, match=r"is a checkpoint of no run: there is no .*config.json"):
        load_policy(source, ONE_DEVICE)
    settings = {"model.path": None, "model.param_dtype": "float32", "model.adapters": None, "model.chat_template": None}
    lora = {"rank": 0, "alpha": 16.0, "targets": ["query"], "use_rslora": False}
    settings |= {f"model.lora.{name}": value for name, value in lora.items()}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="names none, and has none in model/"):
        load_policy(source, ONE_DEVICE)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"objective.part": "RewardModelObjective"}))
    with pytest.raises(
        ValueError, match=r"7 is a checkpoint of a model with a head of scores, .*/model, which its run"
    ):
        load_policy(source, ONE_DEVICE)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    policy = tiny.make_policy(ONE_DEVICE)
    save_pretrained(tmp_path / "model", policy.model, policy.params, tokenizer=policy.tokenizer)
    with pytest.raises(FileNotFoundError, match="no folder of checkpoints"):
        load_policy(source, ONE_DEVICE)
    step.mkdir(parents=True)
    shutil.rmtree(step)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_policy(source, ONE_DEVICE)
