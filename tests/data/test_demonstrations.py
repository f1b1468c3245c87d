"""Demonstrations: what is read and what is trained, token by token."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from typing import Any

import chex
import numpy as np
import pytest

from jaxrl_llm.data.demonstrations import DemonstrationDataset, DemonstrationFormat
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.packing import PackedDataset
from jaxrl_llm.data.rows import RowFormat, RowLoader, batches_in_order
from jaxrl_llm.data.tokenizers import CharTokenizer

TEXT = CharTokenizer("abcdefgh+=0123456789")
ROWS = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "5+5=", "completion": "10"},
    {"prompt": "a", "completion": ""},
]
WIDE: dict[str, Any] = {"max_prompt_length": 64, "max_completion_length": 64}


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
    """A token per character, but for <…>, which is one; turns are `<role>text</role>` and a line break."""

    end: str = "<end>"
    chat_template: str | None = "yes"
    rewrites: bool = False
    specials = ("<pad>", "<eos>", "<end>", "<user>", "<assistant>", "<system>")
    pad_token_id, eos_token_id, bos_token_id = 0, 1, None
    all_special_ids = (0, 1, 2, 3, 4, 5)
    added_tokens_decoder: dict[int, Any] = dataclasses.field(default_factory=dict)

    def apply_chat_template(self, messages: list[Any], *, add_generation_prompt: bool = False, tokenize: bool) -> str:
        assert not tokenize
        turns = [(m["role"], m["content"].strip()) for m in messages]
        if self.rewrites:  # forgets what was said before the last turn, as templates of reasoning models do
            last = len(turns) - 1
            turns = [(role, "" if role == "assistant" and n < last else said) for n, (role, said) in enumerate(turns)]
        text = "".join(f"<{role}>{content}{self.end}\n" for role, content in turns)
        return text + "<assistant>" * add_generation_prompt

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = []
        while text:
            special = next((s for s in self.specials if text.startswith(s)), None)
            ids.append(self.specials.index(special) if special else 10 + ord(text[0]))
            text = text[len(special or "c") :]
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.specials[token] if token < 10 else chr(token - 10) for token in ids)


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def shown(dataset: DemonstrationDataset, tokenizer: Any, item: int = 0) -> tuple[str, list[tuple[bool, str]]]:
    """A prompt's text, and the completion's as runs of trained and untrained tokens."""
    rows = dataset.batch([item])
    runs: list[tuple[bool, str]] = []
    used = len(np.trim_zeros(np.array(rows.mask[0, 0], int), "b"))
    for token, trained in zip(rows.completion[0, 0, :used].tolist(), rows.mask[0, 0, :used].tolist(), strict=True):
        if runs and runs[-1][0] == trained:
            runs[-1] = (trained, runs[-1][1] + tokenizer.decode([token]))
        else:
            runs.append((trained, tokenizer.decode([token])))
    return tokenizer.decode(rows.prompt[0, : rows.prompt_lengths[0]].tolist()), runs


def chat(row: dict[str, Any], tokenizer: Any = None, **settings: Any) -> tuple[str, list[tuple[bool, str]]]:
    tokenizer = tokenizer or ChatTokenizer()
    form = DemonstrationFormat(**settings)
    return shown(form.dataset([row], tokenizer, **WIDE), tokenizer)


# ---- Text ---------------------------------------------------------------------------------------------


def test_text_ends_with_the_end_of_sequence() -> None:
    dataset = DemonstrationFormat().dataset(ROWS, TEXT, max_prompt_length=5, max_completion_length=4)
    rows = dataset.batch([1, 0, 2, 1])
    assert rows.prompt.tolist() == [[17, 10, 17, 11, 0], [13, 10, 13, 11, 0], [2, 0, 0, 0, 0], [17, 10, 17, 11, 0]]
    assert rows.prompt_lengths.tolist() == [4, 4, 1, 4]
    assert rows.completion.tolist() == [[[13, 12, 1, 0]], [[14, 1, 0, 0]], [[1, 0, 0, 0]], [[13, 12, 1, 0]]]
    assert rows.mask.tolist() == [[[True] * n + [False] * (4 - n)] for n in (3, 2, 1, 3)]
    assert (rows.prompt.dtype, rows.completion.dtype, rows.mask.dtype) == (np.int32, np.int32, np.bool_)
    assert (len(dataset), dataset.dropped) == (3, 0)
    assert isinstance(DemonstrationFormat(), RowFormat)
    # Of older runs, which go on.
    assert dataset.fingerprint == {"rows": 3, "demonstrations": 3, "content": "e72ce275025ef830"}


def test_columns_and_template() -> None:
    form = DemonstrationFormat(prompt=PromptFormat(template="{a}+{b}="), completion_column="sum")
    assert shown(form.dataset([{"a": 1, "b": 2, "sum": "3"}], TEXT, **WIDE), TEXT) == ("1+2=", [(True, "3<eos>")])


# ---- Conversations ------------------------------------------------------------------------------------

CONVERSATION = [system("s"), user("Hi"), assistant("Hello"), user("Bye"), assistant("Ciao")]
START = "<system>s<end>\n<user>Hi<end>\n<assistant>"


def test_every_turn_of_the_assistant_is_trained_and_nothing_else() -> None:
    """Up to the token that ends the turn; the line break after it is what the template adds."""
    given = chat({"messages": CONVERSATION}, messages_column="messages", train_on="assistant_only")
    between = (False, "\n<user>Bye<end>\n<assistant>")
    assert given == (START, [(True, "Hello<end>"), between, (True, "Ciao<end>")])


def test_masks_of_a_conversation_by_hand() -> None:
    conversation = [user("a"), assistant("b"), user("c"), assistant("de")]
    form = DemonstrationFormat(messages_column="chat", train_on="assistant_only")
    dataset = form.dataset([{"chat": conversation}], ChatTokenizer(), max_prompt_length=6, max_completion_length=12)
    rows, (a, b, c, d, e), line = dataset.batch([0]), range(107, 112), 20
    assert rows.prompt.tolist() == [[3, a, 2, line, 4, 0]] and rows.prompt_lengths.tolist() == [5]
    assert rows.completion.tolist() == [[[b, 2, line, 3, c, 2, line, 4, d, e, 2, 0]]]
    assert rows.mask.astype(int).tolist() == [[[1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]]]


def test_the_last_turn_alone() -> None:
    given = chat({"messages": CONVERSATION}, messages_column="messages")
    assert given == (START + "Hello<end>\n<user>Bye<end>\n<assistant>", [(True, "Ciao<end>")])


@pytest.mark.parametrize("completion", ["Hello", [assistant("Hello")]])
def test_prompt_and_completion_as_messages(completion: Any) -> None:
    row = {"prompt": [user("Hi")], "completion": completion}
    for train_on in ("completion_only", "assistant_only"):
        given = chat(row, prompt=PromptFormat(system="s"), train_on=train_on)
        assert given == (START, [(True, "Hello<end>")])


def test_text_made_conversational_and_several_answers() -> None:
    form = {"prompt": PromptFormat(system="s")}
    assert chat({"prompt": "Hi", "completion": "Hello"}, **form) == (START, [(True, "Hello<end>")])
    row = {"prompt": "Hi", "completion": CONVERSATION[2:]}
    assert chat(row, **form, train_on="assistant_only") == chat(
        {"m": CONVERSATION}, messages_column="m", train_on="assistant_only"
    )


def test_a_system_message_for_conversations() -> None:
    given = chat({"m": CONVERSATION[1:3]}, prompt=PromptFormat(system="s"), messages_column="m")
    assert given == (START, [(True, "Hello<end>")])


def test_what_follows_the_last_turn_is_left_out() -> None:
    given = chat({"m": CONVERSATION[:4]}, messages_column="m", train_on="assistant_only")
    assert given == (START, [(True, "Hello<end>")])


def test_a_template_without_an_end_of_turn() -> None:
    """Then the last turn is ended by the end of sequence."""
    tokenizer = ChatTokenizer(end="")
    prompt, runs = chat({"m": CONVERSATION[1:]}, tokenizer, messages_column="m", train_on="assistant_only")
    assert prompt == "<user>Hi\n<assistant>"
    assert runs == [(True, "Hello"), (False, "\n<user>Bye\n<assistant>"), (True, "Ciao<eos>")]


# ---- Columns that people have ---------------------------------------------------------------------------


def test_one_message_as_completion():
    row = {"prompt": [user("Hi")], "completion": assistant("Hello")}
    assert chat(row) == chat({**row, "completion": [assistant("Hello")]})


def test_messages_are_read_where_there_is_no_completion():
    """Also beside a prompt, as some data sets have it."""
    named = chat({"m": CONVERSATION}, messages_column="m")
    assert chat({"messages": CONVERSATION}) == named
    assert chat({"prompt": "Hi", "prompt_id": "1", "messages": CONVERSATION}) == named
    row = {"prompt": [user("a")], "completion": "b", "messages": CONVERSATION}
    assert chat(row)[1] == [(True, "b<end>")]


def test_whole_texts():
    """All is trained but what nothing comes before."""
    form = DemonstrationFormat()
    assert shown(form.dataset([{"text": "abc", "id": 1}], TEXT, **WIDE), TEXT) == ("a", [(True, "bc<eos>")])
    named = DemonstrationFormat(text_column="body")
    assert shown(named.dataset([{"body": "abc", "text": 3}], TEXT, **WIDE), TEXT) == ("a", [(True, "bc<eos>")])

    class Begun(CharTokenizer):
        bos_token_id = 2

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [2] * add_special_tokens + super().encode(text)

    assert shown(form.dataset([{"text": "bc"}], Begun("abc"), **WIDE), TEXT) == ("a", [(True, "bc<eos>")])


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"question": "a", "answer": "b"}], {}, "row 0: neither .*prompt_column .*completion_column.*messages_column"),
        ([{"prompt": "a", "answer": "b"}], {}, "row 0: no column 'completion'.*; completion_column names the column"),
        ([{"messages": CONVERSATION}, {"text": "a"}], {}, "row 1: no column 'messages' .*; messages_column names"),
        ([{"text": CONVERSATION}], {}, "row 0: the column 'text' is a list, not text: .*messages_column names"),
        ([{"text": 3}], {}, "row 0: the column 'text' is a int, not text"),
        ([{"text": ""}], {}, "row 0: the prompt has no tokens"),
        ([{"text": "a"}], {"train_on": "assistant_only"}, "row 0: train_on='assistant_only' .* need conversations"),
        ([{"text": "a"}], {"completion_column": "answer"}, "row 0: no column 'prompt' .*; prompt_column names"),
    ],
)
def test_columns_that_are_not_there(rows: list[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemonstrationFormat(**settings).dataset(rows, ChatTokenizer(), **WIDE)


def test_texts_and_conversations_at_once() -> None:
    with pytest.raises(ValueError, match="messages_column='m' and text_column='t': rows are one of both"):
        DemonstrationFormat(messages_column="m", text_column="t")


# ---- What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"prompt": "a"}, {}, "row 1: no column 'completion'"),
        ({"prompt": "a", "completion": "b", "m": 3}, {"train_on": "assistant_only"}, "row 1: .*the prompt is text"),
        ({"prompt": "a", "completion": [assistant("b")]}, {}, "row 1: the prompt is text and the completion is not"),
        ({"prompt": [user("a")], "completion": CONVERSATION[2:]}, {}, "row 1: the completion has 3 messages"),
        ({"prompt": [user("a")], "completion": [user("a")]}, {}, "row 1: the conversation has no turn of the assist"),
    ],
)
def test_rows_that_are_no_demonstrations(row: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    first = {"prompt": [user("a")], "completion": [assistant("b")]}
    with pytest.raises(ValueError, match=message):
        DemonstrationFormat(**settings).dataset([first, row], ChatTokenizer(), **WIDE)


@pytest.mark.parametrize(
    ("conversation", "train_on", "message"),
    [
        (CONVERSATION[:4], "completion_only", "row 0: the last message is the user's, and not the assistant's"),
        (CONVERSATION[:2], "assistant_only", "row 0: the conversation has no turn of the assistant"),
        ("Hi", "assistant_only", "row 0: expected text or a list of messages, got 'Hi'"),
    ],
)
def test_conversations_with_nothing_to_train(conversation: Any, train_on: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat({"m": conversation}, messages_column="m", train_on=train_on)


def test_a_template_that_rewrites_what_was_said() -> None:
    tokenizer, row = ChatTokenizer(rewrites=True), {"m": CONVERSATION}
    with pytest.raises(ValueError, match=r"row 0: the chat template writes the beginning .* differently when"):
        chat(row, tokenizer, messages_column="m", train_on="assistant_only")
    assert chat(row, tokenizer, messages_column="m")[1] == [(True, "Ciao<end>")]


def test_a_template_that_begins_another_turn_unasked() -> None:
    class Eager(ChatTokenizer):
        def apply_chat_template(self, messages: list[Any], **settings: Any) -> str:
            return super().apply_chat_template(messages, **{**settings, "add_generation_prompt": True})

    with pytest.raises(ValueError, match="row 0: the chat template begins another turn unasked"):
        chat({"m": CONVERSATION[:3]}, Eager(end=""), messages_column="m")


def test_an_impossible_choice_and_a_tokenizer_without_an_end() -> None:
    with pytest.raises(ValueError, match=r"train_on is one of .*, got 'all'"):
        DemonstrationFormat(train_on="all")  # pyright: ignore[reportArgumentType]

    class Endless(CharTokenizer):
        eos_token_id = None

    with pytest.raises(ValueError, match="row 0: the tokenizer has no end of sequence"):
        DemonstrationFormat().dataset(ROWS, Endless("1+=2"), **WIDE)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_prompt_length": 3}, "row 0: the prompt has 4 tokens, more than max_prompt_length=3 .2 of 3 prompts are"),
        ({"max_completion_length": 2}, "row 1: the completion has 3 tokens, more than max_completion_length=2 .1 of 3"),
    ],
)
def test_what_is_too_long(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message + ".*or set overlong='drop'"):
        DemonstrationFormat().dataset(ROWS, TEXT, **{**WIDE, **limits})
    kept = DemonstrationFormat().dataset(ROWS, TEXT, **{**WIDE, **limits}, overlong="drop")
    assert len(kept) == 3 - kept.dropped and kept.dropped in (1, 2)
    assert kept.rows.tolist() == ([2] if kept.dropped == 2 else [0, 2])
    with pytest.raises(ValueError, match=r"raise max_prompt_length$"):
        DemonstrationFormat().dataset(ROWS, TEXT, max_prompt_length=0, max_completion_length=9, overlong="drop")


# ---- Order --------------------------------------------------------------------------------------------


def loader(seed: int = 0, rows: list[Any] = ROWS) -> RowLoader:
    return RowLoader(DemonstrationFormat().dataset(rows, TEXT, **WIDE), batch_size=2, seed=seed)


def test_every_row_once_an_epoch_and_an_exact_continuation() -> None:
    whole = list(islice(loader(), 6))
    order = np.concatenate([served.items for served in whole])
    assert all(sorted(epoch) == [0, 1, 2] for epoch in order.reshape(-1, 3).tolist())
    begun = loader()
    for _ in range(2):
        next(begun)
    going_on = loader()
    going_on.set_state(json.loads(json.dumps(begun.get_state())))
    for served, other in zip(islice(going_on, 4), whole[2:], strict=True):
        assert served.items.tolist() == other.items.tolist()
        chex.assert_trees_all_equal(served.rows, other.rows)
        assert served.valid.all()


def test_a_position_in_other_data_is_refused() -> None:
    state = loader().get_state()
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        loader(seed=1).set_state(state)
    changed = [*ROWS[:2], {"prompt": "a", "completion": "b"}]
    with pytest.raises(ValueError, match="content was"):
        loader(rows=changed).set_state(state)


def test_the_last_batch_in_order_is_filled_up_with_nothing() -> None:
    first, second = batches_in_order(DemonstrationFormat().dataset(ROWS, TEXT, **WIDE), batch_size=2)
    assert (first.items.tolist(), second.items.tolist()) == ([0, 1], [2, 0])
    assert second.valid.tolist() == [True, False]
    assert second.rows.mask.any(axis=(1, 2)).tolist() == [True, False]
    assert first.rows.mask.sum() == 5


# ---- Packing ------------------------------------------------------------------------------------------


def packed(rows: list[Any], length: int, **limits: int) -> PackedDataset:
    dataset = DemonstrationFormat(packed_length=length).dataset(rows, TEXT, **{**WIDE, **limits})
    assert isinstance(dataset, PackedDataset)
    return dataset


def test_packed_rows_by_hand() -> None:
    """Lengths 6, 7, 2 into rows of 9: the longest first, each into the first row with room."""
    dataset = packed(ROWS, 9)
    assert dataset.members == [[1, 2], [0]] and len(dataset) == 2
    rows = dataset.batch([0, 1])
    assert rows.completion.tolist() == [[[17, 10, 17, 11, 13, 12, 1, 2, 1]], [[13, 10, 13, 11, 14, 1, 0, 0, 0]]]
    assert rows.mask.astype(int).tolist() == [[[0, 0, 0, 0, 1, 1, 1, 0, 1]], [[0, 0, 0, 0, 1, 1, 0, 0, 0]]]
    assert rows.segment_ids.tolist() == [[[0] * 7 + [1] * 2], [[0] * 6 + [-1] * 3]]
    assert rows.prompt.shape == (2, 1) and rows.prompt_lengths.tolist() == [1, 1]


def test_packing_loses_and_repeats_nothing() -> None:
    rows = [{"prompt": "a" * (1 + n % 7), "completion": "b" * (n % 5)} for n in range(40)]
    dataset = packed(rows, 16)
    assert sorted(item for row in dataset.members for item in row) == list(range(40))
    served = dataset.batch(range(len(dataset)))
    assert served.mask.sum() == sum(len(row["completion"]) + 1 for row in rows)
    assert (served.segment_ids >= 0).sum() == sum(len(row["prompt"]) + len(row["completion"]) + 1 for row in rows)
    assert (served.segment_ids >= 0).mean() > 0.9
    assert dataset.members == packed(rows, 16).members
    assert dataset.fingerprint != packed(rows, 17).fingerprint


def test_what_does_not_fit_into_a_packed_row() -> None:
    with pytest.raises(ValueError, match="row 1: prompt and completion have 7 tokens, more than packed_length=6"):
        packed(ROWS, 6)
    with pytest.raises(ValueError, match="packed_length=1000000000 is more than the 15 tokens of all 3 demonstrations"):
        packed(ROWS, 10**9)
    with pytest.raises(ValueError, match="packed_length=1 must be at least 2"):
        DemonstrationFormat(packed_length=1)
