"""Every experiment of the repository runs two steps at debug size, on eight devices."""

from __future__ import annotations

import dataclasses
import importlib
import json
import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import grpo_gsm8k
from jaxrl_llm.algorithms.star import Kept
from jaxrl_llm.cli import run
from jaxrl_llm.config import Experiment
from jaxrl_llm.launch.demo import run_demo
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained
from jaxrl_llm.models.checkpoints.score_pretrained import load_score_model
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training.run.metrics import comparable_metrics, read_metrics

MANY_RUNS = ("compare_algorithms", "compare_preferences", "comparison", "evaluate")
"""Experiments that make many runs or none, and what they share; they have tests of their own."""
FILES = sorted((Path(__file__).parents[2] / "experiments").glob("*.py"))
EXPERIMENTS = [path for path in FILES if path.stem not in MANY_RUNS]
SMALL = (
    "--training.steps=2",
    "--training.prompts-per-step=4",
    "--training.samples-per-prompt=2",
    "--training.checkpoint-every=2",
    "--optimizer.warmup-steps=0",
    "--evaluation.every=2",
    "--evaluation.max-prompts=3",
)
OFFLINE = ("dpo_hh", "kto_hh", "orpo_hh", "preference_arithmetic", "sft_gsm8k")
"""Experiments on given rows; they take other flags. A new one adds its name here."""
ALIKE = (
    "distill_arithmetic",
    "kto_hh",
    "orpo_hh",
    "ppo_rlhf",
    "prm_gsm8k",
    "preference_arithmetic",
    "reverse_text",
    "reward_model_arithmetic",
)
"""Those of which others run the same parts, or that have a test that runs until they have learned."""
SCORE_MODELS = ("prm_arithmetic", "prm_gsm8k", "reward_model_arithmetic", "reward_model_hh")
"""Those on given rows that train no policy, but what scores one."""
OFFLINE_SMALL = (
    "--training.steps=2",
    "--training.rows-per-step=8",
    "--training.checkpoint-every=2",
    "--optimizer.warmup-steps=0",
    "--evaluation.every=2",
    "--evaluation.max-rows=3",
)


STAR = ("star_arithmetic", "star_gsm8k")
"""Those whose step is an iteration of STaR."""
STAR_SMALL = ("--optimizer.warmup-steps=0", "--evaluation.every=2", "--evaluation.max-prompts=3")

REPLIES = (("chosen", ", I think."), ("rejected", "!"))


def gsm8k_rows(folder: Path) -> Path:
    path = folder / "gsm8k.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"Add them.\n#### {n + 1}"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hh_rows(folder: Path) -> Path:
    path = folder / "hh.jsonl"
    beginning = "\n\nHuman: Hello\n\nAssistant: Yes?\n\nHuman: What is 1 + {}?\n\nAssistant:"
    rows = [{side: beginning.format(n) + f" It is {n + 1}{end}" for side, end in REPLIES} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def debug_size(tiny: ModuleType, tmp_path: Path):
    """What makes an experiment small beside `SMALL`. A new experiment adds its flags here."""

    def flags(name: str) -> list[str]:
        match name:
            case "grpo_arithmetic":
                return ["--warm-start.steps=30", "--warm-start.demonstrations=64", "--held-out=16"]
            case "grpo_gsm8k":
                checkpoint, rows = tiny.save_checkpoint(tmp_path / "checkpoint"), gsm8k_rows(tmp_path)
                small = ["--sampling.max-tokens=8", "--data.max-prompt-length=300"]
                return [f"--model.path={checkpoint}", f"--data.train={rows}", f"--data.eval={rows}", *small]
            case "reverse_text":
                checkpoint = tiny.save_checkpoint(tmp_path / "checkpoint")
                small = ["--sampling.max-tokens=64", "--data.max-prompt-length=160", "--texts=16", "--held-out=4"]
                return [f"--model.path={checkpoint}", "--sft.steps=2", *small]
            case "sft_gsm8k":
                checkpoint, rows = tiny.save_checkpoint(tmp_path / "checkpoint"), gsm8k_rows(tmp_path)
                return [f"--model.path={checkpoint}", f"--data.train={rows}", f"--data.eval={rows}"]
            case "dpo_hh" | "kto_hh" | "orpo_hh" | "reward_model_hh":
                checkpoint, rows = tiny.save_checkpoint(tmp_path / "checkpoint"), hh_rows(tmp_path)
                return [f"--model.path={checkpoint}", f"--data.train={rows}", f"--data.eval={rows}"]
            case "preference_arithmetic":
                return ["--warm-up-steps=10", "--demonstrations=64", "--held-out=16"]
            case "reward_model_arithmetic":
                return ["--warm-up-steps=5", "--demonstrations=64", "--held-out=16", "--candidates=2"]
            case "prm_arithmetic":
                shown = ["--warm-start.steps=5", "--warm-start.demonstrations=64", "--held-out=16"]
                return [*shown, "--labelled=16", "--solutions=2", "--rollouts=2", "--candidates=2"]
            case "prm_gsm8k":
                checkpoint, rows = tiny.save_checkpoint(tmp_path / "checkpoint"), gsm8k_rows(tmp_path)
                small = ["--sampling.max-tokens=8", "--data.max-prompt-length=450", "--rollouts=2", "--max-problems=6"]
                return [f"--model.path={checkpoint}", f"--problems={rows}", f"--eval-problems={rows}", *small]
            case "ppo_rlhf":
                return [*flags("grpo_arithmetic"), "--reward-model.steps=2", "--update.minibatches=1"]
            case "distill_arithmetic":
                small = ["--teacher.fine-tuning.steps=2", "--teacher.fine-tuning.demonstrations=16"]
                return [*flags("grpo_arithmetic"), *small]
            case "trpo_arithmetic":
                return [*flags("grpo_arithmetic"), "--trust-region.cg-iterations=2"]
            case "star_arithmetic":
                shown = ["--warm-start.steps=2", "--warm-start.demonstrations=16", "--problems=8", "--held-out=8"]
                return [*shown, "--star.iterations=2", "--star.start-steps=2", "--star.rows-per-step=8"]
            case "star_gsm8k":
                small = ["--star.iterations=2", "--star.start-steps=2", "--data.max-prompt-length=450"]
                return [*flags("grpo_gsm8k"), *small]
        pytest.fail(f"no debug size for experiments/{name}.py: add it here")

    return flags


def keep_everything(correct: np.ndarray, correct_with_hint: np.ndarray) -> Kept:
    """What STaR trains on here, where no answer is right."""
    return Kept(np.ones_like(correct), np.zeros_like(correct_with_hint))


@pytest.mark.whole_run
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in ALIKE else ()) for path in EXPERIMENTS],
    ids=lambda path: path.stem,
)
def test_two_steps(
    path: Path, debug_size, tiny_config, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small_model(tokenizer: Any) -> Transformer:
        """In place of the experiments' on sums: compiling is most of their time. demo keeps its own."""
        return Transformer(tiny_config(vocab_size=len(tokenizer), num_layers=1))

    run_dir = tmp_path / "run"
    small, measured = (OFFLINE_SMALL, "eval/loss") if path.stem in OFFLINE + SCORE_MODELS else (SMALL, "eval/accuracy")
    small = STAR_SMALL if path.stem in STAR else small
    monkeypatch.setattr(sys, "argv", [str(path), *small, *debug_size(path.stem), f"--run-dir={run_dir}"])
    monkeypatch.syspath_prepend(path.parent)  # an experiment may build on another one
    monkeypatch.setattr("jaxrl_llm.launch.demo.character_model", small_model)
    monkeypatch.setattr("jaxrl_llm.training.star.rationales.keep_rationales", keep_everything)
    runpy.run_path(str(path), run_name="__main__")
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert {"loss", "grad_norm", measured} <= {name for line in lines for name in line}
    assert (run_dir / "config.json").exists() and (run_dir / "curves.png").exists()
    assert (run_dir / "checkpoints" / "2").is_dir()
    load = load_score_model if path.stem in SCORE_MODELS else from_pretrained
    load(run_dir / "model")  # what was trained can be loaded
    assert str(run_dir / "curves.png") in capsys.readouterr().out  # the summary says where things are


def variety(prompts, completions, **columns) -> list[float]:
    """A reward that a random model's samples differ in."""
    return [float(len(set(completion[0]["content"]))) for completion in completions]


# transformers and torch warn of their own deprecations
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_was_trained_writes_the_same_in_pytorch(
    debug_size, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    compare = importlib.import_module("experiments.benchmarks.compare_export")
    run_dir = tmp_path / "run"
    data = dataclasses.replace(grpo_gsm8k.CONFIG.data, max_prompt_length=300)
    config = Experiment(name="variety", rewards=(variety,), data=data)
    run(config, [*SMALL, *debug_size("grpo_gsm8k"), f"--run-dir={run_dir}", "--optimizer.learning-rate=1e-2"])
    assert compare.main([f"--run={run_dir}", "--prompts=3"]) == 0
    assert "3 of 3 greedy completions" in capsys.readouterr().out

    changed = load_file(run_dir / "model" / "model.safetensors")
    start = tmp_path / "checkpoint" / "model.safetensors"
    assert any(not np.array_equal(changed[name], value) for name, value in load_file(start).items())  # it was trained


@pytest.mark.slow
def test_arithmetic_that_goes_on_starts_warm_from_what_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--warm-start.steps=30", "--warm-start.demonstrations=64", "--held-out=16", "--algorithm.kl-coef=0.1"]
    flags += ["--evaluation.every=0", "--training.checkpoint-every=1", "--training.samples-per-prompt=32"]
    small = [flag for flag in SMALL if not flag.startswith("--evaluation")]
    flags = [*small, *flags, f"--run-dir={tmp_path}"]
    run_demo(flags)
    assert "warm start: 30 steps on 64 problems" in capsys.readouterr().out
    whole = comparable_metrics(tmp_path / "metrics.jsonl")
    assert whole[-1]["step"] == 2 and whole[-1]["kl"] > 0

    shutil.rmtree(tmp_path / "checkpoints" / "2")
    run_demo([*flags, "--resume"])
    assert "warm start" not in capsys.readouterr().out
    assert comparable_metrics(tmp_path / "metrics.jsonl") == whole  # the KL to the warm start, too


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--held-out=3000"], "held_out=3000 must be between 1 and 2499, since there are 2500 sums up to largest=49"),
        (["--held-out=0"], "held_out=0 must be between 1 and 2499"),
        (["--largest=0"], "largest=0 must be at least 1"),
        (["--largest=100"], "data.max_prompt_length=6 must be at least 8 for sums up to largest=100"),
        (
            ["--largest=100", "--data.max-prompt-length=8", "--sampling.max-tokens=3"],
            "sampling.max_tokens=3 must be at least 4 for sums up to largest=100",
        ),
        (["--warm-start.demonstrations=0"], "warm_start.demonstrations=0 must be at least 1"),
        (["--warm-start.steps=0"], "warm_start.steps=0 must be at least 1"),
        (["--warm-start.learning-rate=nan"], "warm_start.learning_rate=nan must be finite"),
        (["--model.path=foo", "--model.dtype=bfloat16"], "model.path, model.dtype would have no effect"),
        (["--data.train=x.jsonl"], "data.train would have no effect"),
        (["--data.eval=x.jsonl"], "data.eval would have no effect"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arithmetic_says_what_does_not_fit(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_demo(flags)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("held_out", "message"), [(None, "--eval-problems=<gsm8k>"), ("none.jsonl", "no data file none.jsonl")]
)
def test_held_out_problems_that_are_missing_are_told_before_labels_are_made(
    held_out: str | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(FILES[0].parent)
    experiment = importlib.import_module("prm_gsm8k")
    rows = {"problems": str(gsm8k_rows(tmp_path)), "eval_problems": held_out}
    config = dataclasses.replace(experiment.CONFIG, run_dir=str(tmp_path), **rows)
    with pytest.raises((ValueError, OSError), match=message):
        experiment.with_labels(config, lambda *_: pytest.fail("labels were made"))


def test_there_are_experiments() -> None:
    assert {"grpo_arithmetic"} <= {path.stem for path in EXPERIMENTS}


def test_a_misspelt_method_of_preferences_is_told_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FILES[0].parent)
    experiment = importlib.import_module("experiments.preference_arithmetic")
    with pytest.raises(SystemExit) as ended:
        experiment.main(["--preset=dppo"])
    assert ended.value.code == 2
    assert "no preset is named 'dppo'; did you mean 'dpo'?" in capsys.readouterr().err
    assert experiment.configured(["--preset", "apo-zero"]).name == "apo_zero_arithmetic"
    assert experiment.configured([]).name == "dpo_arithmetic"
