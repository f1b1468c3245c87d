"""Teachers are refused by name before anything is computed, and known again by a run that goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import chex
import jax
import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.cli import make_trainer, run
from jaxrl_llm.config import DataConfig, DistillationExperiment
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.on_policy import Trainer
from jaxrl_llm.training.run.metrics import comparable_metrics
from jaxrl_llm.training.teachers import Teacher

ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def make(tiny: ModuleType, tmp_path: Path):
    """A trainer without rewards; the teachers have one layer and three."""

    def teacher(name: str, layers: int, tokenizer: CharTokenizer | None = None, vocab: int | None = None) -> Teacher:
        tokenizer = tokenizer or tiny.TOKENIZER
        sizes = tiny.SIZES | {"num_layers": layers, "vocab_size": vocab or len(tokenizer)}
        model = Transformer(ModelConfig(**sizes))
        return Teacher(name, model, jax.jit(model.init)(jax.random.key(layers)), tokenizer)

    def make(folder: str = "run", *, teachers: Any = None, steps: int = 2, **changes: Any) -> Trainer:
        given = {"algorithm": Distillation(), "rewards": (), "update": UpdateConfig(), "evaluation": EvaluationConfig()}
        config = dataclasses.replace(tiny.CONFIG, run_dir=str(tmp_path / folder), **(given | changes))
        training = dataclasses.replace(config.training, steps=steps, checkpoint_every=1)
        config = dataclasses.replace(config, training=training)
        if teachers is None:
            teachers = [teacher("low", 1), teacher("high", 3)]
        rows = {"train_rows": tiny.TRAIN_ROWS, "eval_rows": tiny.EVAL_ROWS}
        parts = {"eval_rewards": RewardSum((tiny.shared_characters,))} if config.evaluation.every else {}
        return make_trainer(config, tiny.make_policy(ONE_DEVICE), ONE_DEVICE, teachers=teachers, **rows, **parts)

    make.teacher = teacher
    return make


def programs(trainer: Trainer) -> dict[str, int]:
    return {name: count for name, count in trainer.compilations.counts.items() if name != "_checksums"}


def test_student_and_teachers_are_one_program_and_go_on(make) -> None:
    whole = make("whole")
    whole.run()
    assert programs(whole) == {"iteration": 1}
    lines = comparable_metrics(whole.setup.folder / "metrics.jsonl")
    assert {"distillation/divergence", "distillation/low", "distillation/high", "entropy"} <= lines[-1].keys()
    assert not any("reward" in name for name in lines[-1])
    make("cut", steps=1).run()
    resumed = make("cut", resume=True)
    resumed.run()
    chex.assert_trees_all_equal(whole.state.params, resumed.state.params)
    with pytest.raises(ValueError, match="its reference or the base of its adapters, is another one now"):
        make("whole", resume=True, steps=3, teachers=[make.teacher("low", 1), make.teacher("high", 2)])


def test_with_rewards_they_are_reported(make, tiny: ModuleType) -> None:
    trainer = make(rewards=(tiny.shared_characters,), steps=1)
    trainer.run()
    assert programs(trainer) == {"sample": 1, "update_step": 1}
    assert "rewards/shared_characters/mean" in comparable_metrics(trainer.setup.folder / "metrics.jsonl")[-1]


def test_a_teacher_with_another_tokenizer_is_refused_by_name(make, tiny: ModuleType) -> None:
    turned = CharTokenizer("0123456789+*-=")
    with pytest.raises(
        ValueError,
        match=r"the teacher 'odd' has another tokenizer \(CharTokenizer, 16 tokens\) than the policy \(CharTokenizer, "
        r"16 tokens\): token 13 is '\*' there and '-' here\. Distillation compares",
    ):
        make(teachers=[make.teacher("odd", 1, turned)])
    with pytest.raises(ValueError, match="the teacher 'short' has 12 tokens in its head, and the tokenizer 16"):
        make(teachers=[make.teacher("short", 1, vocab=12)])


def test_teachers_that_are_missing_or_not_read_are_told(make) -> None:
    with pytest.raises(ValueError, match="Distillation learns from teachers: pass teachers="):
        make(teachers=[])
    with pytest.raises(ValueError, match="several teachers are named low: give each its own name"):
        make(teachers=[make.teacher("low", 1), make.teacher("low", 2)])
    with pytest.raises(ValueError, match=r"algorithm.weights=\(1.0,\) are 1 for 2 teachers"):
        make(algorithm=Distillation(weights=(1.0,)))
    from jaxrl_llm.algorithms.policy_gradient.presets import dapo

    with pytest.raises(ValueError, match="GroupAdvantage has no teachers: leave teachers= out"):
        make(algorithm=dapo(), rewards=(lambda completions, **_: [0.0] * len(completions),))


def test_a_checkpoint_learns_from_others(tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As an experiment's last line does it; another tokenizer is told before weights are read."""
    checkpoint = tiny.save_checkpoint(tmp_path / "student")
    teacher = tiny.save_checkpoint(tmp_path / "teacher")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What is 1 + 1?"}\n' * 4)
    config = DistillationExperiment(name="distilled", data=DataConfig(max_prompt_length=64))
    assert config.algorithm == Distillation()
    flags = [f"--model.path={checkpoint}", f"--data.train={rows}", "--training.steps=1", "--sampling.max-tokens=4"]
    flags += ["--training.prompts-per-step=4", "--training.samples-per-prompt=2", f"--run-dir={tmp_path / 'run'}"]
    result = run(config, [*flags, "--teachers", str(teacher), str(teacher)])
    assert result.step == 1
    line = comparable_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert line["distillation/teacher"] == line["distillation/teacher#2"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(SystemExit) as ended:
        run(config, [*flags, f"--run-dir={tmp_path / 'other'}"])
    assert ended.value.code == 2
    assert "no teacher given: pass --teachers" in capsys.readouterr().err
