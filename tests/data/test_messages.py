"""Conversations in the forms in which data sets hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxrl_llm.data.messages import check_messages, tools_of
from jaxrl_llm.data.preferences import PreferenceFormat
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.sources import open_source
from tests.data.small_tokenizers import small_tokenizer
from tests.data.test_tokens import WIDE, assistant, demonstration, user

TOOLS = (
    "{% if tools %}TOOLS {{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|end|>{{ m['role'] }} "
    "{{ m['content'] }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|end|>assistant {% endif %}"
)
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"city": None, "day": "string"}}}]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def trained(row: Any, tokenizer: Any) -> str:
    return tokenizer.decode([token for token, own in zip(row.completion, row.mask, strict=True) if own])


# ---- Content --------------------------------------------------------------------------------------------


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}]
    assert check_messages([user("u"), {"role": "assistant", "content": parts}])[1] == assistant("a b")
    assert check_messages([{"role": "user", "content": []}]) == [user("")]


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "audio", "text": "a"}, "'audio'"),
        ({"text": "a"}, "None"),
        ({"type": "text"}, "'text'"),
        ("a", "'str'"),
    ],
)
def test_other_parts_are_refused_by_name(part: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"message 1, part 1: content is text, .* got one of type {kind}"):
        check_messages([user("u"), {"role": "user", "content": [{"type": "text", "text": "a"}, part]}])


@pytest.mark.parametrize("message", [{"role": "assistant", "content": None}, {"role": "assistant"}])
def test_content_may_be_missing_beside_tool_calls_alone(message: dict[str, Any]) -> None:
    assert check_messages([{**message, "tool_calls": [call("f")]}]) == [assistant("", tool_calls=[call("f")])]
    for calls in (None, []):
        with pytest.raises(ValueError, match="message 0: a message needs role and content"):
            check_messages([{**message, "tool_calls": calls}])
    with pytest.raises(ValueError, match="message 0: tool_calls is a list of calls, got 'f'"):
        check_messages([{**message, "tool_calls": "f"}])


def test_a_call_without_content_is_trained() -> None:
    tokenizer = small_tokenizer("bytes", TOOLS)
    talk = [user("u"), assistant("", tool_calls=[call("f")]), {"role": "tool", "content": "1"}, assistant("done")]
    talk[1]["content"] = None
    row = demonstration({"m": talk}, tokenizer, messages_column="m", train_on="assistant_only")
    assert trained(row, tokenizer) == '<call>{"name": "f", "arguments": {}}</call></s>done</s>'


# ---- What Arrow adds --------------------------------------------------------------------------------------


def test_keys_that_other_rows_have_are_not_trained(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"m": [user("u"), assistant("", tool_calls=[call("weather", city="Paris", at={"hour": 1})])]},
        {"m": [user("u"), assistant("", tool_calls=[call("add", a=1, at={"minute": 2}), call("now")])]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source, tokenizer = open_source(str(tmp_path / "rows.parquet")), small_tokenizer("bytes", TOOLS)
    texts = [trained(demonstration(source[n], tokenizer, messages_column="m"), tokenizer) for n in range(2)]
    assert "null" not in "".join(texts) and "None" not in "".join(texts)
    assert '"arguments": {"city": "Paris", "at": {"hour": 1}}' in texts[0]
    assert '"arguments": {"at": {"minute": 2}, "a": 1}' in texts[1]


# ---- Tools ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [WEATHER, str(WEATHER).replace("'", '"').replace("None", "null")])
def test_tools_reach_the_template_wherever_there_is_one(tools: Any) -> None:
    tokenizer = small_tokenizer("bytes", TOOLS)
    described = 'TOOLS [{"type": "function", "function": {"name": "weather", "parameters": {"day": "string"}}}]'
    row = {"prompt": [user("u")], "completion": "a", "chosen": "a", "rejected": "b", "tools": tools}
    prompts = PromptDataset([row], tokenizer, max_prompt_length=99).batch([0])
    assert tokenizer.decode(prompts.tokens[0, : prompts.lengths[0]]).startswith(described)
    assert tokenizer.decode(demonstration(row, tokenizer).prompt).startswith(described)
    pair = PreferenceFormat().dataset([row], tokenizer, **WIDE).batch([0])
    assert tokenizer.decode(pair.prompt[0, : pair.prompt_lengths[0]]).startswith(described)


def test_tools_that_are_none() -> None:
    talk: list[Any] = [user("u")]
    assert [tools_of({"tools": tools}, talk) for tools in (None, [], "", "null", "[]")] == [None] * 5
    assert tools_of({}, talk) is None
    assert tools_of({"tools": ["hammer"]}, "a text has no template") is None
    for tools in ("weather", "{}", [1], {"name": "f"}, 3):
        with pytest.raises(ValueError, match="the column 'tools' is"):
            tools_of({"tools": tools}, talk)


# ---- Weights ----------------------------------------------------------------------------------------------

WEIGHED = [user("u"), assistant("a1", weight=0), user("v"), assistant("a2", weight=1), user("w"), assistant("a3")]


def test_turns_of_weight_0_are_read_and_not_trained() -> None:
    tokenizer = small_tokenizer("bytes", TOOLS)
    row = demonstration({"m": WEIGHED}, tokenizer, messages_column="m", train_on="assistant_only")
    assert trained(row, tokenizer) == "a2</s>a3</s>"
    assert "assistant a1</s>" in tokenizer.decode(row.prompt)
    later = [user("u"), assistant("a1", weight=1.0), user("v"), assistant("a2", weight=False)]
    row = demonstration({"m": later}, tokenizer, messages_column="m", train_on="assistant_only")
    assert trained(row, tokenizer) == "a1</s>" == tokenizer.decode(row.completion)


@pytest.mark.parametrize(
    ("conversation", "train_on", "message"),
    [
        ([user("u"), assistant("a", weight=0.5)], "assistant_only", "row 0: message 1: weight=0.5 is neither 0"),
        ([user("u"), assistant("a", weight="1")], "assistant_only", "row 0: message 1: weight='1' is neither 0"),
        ([user("u"), assistant("a", weight=0)], "completion_only", "row 0: each turn of the assistant .* has weight 0"),
        (WEIGHED, "completion_only", "row 0: message 3 has weight 1, but train_on='completion_only'"),
        ([{**user("u"), "weight": 1}, assistant("a")], "assistant_only", "row 0: message 0: weight=1, but only turns"),
    ],
)
def test_weights_that_cannot_be_meant(conversation: Any, train_on: Any, message: str) -> None:
    tokenizer = small_tokenizer("bytes", TOOLS)
    with pytest.raises(ValueError, match=message):
        demonstration({"m": conversation}, tokenizer, messages_column="m", train_on=train_on)
