"""Reward functions that are found by their names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jaxrl_llm.rewards import gsm8k_reward
from jaxrl_llm.rewards.by_name import REWARDS, find_reward

TASK = """
import helper

def brief(completions, **columns):
    return [helper.LIMIT - len(text) for text in completions]

def strict(completions, **columns):
    return [0.0 for _ in completions]

LIMIT = 3
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("LIMIT = 9.0\n")
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path / "task.py"


def test_ours_have_names_with_dashes_or_underscores() -> None:
    assert find_reward("gsm8k") is gsm8k_reward
    assert find_reward("python-syntax") is REWARDS["python_syntax"]
    assert find_reward("format")(prompts=["", ""], completions=["<think>a</think><answer>b</answer>", "b"]) == [
        1.0,
        0.0,
    ]
    assert find_reward("gsm8k_format")(prompts=["", ""], completions=["1 + 1 = 2\n#### 2", "#### 2 or so"]) == [
        1.0,
        0.0,
    ]


def test_those_of_a_file_may_import_what_lies_beside_it(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = list(sys.path)
    brief = find_reward(f"{task}:brief")
    assert brief(completions=["four"]) == [5.0]
    assert find_reward(f"{task}:brief") is brief and sys.path == path  # the file is run once
    monkeypatch.chdir(task.parent)
    assert find_reward("task.py:strict").__globals__ is brief.__globals__
    assert find_reward("jaxrl_llm.rewards:gsm8k_reward") is gsm8k_reward


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8", "no reward is named 'gsm8'; did you mean 'gsm8k'?"),
        ("task.py", "or give task.py:function"),
        ("gsm8k,math", "names of several stand apart, with spaces between"),
        ("task.py:", "must be given as file.py:function"),
        (":brief", "must be given as file.py:function"),
        ("task.py:zzz", "'zzz' is not there; there are brief, strict"),
        ("ends.py:f", "ends.py cannot be run: SystemExit: 3"),
        ("task.py:breif", "'breif' is not there; did you mean 'brief'?"),
        ("task.py:LIMIT", "'LIMIT' is no function"),
        ("broken.py:f", "broken.py cannot be run: NameError: name 'nothing' is not defined"),
        ("no.such.module:f", "the module 'no.such.module' cannot be imported"),
    ],
)
def test_what_cannot_be_found_says_why(name: str, message: str, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(task.parent)
    Path("broken.py").write_text("nothing\n")
    Path("ends.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(ValueError) as error:
        find_reward(name)
    assert message in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py is not there"):
        find_reward("nowhere.py:f")
