"""The command `jaxrl-llm`: its subcommands, what they say before anything is loaded, and whole runs of some."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from jaxrl_llm.__main__ import COMMANDS, EXAMPLES, main
from jaxrl_llm.launch.stages import RUN
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained
from jaxrl_llm.training.run.metrics import read_metrics


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["jaxrl-llm"])
    return tmp_path


def test_each_command_is_described_and_run() -> None:
    assert list(COMMANDS) == list(EXAMPLES) == list(RUN)


def test_an_overview_a_version_and_pages_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    overview = capsys.readouterr().out
    assert all(f"\n  {name} " in overview for name in COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out.startswith("jaxrl-llm 0.")
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        page = capsys.readouterr().out
        flags = {
            "generate": "prompts",
            "evaluate": "samples",
            "export": "output",
            "plan": "slice",
            "report": "output",
            "distill": "teachers",
            "star": "hint",
        }
        assert f"  --{flags.get(name, 'config')}" in page and ("--steps (" in page) == (
            name not in ("star", "generate", "evaluate", "export", "plan", "report")
        )
        assert stop.value.code == 0 and page.startswith(f"usage: jaxrl-llm {name} ") and EXAMPLES[name] in page


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gpro", "there is no command gpro; did you mean grpo? There are demo, "),
        ("--model=m", "the command comes before its settings; there are demo, "),
        ("distill --preset=sdpo", "algorithm.itself.hints show a {solution}, a sample that was rewarded, and there is"),
        ("distill --preset=sdtf", "no preset is named 'sdtf'; did you mean 'sdft'?"),
        ("star --preset=gspo", "--preset=gspo: this has no presets; leave it out"),
        ("sft --temperature=1", "there is no setting --temperature; other commands have it"),
        ("generate --model=m --prompts a --output=/proc/no/file", "No such file or directory: '/proc/no'"),
        ("grpo", "no reward function given: pass --rewards"),
        ("grpo --rewards gsm8", "no reward is named 'gsm8'; did you mean 'gsm8k'?"),
        ("grpo --rewards gsm8k", "no model given: pass --model.path="),
        ("grpo --rewards gsm8k --model=m --data=d.jsonl --beta=-1", "algorithm.kl_coef=-1.0 must not be negative"),
        ("trpo --learning-rate=1 --rewards math", "optimizer.learning_rate=1.0 would have no effect: a trust region"),
        ("sft", "no model given: pass --model.path="),
        ("dpo --preset=dpoo", "no preset is named 'dpoo'; did you mean 'dpo'?"),
        ("kto --preset=ipo", "no preset is named 'ipo'"),
        ("star --rewards math --model=m --data=d --evaluation.every=0", "nothing says how: pass --hint="),
        ("generate --model=m", "pass either --prompts"),
        ("generate --prompts a", "no model given"),
        ("evaluate --model=m", "no reward function given"),
        ("export --model=m", "no output given"),
        ("export --model=m --output=.", "output=. is there already"),
        ("report nowhere", "nowhere is no run: it does not exist; give the folder that a run left"),
    ],
)
def test_what_is_missing_is_one_line_before_anything_is_loaded(
    line: str, message: str, somewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and message in said
    assert not [path for path in somewhere.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ("demo", "plan", "report")])
def test_the_example_of_each_has_flags_that_there_are(
    name: str, somewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is taken as far as to its files and its model, which are not here."""
    words = shlex.split(EXAMPLES[name])
    assert words[:2] == ["jaxrl-llm", name]
    somewhere.joinpath("my_rewards.py").write_text("def brief(completions, **columns):\n    return [0.0] * 2\n")
    with pytest.raises(SystemExit):
        main([*words[1:], "--model=nowhere"])
    said = capsys.readouterr().err
    assert "nowhere" in said and said.count("\n") == 1


REWARD = """
def varied(completions, **columns):
    return [float(len(set(text))) for text in completions]
"""


def test_a_run_is_trained_resumed_exported_and_completes_prompts(
    tiny: ModuleType, somewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny.save_checkpoint(somewhere / "checkpoint")
    Path("task.py").write_text(REWARD)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "ba", "aab")))
    line = f"grpo --model={checkpoint} --data=prompts.jsonl --rewards task.py:varied --preset=dr-grpo --steps=1 "
    line += "--prompts-per-step=2 --num-generations=4 --max-completion-length=4 --max-prompt-length=8 --save-every=1"
    main([*line.split(), "--learning-rate=1e-2", "--run-dir=run"])
    settings = json.loads(Path("run/config.json").read_text())
    assert settings["rewards"] == ["task.py:varied"] and settings["algorithm.advantage.scale"] == "none"

    main(["grpo", "--resume", "run", "--steps=2"])
    lines = read_metrics(Path("run/metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2] and "rewards/varied/mean" in lines[-1]

    for folder in ("run", "run/checkpoints"):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["export", f"--model={folder}", "--output=exported"])
        assert f"{folder} is the folder of a run: give run/model or run/checkpoints/2" in capsys.readouterr().err
    main(["export", "--model=run/checkpoints/2", "--output=exported"])
    exported, trained = (jax.tree.leaves(from_pretrained(folder)[1]) for folder in ("exported", "run/model"))
    for one, other in zip(exported, trained, strict=True):
        np.testing.assert_array_equal(one, other)
    capsys.readouterr()
    main(
        [
            "generate",
            "--model=exported",
            "--prompts",
            "ab",
            "ba",
            "--samples=2",
            "--max-completion-length=4",
            "--output=texts.jsonl",
        ]
    )
    written = [json.loads(text) for text in Path("texts.jsonl").read_text().splitlines()]
    assert [one["prompt"][0]["content"] for one in written] == ["ab", "ab", "ba", "ba"]
    assert all(len(one["tokens"]) == len(one["logprobs"]) <= 4 for one in written)
    with pytest.raises(SystemExit):
        main(["generate", "--model=exported", "--prompts", "ab", "--output=texts.jsonl"])
    assert "texts.jsonl is there already" in capsys.readouterr().err
