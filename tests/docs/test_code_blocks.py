"""Every block of code of README and docs/ does what it says: Python runs, and commands know their flags.

Python that cannot run as it is stands behind a comment, `<!-- not run: why -->`; a page's blocks are one script. Names
that a page leaves to its reader are in `given`, and checkpoints are small ones.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.__main__ import main
from jaxrl_llm.launch import flags, stages
from jaxrl_llm.launch.configure import configure
from jaxrl_llm.launch.on_policy import presets_of
from jaxrl_llm.launch.plan.command import PRESETS as PLANNED
from jaxrl_llm.launch.plan.settings import Plan
from jaxrl_llm.launch.words import read_words, take_flag, with_preset

ROOT = Path(__file__).parents[2]
PAGES = [path for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]) if path.name != "CHANGELOG.md"]
BLOCK = re.compile(r"^(?P<reason><!-- not run: .+ -->\n)?```(?P<language>python|bash)\n(?P<code>.*?)^```$", re.M | re.S)
RUN_ELSEWHERE = {
    "CONTRIBUTING.md": "test_contributing.py",
    "docs/trees.md": "test_trees.py",
    "docs/objectives/": "test_foreign_code.py",  # and signatures, which test_objectives.py reads
}
COMMANDS = (
    *((config, presets_of(config)) for config in (stages.GRPO, stages.PPO, stages.TRPO, stages.DISTILL)),
    (stages.DPO, stages.METHODS),
    (stages.SFT, {}),
    (Plan(), PLANNED),
)
OTHERS = ("--config", "--resume", "--help", "--help-all", "--experiment")  # of all commands, and of `evaluate`
STAND_INS = {
    "SmolLM2-135M-Instruct.gguf": "checkpoint",
    "steps=20": "steps=1",
    "max_completion_length=32": "max_completion_length=4",
    "max_tokens=64": "max_tokens=4",
}


class Parsed(BaseException):
    """The settings of a command are read, and it would begin."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page that is to run, with empty lines before it as it has lines before it."""
    text = page.read_text()
    found = [match for match in BLOCK.finditer(text) if match["language"] == language and not match["reason"]]
    return ["\n" * text[: match.start("code")].count("\n") + match["code"] for match in found]


def commands() -> list[Any]:
    """The commands of ours in the blocks of shell, word by word."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            code = re.sub(r"<[^>]*>", "PLACE", block.replace("\\\n", " ").replace("…", ""))
            for name, value in re.findall(r'^([A-Z]+)="?(.*?)"?$', code, re.MULTILINE):
                code = code.replace(f"${name}", value)
            for line in re.split(r"\n| && ", code):
                words = shlex.split(line, comments=True)
                if words[:1] == ["jaxrl-llm"] or re.match(r"python experiments/", " ".join(words)):
                    found.append(pytest.param(words, id=f"{name_of(page)}: {' '.join(words)[:60]}"))
    return found


def flags_in_prose() -> list[Any]:
    """`--like=this`, outside of blocks."""
    found = []
    for page in PAGES:
        if not name_of(page).startswith(
            ("CONTRIBUTING", "docs/objectives", "docs/results", "docs/benchmarks", "docs/from_trl")
        ):
            prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
            for words in dict.fromkeys(re.findall(r"`(--[a-z][^`…<]*)`", prose.replace("`--preset=NAME`", ""))):
                found.append(pytest.param(words, id=f"{name_of(page)}: {words}"))
    return found


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where their settings are read."""

    def ending(read: Callable[..., Any]) -> Callable[..., Any]:
        def read_and_end(*args: Any) -> None:
            read(*args)
            raise Parsed

        return read_and_end

    monkeypatch.setattr(flags, "check_idle", ending(flags.check_idle))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", ending(argparse.ArgumentParser.parse_args))


@pytest.mark.parametrize("words", commands())
def test_flags_are_flags(
    words: list[str],
    parse_only: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in words if not word.startswith(("--config=", "--resume="))]  # files, and runs, of a reader
    try:
        if words[0] == "python":
            monkeypatch.setattr("sys.argv", words[1:])
            monkeypatch.syspath_prepend(str((ROOT / words[1]).parent))
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        else:
            monkeypatch.setattr("sys.argv", words)
            main(words[1:])
    except Parsed:
        return
    except ModuleNotFoundError as missing:
        assert missing.name in ("torch", "trl")
        pytest.skip(f"needs {missing.name}")
    except SystemExit as ended:
        assert "--help" in words and ended.code == 0, capsys.readouterr().err
    else:
        pytest.fail("it ended without reading its settings")


@pytest.mark.parametrize("text", flags_in_prose())
def test_flags_in_prose_are_flags(text: str) -> None:
    """Of some command at least, with a value or without."""
    refusals = []
    for config, presets in COMMANDS:
        preset, rest = take_flag(shlex.split(text), "--preset")
        try:
            began = config if preset is None else with_preset(config, preset, presets)
            configure(began, read_words(rest), spelled=flags.as_flag)
            return
        except ValueError as error:
            if re.search(r"needs a value|must be|one of", str(error)) and "=" not in text:
                return
            refusals.append(str(error))
    assert text.split("=")[0] in OTHERS, refusals


def given() -> dict[str, dict[str, Any]]:
    """What a page leaves to its reader, by page."""
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 8, (4, 6)),
        "rewards": rng.random((2, 2)),
        "old_logprobs": -rng.random((4, 5)),
        "mask": np.ones((4, 5), bool),
    }
    return {
        "README.md": {
            "my_model": lambda params, tokens: jnp.take(params, tokens, axis=0),
            "params": jax.random.normal(jax.random.key(0), (8, 8)),
            "batch": batch,
        },
        "docs/rewards.md": {"right_answer": print, "runs_tests": print},
    }


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs(
    page: Path,
    tiny: ModuleType,
    parse_only: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = name_of(page)
    for place, test in RUN_ELSEWHERE.items():
        if name.startswith(place):
            assert (Path(__file__).parent / test).is_file()
            return
    monkeypatch.chdir(tmp_path)
    tiny.save_checkpoint(tmp_path / "checkpoint")
    run = tmp_path / "runs" / "brief-20261130-101500"
    run.mkdir(parents=True)
    line = {"step": 1, "reward": 1.0, "advantage": 0.5, "completion": "red"}
    (run / "completions.jsonl").write_text(json.dumps(line) + "\n")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 1.0, "entropy": 0.5}) + "\n")
    names = {"__name__": "page"} | given().get(name, {})
    for block in blocks(page, "python"):
        for written, stand_in in STAND_INS.items():
            block = block.replace(written, stand_in)
        if '__name__ == "__main__"' in block:  # a file of its own, whose settings are read
            monkeypatch.setattr("sys.argv", [f"{page.stem}.py"])
            with pytest.raises(Parsed):
                exec(compile(block, str(page), "exec"), names | {"__name__": "__main__"})
        else:
            exec(compile(block, str(page), "exec"), names)


def test_what_is_wrong_in_a_block_is_told(parse_only: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["grpo", "--learning-rat=1"])
    assert "did you mean" in capsys.readouterr().err
    assert {name_of(page) for page in PAGES if blocks(page, "python")} >= {
        "README.md",
        "docs/rewards.md",
        "docs/trees.md",
    }
    assert len(commands()) > 20
