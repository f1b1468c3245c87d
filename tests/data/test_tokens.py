"""Pieces of a text have the tokens that the whole text has."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from jaxrl_llm.data.demonstrations import DemonstrationFormat
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.preferences import PreferenceFormat
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.steps import StepFormat
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.data.tokens import encode_parts, encode_prompt, without_end
from jaxrl_llm.data.unpaired import UnpairedFormat
from jaxrl_llm.models.checkpoints.tokenizers import load_tokenizer
from tests.data.small_tokenizers import INST, KINDS, LINES, MARKED, PLAIN, Kind, small_tokenizer

WIDE: dict[str, Any] = {"max_prompt_length": 199, "max_completion_length": 199}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def demonstration(row: dict[str, Any], tokenizer: Any, **form: Any) -> Any:
    return DemonstrationFormat(**form).dataset([row], tokenizer, **WIDE).encoded[0]


def whole(messages: list[Any], tokenizer: Any) -> list[int]:
    return tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)


TALK = [user("hello"), assistant("Paris"), user("what"), assistant("London 4")]


# ---- Conversations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [INST, LINES, MARKED])
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_has_the_tokens_of_its_whole_text(kind: Kind, template: str) -> None:
    tokenizer = small_tokenizer(kind, template)
    for train_on in ("assistant_only", "completion_only"):
        row = demonstration({"m": TALK}, tokenizer, messages_column="m", train_on=train_on)
        ids = [*row.prompt.tolist(), *row.completion.tolist()]
        assert ids == whole(TALK, tokenizer)[: len(ids)]
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) >= 2
        # The turns are trained, and nothing else; the prompt is that of sampling.
        runs = ["".join(text for text, _ in run) for trained, run in _runs(row, tokenizer) if trained]
        assert [run.strip() for run in runs] == ["Paris</s>", "London 4</s>"][-len(runs) :]
        assert len(runs) == (2 if train_on == "assistant_only" else 1)
        first = 1 if train_on == "assistant_only" else 3
        assert row.prompt.tolist() == encode_prompt(TALK[:first], tokenizer)


def _runs(row: Any, tokenizer: Any) -> list[tuple[bool, list[tuple[str, bool]]]]:
    tokens = tokenizer.convert_ids_to_tokens(row.completion.tolist())
    texts = [token.replace("▁", " ").replace("Ġ", " ") for token in tokens]
    pairs = zip(texts, row.mask.tolist(), strict=True)
    return [(trained, list(run)) for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_without_an_end_that_begins_and_ends_within_a_token_of_the_whole(kind: Kind) -> None:
    """`assistant Paris\\n`: the space belongs to the prompt, as it does in sampling."""
    tokenizer = small_tokenizer(kind, PLAIN)
    row = demonstration({"m": TALK}, tokenizer, messages_column="m", train_on="assistant_only")
    assert row.prompt.tolist() == encode_prompt(TALK[:1], tokenizer)
    ids = [*row.prompt.tolist(), *row.completion.tolist()]
    assert tokenizer.decode(ids) == "user hello\nassistant Paris\nuser what\nassistant London 4</s>"
    trained = [token for token, own in zip(row.completion.tolist(), row.mask.tolist(), strict=True) if own]
    text = "".join(tokenizer.convert_ids_to_tokens(trained)).replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")
    assert text.replace("\n", "") == "ParisLondon 4</s>"


def test_a_line_break_that_merges_with_one_of_the_prompt() -> None:
    """The prompt keeps its tokens, those of sampling; the answer's are what goes on from there."""
    tokenizer = small_tokenizer("bytes", MARKED)
    row = demonstration({"prompt": [user("what")], "completion": "\n\nyes"}, tokenizer)
    assert row.prompt.tolist() == encode_prompt([user("what")], tokenizer)
    assert tokenizer.decode(row.completion.tolist()) == "\n\nyes</s>"
    together = [*row.prompt.tolist(), *row.completion.tolist()]
    assert together != whole([user("what"), assistant("\n\nyes")], tokenizer)  # one token crosses there
    assert tokenizer.decode(together).endswith("assistant\n\n\n\nyes</s>")


# ---- Text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "completion"), [("France is", " Paris"), ("4", " 5 4"), ("what .", "\nyes")])
def test_a_text_completion_has_the_tokens_of_the_whole_text(kind: Kind, prompt: str, completion: str) -> None:
    tokenizer = small_tokenizer(kind)
    row = demonstration({"prompt": prompt, "completion": completion}, tokenizer)
    expected = [*tokenizer.encode(prompt + completion), tokenizer.eos_token_id]
    assert [*row.prompt.tolist(), *row.completion.tolist()] == expected
    assert row.prompt.tolist() == encode_prompt(prompt, tokenizer)
    rows: dict[str, Any] = {"prompt": prompt, "chosen": completion, "rejected": " no"}
    pair = PreferenceFormat().dataset([rows], tokenizer, **WIDE).batch([0])
    assert pair.completion[0, 0][pair.mask[0, 0]].tolist() == row.completion.tolist()
    one = UnpairedFormat(mismatched=False).dataset(
        [{**rows, "completion": completion, "label": True}], tokenizer, **WIDE
    )
    batch = one.batch([0])
    assert batch.completion[0, 0][batch.mask[0, 0]].tolist() == row.completion.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_ends_with_a_space_is_followed_by_no_other(kind: Kind) -> None:
    tokenizer = small_tokenizer(kind)
    row = demonstration({"prompt": "France is ", "completion": "Paris"}, tokenizer)
    assert row.prompt.tolist() == encode_prompt("France is ", tokenizer)
    assert tokenizer.decode([*row.prompt[1:].tolist(), *row.completion.tolist()]) == "France is Paris</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_spaces_of_the_text_and_ends_of_their_own(kind: Kind) -> None:
    tokenizer = small_tokenizer(kind)
    row = {"prompt": "what", "completions": [" yes.", "no", "four</s>"], "labels": [True, False, True]}
    batch = StepFormat(separator="\n").dataset([row], tokenizer, **WIDE).batch([0])
    ids = batch.completion[0, 0, : int(np_last(batch.mask[0, 0])) + 1].tolist()
    assert tokenizer.decode([*tokenizer.encode("what", add_special_tokens=False), *ids]) == "what yes.\nno\nfour</s>"
    ends = [token for token, end in zip(ids, batch.mask[0, 0].tolist(), strict=False) if end]
    newline = encode_parts(["a", "\n"], tokenizer)[1]
    assert ends == [newline[-1], newline[-1], tokenizer.eos_token_id]


def np_last(mask: Any) -> int:
    return int(mask.nonzero()[0][-1])


# ---- Ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["4</s>", "4</s>\n", "4 </s></s>"])
def test_one_end_where_the_data_have_one_already(said: str) -> None:
    for kind in KINDS:
        tokenizer = small_tokenizer(kind, LINES)
        rows = (
            demonstration({"prompt": "5 ", "completion": said}, tokenizer),
            demonstration({"m": [user("5"), assistant(said)]}, tokenizer, messages_column="m"),
            demonstration({"m": [*TALK, user("5"), assistant(said)]}, tokenizer, messages_column="m"),
        )
        pair: dict[str, Any] = {"prompt": [user("5")], "chosen": [assistant(said)], "rejected": said}
        batch = PreferenceFormat().dataset([pair], tokenizer, **WIDE).batch([0])
        sides = [side[mask].tolist() for side, mask in zip(batch.completion[0], batch.mask[0], strict=True)]
        for ids in [*(row.completion.tolist() for row in rows), *sides]:
            assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


def test_the_end_that_a_text_has_is_the_one_that_is_kept() -> None:
    ends = {"<a>": 3, "<b>": 4}
    assert without_end("x<a><b>\n", ends) == ("x", 3)
    assert without_end("x<a> y", ends) == ("x<a> y", None)
    assert without_end("x \n", ends) == ("x \n", None)


# ---- Characters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["prompt", "completion", "message", "tool"])
def test_half_of_a_character_is_refused_with_its_row(form: str) -> None:
    broken, tokenizer = "a \ud83d b", small_tokenizer("bytes", "{{ tools[0].name }}" + LINES)
    fine = {"prompt": "a", "completion": "b", "m": TALK, "tools": [{"name": "f"}]}
    row = (
        fine
        | {
            "prompt": {"prompt": broken},
            "completion": {"completion": broken},
            "message": {"m": [user("a"), assistant(broken)]},
            "tool": {"tools": [{"name": broken}]},
        }[form]
    )
    settings = {"messages_column": "m"} if form in ("message", "tool") else {}
    with pytest.raises(ValueError, match=r"row 1: the text holds half of a character \(the lone surrogate .* at place"):
        DemonstrationFormat(**settings).dataset([fine, row], tokenizer, **WIDE)
    if form == "prompt":
        with pytest.raises(ValueError, match=r"row 1: .*lone surrogate"):
            PromptDataset([fine, row], tokenizer, max_prompt_length=99)
    assert PromptFormat().prompt({"prompt": "\U0001f600"}) == "\U0001f600"


def test_a_tokenizer_that_cannot_read_its_own_end(tmp_path: Path) -> None:
    """One by characters, to which `<eos>` is five of them, also as transformers loads it."""
    own = CharTokenizer("0123456789+= ")
    own.save_pretrained(tmp_path)
    for tokenizer in (own, load_tokenizer(tmp_path)):
        row = demonstration({"prompt": "4+1=", "completion": " 5"}, tokenizer)
        assert tokenizer.decode([*row.prompt, *row.completion]) == "4+1= 5<eos>"
