"""Data sets in each form that TRL 1.16 documents, and its reward functions, as they are: what runs, runs unchanged.

`docs/rewards.md` has the table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.data.demonstrations import DemonstrationFormat
from jaxrl_llm.data.preferences import PreferenceFormat
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.rows import RowFormat
from jaxrl_llm.data.steps import StepFormat
from jaxrl_llm.data.unpaired import UnpairedFormat
from jaxrl_llm.training.episodes.scoring import RewardSum
from tests.data.small_tokenizers import small_tokenizer
from tests.data.test_messages import TOOLS

TOKENIZER = small_tokenizer("bytes", TOOLS)
WIDE = {"max_prompt_length": 400, "max_completion_length": 200}
ASKED, ASKED_TOO = [{"role": "user", "content": "four 4"}], [{"role": "user", "content": "the capital"}]
YES, NO = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
TALK = "<|end|>user four 4</s><|end|>assistant "
LAMP = {
    "type": "function",
    "function": {
        "name": "lamp",
        "description": "Turns a lamp.",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean", "description": "Whether it shines."}},
            "required": ["on"],
        },
        "return": {"type": "string", "description": "What came of it."},
    },
}
CALL = {"type": "function", "function": {"name": "lamp", "arguments": {"on": True}}}
USES = [*ASKED, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "name": "lamp", "content": "hello"}, *YES]

FORMS: list[tuple[str, RowFormat[Any, Any], list[dict[str, Any]], list[str]]] = [
    ("text", DemonstrationFormat(), [{"text": "four 4"}], ["<s>|four 4</s>"]),
    ("messages", DemonstrationFormat(), [{"messages": ASKED + YES}], [TALK + "|yes</s>"]),
    ("completion", DemonstrationFormat(), [{"prompt": "four", "completion": " 4"}], ["<s>four| 4</s>"]),
    ("completion, messages", DemonstrationFormat(), [{"prompt": ASKED, "completion": YES}], [TALK + "|yes</s>"]),
    ("tools", DemonstrationFormat(), [{"messages": USES, "tools": [LAMP]}], ["hello</s><|end|>assistant |yes</s>"]),
    ("pair", PreferenceFormat(), [{"prompt": "four", "chosen": " 4", "rejected": " 5"}], ["<s>four| 4</s>| 5</s>"]),
    ("pair, implicit", PreferenceFormat(), [{"chosen": "four 4", "rejected": "four 5"}], ["<s>four| 4</s>| 5</s>"]),
    (
        "pair, messages",
        PreferenceFormat(),
        [{"prompt": ASKED, "chosen": YES, "rejected": NO}],
        [TALK + "|yes</s>|no</s>"],
    ),
    (
        "pair, implicit messages",
        PreferenceFormat(),
        [{"chosen": ASKED + YES, "rejected": ASKED + NO}],
        [TALK + "|yes</s>|no</s>"],
    ),
    (
        "unpaired",
        UnpairedFormat(),
        [{"prompt": "four", "completion": " 4", "label": True}, {"prompt": "no", "completion": " 5", "label": False}],
        ["<s>four| 4</s>| 5</s>", "<s>no| 5</s>| 4</s>"],
    ),
    (
        "unpaired, messages",
        UnpairedFormat(mismatched=False),
        [{"prompt": ASKED, "completion": YES, "label": True}],
        [TALK + "|yes</s>"],
    ),
    (
        "unpaired of pairs",
        UnpairedFormat(mismatched=False),
        [{"prompt": "four", "chosen": " 4", "rejected": " 5"}],
        ["<s>four| 4</s>", "<s>four| 5</s>"],
    ),
    (
        "steps",
        StepFormat(),
        [{"prompt": "four 4", "completions": ["yes.", "no", "Paris"], "labels": [True, True, False]}],
        ["<s>four 4|yes.\nno\nParis</s>"],
    ),
]


@pytest.mark.parametrize(("form", "rows", "expected"), [case[1:] for case in FORMS], ids=[case[0] for case in FORMS])
def test_rows_of_each_form(form: RowFormat[Any, Any], rows: list[dict[str, Any]], expected: list[str]) -> None:
    dataset = form.dataset(rows, TOKENIZER, **WIDE)
    batch = dataset.batch(range(len(dataset)))
    for number, text in enumerate(expected):
        parts = [batch.prompt[number][: batch.prompt_lengths[number]]]
        parts += [
            ids[: 1 + mask.nonzero()[0][-1]]
            for ids, mask in zip(batch.completion[number], batch.mask[number], strict=True)
        ]
        assert "|".join(map(TOKENIZER.decode, parts)).endswith(text)
    if isinstance(form, UnpairedFormat):
        assert batch.labels[:, 0].tolist() == [True, False][: len(expected)]
    if isinstance(form, StepFormat):
        assert batch.labels[batch.mask].tolist() == [1, 1, 0]


def test_prompts_of_each_form() -> None:
    rows = [{"prompt": "four", "answer": "4"}, {"prompt": "the", "answer": "4"}]
    assert PromptDataset(rows, TOKENIZER, max_prompt_length=9).batch([0, 1]).prompts == ["four", "the"]
    talks = [{"prompt": ASKED, "tools": [LAMP]}, {"prompt": ASKED_TOO, "tools": [LAMP]}]
    batch = PromptDataset(talks, TOKENIZER, max_prompt_length=400).batch([0])
    text = TOKENIZER.decode(batch.tokens[0, : batch.lengths[0]])
    assert text.startswith('TOOLS [{"type": "function"') and text.endswith(TALK) and batch.prompts == [ASKED]


# ---- Reward functions ---------------------------------------------------------------------------------

MATHS = [rf"<think>Half of one.</think> It is $\boxed{{\frac{{1}}{{{n}}}}}$." for n in (2, 3)]
PROMPTS = [ASKED, ASKED]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in MATHS]
IDS = [[5, 6, 7, 8], [5, 5, 5, 5, 5, 5]]
SOLUTION = {"solution": [r"$\frac{1}{2}$"] * 2}

EXPECTED: dict[str, tuple[Callable[[Any], Any], list[float]]] = {
    "accuracy_reward": (lambda trl: trl.accuracy_reward, [1, 0]),
    "reasoning_accuracy_reward": (lambda trl: trl.reasoning_accuracy_reward, [1, 0]),
    "think_format_reward": (lambda trl: trl.think_format_reward, [1, 1]),
    "cosine_scaled_reward": (lambda trl: trl.get_cosine_scaled_reward(max_len=8), [0.75, -0.5 - 0.25 * (1 - 2**-0.5)]),
    "repetition_penalty_reward": (lambda trl: trl.get_repetition_penalty_reward(ngram_size=2), [0, -0.8]),
    "soft_overlong_punishment_reward": (lambda trl: trl.get_soft_overlong_punishment(8, 4), [0, -0.5]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_reward_functions_that_trl_brings(name: str) -> None:
    make, expected = EXPECTED[name]
    function = make(pytest.importorskip("trl.rewards"))
    rewards = RewardSum([function])
    assert rewards.names == (name,)
    columns = SOLUTION if "solution" in inspect.signature(function).parameters else {}
    rewards.check_columns(columns)
    scores = rewards(PROMPTS, COMPLETIONS, IDS, columns)
    np.testing.assert_allclose(scores.total, expected, atol=1e-6)
    told = ["answer_parsed", "gold_parsed", "solution"] if name.endswith("accuracy_reward") else []
    assert sorted(scores.extra) == told


def test_what_the_readme_shows_reads_chat_completions_too() -> None:
    blocks = (Path(__file__).parents[2] / "README.md").read_text().split("```python\n")[1:]
    code = next(block for block in blocks if "def brief" in block).split("```")[0]
    space: dict[str, Any] = {"__name__": "task"}
    exec(compile(code, "README.md", "exec"), space)
    for wrap in (str, lambda text: [{"role": "assistant", "content": text}]):
        scores = RewardSum([space["brief"]])(["p", "p"], [wrap("short"), wrap("long " * 20)], [[1], [2]], {})
        assert scores.total.tolist() == [1, 0]
