"""Evaluation without training: what is decoded, counted, written, and refused before a model is loaded."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.cli import Policy, evaluate, generate, run_evaluation
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.launch import evaluation_command
from jaxrl_llm.launch.evaluation import COMPLETIONS, METRICS, Evaluation
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.compilation import CompilationCounter

ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])
SAMPLING = SamplingConfig(max_tokens=5)
ROWS = [{"prompt": f"{n}+{n % 3}=", "answer": str(n + n % 3)} for n in range(7)]


def even(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(map(str.isdigit, text)) % 2 == 0) for text in completions]


def length(completions: list[str], answer: list[str]) -> list[float | None]:
    return [None if right == "0" else float(len(text)) for text, right in zip(completions, answer, strict=True)]


@pytest.fixture(scope="module")
def policy(tiny: ModuleType) -> Policy:
    return tiny.make_policy(ONE_DEVICE)


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    lines = (folder / COMPLETIONS).read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((folder / METRICS).read_text())


def test_metrics_are_those_of_the_completions_that_are_written(policy, tmp_path):
    """Of seven prompts in batches of three, each once; recomputed from the file by their equations."""
    settings: dict[str, Any] = {"samples": 4, "ks": (1, 2, 4), "batch_size": 3, "mesh": ONE_DEVICE, "seed": 3}
    with CompilationCounter() as counter:
        found = evaluate(policy, ROWS, (even, length), SAMPLING, folder=tmp_path / "out", **settings)
    assert counter.counts == {"sample": 2}
    lines, told = read(tmp_path / "out")
    assert len(lines) == found.completions == 7 * 5
    assert sum(line["tokens"] for line in lines) == found.tokens
    assert {(line["kind"], line["row"], line["sample"]) for line in lines} == {
        *(("greedy", row, 0) for row in range(7)),
        *(("sampled", row, sample) for row in range(7) for sample in range(4)),
    }
    for line in lines:
        assert line["prompt"] == ROWS[line["row"]]["prompt"]
        assert line["columns"] == {"answer": ROWS[line["row"]]["answer"]}
        assert line["rewards"]["even"] == even([""], [line["completion"]])[0]
        assert line["rewards"]["length"] == length([line["completion"]], [line["columns"]["answer"]])[0]
        assert line["reward"] == line["rewards"]["even"] + (line["rewards"]["length"] or 0.0)

    def column(kind: str, read_one: Any) -> np.ndarray:
        rows = [[read_one(line) for line in lines if (line["kind"], line["row"]) == (kind, row)] for row in range(7)]
        return np.array(rows, np.float64)

    def of_prompts(values: list[float] | np.ndarray) -> tuple[float, float, int]:
        return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))), len(values)

    expected = {}
    for kind in ("greedy", "sampled"):
        solved = column(kind, lambda line: line["rewards"]["even"] >= 1)
        if kind == "greedy":
            expected["greedy/accuracy"] = of_prompts(solved.mean(axis=1))
        else:
            expected["sampled/mean@4"] = expected["sampled/pass@1"] = of_prompts(solved.mean(axis=1))
            pairs = [[row[a] or row[b] for a in range(4) for b in range(a)] for row in solved]
            expected["sampled/pass@2"] = of_prompts(np.mean(pairs, axis=1))
            expected["sampled/pass@4"] = of_prompts(solved.any(axis=1))
        for name in ("reward", "finished", "tokens"):
            values = column(kind, lambda line, name=name: line[name])
            expected[f"{kind}/{name.replace('tokens', 'length')}"] = of_prompts(values.mean(axis=1))
        expected[f"{kind}/rewards/even"] = of_prompts(column(kind, lambda line: line["rewards"]["even"]).mean(axis=1))
        lengths = column(kind, lambda line: line["rewards"]["length"])  # row 0 has none
        expected[f"{kind}/rewards/length"] = of_prompts(lengths[1:].mean(axis=1))
    assert found.metrics.keys() == expected.keys() == told["metrics"].keys()
    for name, values in expected.items():
        assert found.metrics[name] == pytest.approx(values, abs=1e-6), name
        assert list(told["metrics"][name].values()) == pytest.approx(values, abs=1e-6)
    share, stderr, _ = found.metrics["greedy/accuracy"]
    assert 0 < share < 1 and stderr == pytest.approx(math.sqrt(share * (1 - share) / 6))
    assert told["settings"]["samples"] == 4 and told["settings"]["solved_by"] == "even"
    table = found.table()
    assert table.count("\n") == len(expected) and "sampled/pass@2" in table


def test_greedy_completions_are_those_of_generate(policy, tmp_path):
    """The same sampler behind both, with stop texts, whatever the batch."""
    sampling = dataclasses.replace(SAMPLING, stop=("3", "-"))
    evaluate(policy, ROWS, (even,), sampling, batch_size=4, mesh=ONE_DEVICE, folder=tmp_path)
    greedy = dataclasses.replace(sampling, temperature=0.0)
    made = generate(policy, [row["prompt"] for row in ROWS], sampling=greedy, mesh=ONE_DEVICE)
    lines, _ = read(tmp_path)
    assert [line["finished"] for line in lines] == [group[0].finished for group in made]
    assert [line["tokens"] for line in lines] == [len(group[0].tokens) for group in made]
    for line, [completion] in zip(lines, made, strict=True):  # rewards read the stop text, too
        assert line["completion"] in (completion.text, completion.text + "3", completion.text + "-")


def test_a_threshold_and_samples_alone(policy, tmp_path):
    settings: dict[str, Any] = {"samples": 4, "greedy": False, "solved_by": "length", "threshold": 5.0}
    found = evaluate(policy, ROWS, (even, length), SAMPLING, mesh=ONE_DEVICE, folder=tmp_path, **settings)
    assert not any(name.startswith("greedy") for name in found.metrics)
    lines, _ = read(tmp_path)
    values = [line["rewards"]["length"] for line in lines]
    solved = np.array([value is not None and value >= 5 for value in values]).reshape(7, 4)
    assert 0 < solved.mean() < 1
    assert found.metrics["sampled/mean@4"].value == pytest.approx(solved.mean())
    assert found.metrics["sampled/pass@4"].value == pytest.approx(solved.any(axis=1).mean())


def test_eight_devices_find_the_same(policy, tiny):
    meshes = ONE_DEVICE, make_mesh(MeshConfig(fsdp=4, tensor=2))
    policies = policy, tiny.make_policy(meshes[1])
    one, eight = (
        evaluate(policy, ROWS[:3], (even,), SAMPLING, samples=2, greedy=False, mesh=mesh)
        for policy, mesh in zip(policies, meshes, strict=True)
    )
    assert one.metrics.keys() == eight.metrics.keys()
    for name, values in one.metrics.items():
        assert eight.metrics[name] == pytest.approx(values, nan_ok=True), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"greedy": False}, "nothing would be decoded: give samples, or greedy"),
        ({"samples": 2, "ks": (1, 3)}, r"ks=\(1, 3\) of pass@k must be from 1 to samples=2"),
        ({"ks": (1,)}, r"ks=\(1,\) of pass@k must be from 1 to samples=0"),
        ({"samples": -1}, "evaluation.samples=-1 must be at least 0"),
        ({"threshold": math.nan}, "evaluation.threshold=nan must be finite"),
        ({"solved_by": "odd"}, "evaluation.solved_by='odd' is no reward function; there are even"),
        ({"samples": 2, "sampling": SamplingConfig(temperature=0)}, "samples=2 would all be equal"),
        ({"sampling": SamplingConfig(max_tokens=16)}, "sampling.max_tokens=16 leaves no room in the model's 16"),
        ({"sampling": SamplingConfig(max_tokens=13)}, "row 0: .* prompt .* 4 tokens"),
        ({"prompt_format": PromptFormat("question")}, "no column 'question'"),
    ],
)
def test_what_cannot_be_evaluated_raises(settings, message, policy):
    with pytest.raises(ValueError, match=message):
        evaluate(policy, ROWS, (even,), **{"sampling": SAMPLING, "mesh": ONE_DEVICE} | settings)


# ---- The command ---------------------------------------------------------------------------------

TASK = """
from jaxrl_llm.config import DataConfig, Experiment
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.sampling.logits import SamplingConfig

def brief(prompts, completions, **columns):
    return [float(len(text) < 6) for text in completions]

def total(completions, answer):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]

CONFIG = Experiment(
    name="task",
    rewards=(brief, total),
    reward_weights=(0.5, 1.0),
    data=DataConfig(format=PromptFormat(template="{question}", conversational=True)),
    sampling=SamplingConfig(max_tokens=8, temperature=0.7),
)
"""


@pytest.fixture
def command(tiny: ModuleType, tmp_path: Path):
    """Runs the command on a task of the user's, with more flags."""
    (tmp_path / "task.py").write_text(TASK)
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    checkpoint = tiny.save_checkpoint(tmp_path / "tiny")

    def command(*flags: str) -> Evaluation:
        given = ["--experiment=task", f"--model.path={checkpoint}", f"--data={tmp_path / 'rows.jsonl'}"]
        return run_evaluation([*given, *flags], folder=tmp_path)

    return command


def test_the_command_prints_a_table_and_writes_a_folder(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / COMPLETIONS).touch()  # of one that ended before its first batch was scored
    flags = ["--samples=2", "--batch-size=8", "--max-prompts=3", "--sampling.cache-dtype=int8"]
    found = command(*flags, f"--output={tmp_path / 'out'}")
    said = capsys.readouterr().out
    assert found.table() in said and "3 of 3 prompts: brief" in said
    lines, told = read(tmp_path / "out")
    assert len(lines) == 9 and told["prompts"] == 3
    assert told["settings"]["sampling.cache_dtype"] == "int8"
    assert lines[0]["prompt"] == [{"role": "user", "content": "What is 0 + 1?"}]
    assert told["metrics"]["greedy/reward"]["value"] == found.metrics["greedy/reward"].value
    assert found.metrics["greedy/reward"].value == pytest.approx(
        0.5 * found.metrics["greedy/rewards/brief"].value + found.metrics["greedy/rewards/total"].value
    )
    with pytest.raises(SystemExit):
        command(f"--output={tmp_path / 'out'}")
    assert "is there already, of another evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experiment=tusk"], "--experiment is given 2 times"),
        (["--data=rose.jsonl"], "rose.jsonl"),
        (["--solved-by=answer"], "evaluation.solved_by='answer' is no reward function; there are brief, total"),
        (["--ks", "2"], "ks=(2,) of pass@k must be from 1 to samples=0"),
        (["--sampling.temperature=0.5"], "sampling.temperature=0.5 would have no effect: give --samples"),
        (["--sampling.stop", "\ufffd"], "holds what stands for no character"),
        (["--format.template={quest}"], "quest"),
        (["--model.path="], "no model given"),
        (["--sampling.tensor=3"], "sampling.tensor=3 must be a multiple"),
        (["--sampling.max-tokens=600"], "sampling.max_tokens=600 leaves no room"),
        (["--samplse=2"], "--samples"),
        (["--max-prompts=0"], "evaluation.max_prompts=0 must be at least 1"),
        (["--sampling.speculate=history"], "an evaluation has no last epoch for sampling.speculate=history"),
        (["--output=task.py/out"], "output=task.py/out cannot be a folder: task.py is a file"),
    ],
)
def test_errors_come_before_the_model_is_loaded(flags, message, command, tmp_path, capsys, monkeypatch):
    def load(*_: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(evaluation_command, "load_policy", load)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command(*flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_experiment_has_to_be_named(tmp_path, capsys):
    (tmp_path / "other.py").write_text("CONFIG = 3\n")
    (tmp_path / "broken.py").write_text("CONFIG = (\n")
    for flags, message in (
        ([], "no reward function given"),
        (["--experiment=othre"], "did you mean 'other'?"),
        (["--experiment=other"], "has no CONFIG of an experiment"),
        (["--experiment=broken"], "broken.py cannot be run: SyntaxError: "),
    ):
        with pytest.raises(SystemExit):
            run_evaluation(flags, folder=tmp_path)
        assert message in capsys.readouterr().err


def test_the_file_of_the_command_finds_its_neighbours(monkeypatch, capsys):
    path = Path(__file__).parents[2] / "experiments" / "evaluate.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--experiment=grpo_gsm8k", "--model.path=none"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    assert "no prompts given: pass --data=" in capsys.readouterr().err
