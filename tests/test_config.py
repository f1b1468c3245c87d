from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.policy_gradient.estimators import GroupAdvantage
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.config import DataConfig, Experiment, ModelSource, OfflineDataConfig, OfflineExperiment, flatten
from jaxrl_llm.data.unpaired import UnpairedFormat
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.rewards import gsm8k_reward
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.on_policy import TrainingConfig
from jaxrl_llm.training.run.distributed import ClusterConfig
from jaxrl_llm.training.run.metrics import WandbConfig

CONFIG = Experiment(name="test", rewards=(gsm8k_reward,), reward_weights=(2.0,))


def test_flatten_names_functions_and_is_json() -> None:
    flat = flatten(CONFIG)
    assert flat["rewards"] == ["gsm8k_reward"]
    assert flat["reward_weights"] == [2.0]
    assert flat["algorithm.advantage.scale"] == "group"
    assert flat["data.format.prompt_column"] == "prompt"
    assert json.loads(json.dumps(flat)) == flat
    leaves = [value for value in flat.values() if isinstance(value, dict)]
    assert leaves == []


def other(value: Any) -> Experiment:
    """The configuration with `value` in the field of its type."""
    field = next(f.name for f in dataclasses.fields(CONFIG) if isinstance(getattr(CONFIG, f.name), type(value)))
    return dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
    "changed",
    [
        dataclasses.replace(CONFIG, name="other", run_dir="elsewhere", resume=True, distributed=True),
        other(WandbConfig(project="p")),
        other(MeshConfig(data=2)),
        other(EvaluationConfig(every=3, samples=4)),
        other(DataConfig(train="moved.jsonl", eval="moved.jsonl")),
        other(ModelSource(remat="none", scan_layers=False)),
        other(ClusterConfig("host:1234", 2, 0)),
        other(SamplingConfig(slots=2, speculate="history", speculative_tokens=2)),
        other(UpdateConfig(micro_batches=4)),
        other(TrainingConfig(steps=500, checkpoint_every=1, keep_checkpoints=9, samples_every=1)),
    ],
)
def test_what_a_resumed_run_may_change(changed: Experiment) -> None:
    assert changed.settings() == CONFIG.settings()
    here, there = (dataclasses.replace(CONFIG, rewards=(place,)) for place in ("task.py:brief", "/moved/task.py:brief"))
    assert here.settings() == there.settings() != CONFIG.settings()
    assert flatten(changed) != flatten(CONFIG)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (dataclasses.replace(CONFIG, seed=1), "seed"),
        (dataclasses.replace(CONFIG, reward_weights=None), "reward_weights"),
        (other(PolicyGradient(advantage=GroupAdvantage(scale="none"))), "algorithm.advantage.scale"),
        (other(ModelSource(path="other")), "model.path"),
        (other(ModelSource(lora=LoraConfig(rank=4))), "model.lora.rank"),
        (other(ModelSource(adapters="folder")), "model.adapters"),
        (other(DataConfig(max_prompt_length=7)), "data.max_prompt_length"),
        (other(SamplingConfig(temperature=0.5)), "sampling.temperature"),
        (other(SamplingConfig(cache_dtype="int8")), "sampling.cache_dtype"),
        (other(UpdateConfig(epochs=2)), "update.epochs"),
        (other(OptimizerConfig(b2=0.5)), "optimizer.b2"),
        (other(TrainingConfig(prompts_per_step=9)), "training.prompts_per_step"),
    ],
)
def test_what_a_resumed_run_must_share(changed: Experiment, name: str) -> None:
    before, after = CONFIG.settings(), changed.settings()
    assert {key for key in before | after if before.get(key) != after.get(key)} == {name}


def test_steps_are_free_only_while_the_learning_rate_does_not_depend_on_them() -> None:
    cosine = other(OptimizerConfig(schedule="cosine"))
    assert "training.steps" not in CONFIG.settings()
    assert cosine.settings()["training.steps"] == 100


def test_fields_of_a_derived_experiment_count() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(Experiment):
        names: int = 3

    mine = Mine(name="mine", rewards=(gsm8k_reward,))
    assert mine.settings()["names"] == 3  # not taken for a part of `name`


def test_every_free_setting_exists() -> None:
    """A renamed field must not silently become one that blocks resuming."""
    from jaxrl_llm.config import _FREE

    unpaired = OfflineExperiment(name="offline", data=OfflineDataConfig(format=UnpairedFormat()))
    flat = flatten(CONFIG) | flatten(unpaired)
    for name in _FREE:
        assert any(key == name or key.startswith(f"{name}.") for key in flat), name
