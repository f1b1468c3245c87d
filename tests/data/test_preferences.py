"""Preference pairs and labelled completions as token ids: nothing cut, nothing lost without a count."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.data.encoded_rows import counted
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.preferences import PreferenceFormat, common_beginning, dialogue_messages
from jaxrl_llm.data.rows import RowFormat
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.data.unpaired import UnpairedFormat

LETTERS = "abcdefghijklmnopqrstuvwxyzHA:!\n 0123456789"
TOKENIZER = CharTokenizer(LETTERS)
ROWS = [
    {"prompt": "a", "chosen": "good", "rejected": "ok"},
    {"prompt": "bcd", "chosen": "yes", "rejected": "no"},
    {"prompt": "ef", "chosen": "", "rejected": "long"},
]
SIZE = {"max_prompt_length": 4, "max_completion_length": 5}
HH = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: why\n\nAssistant:"
DIALOGUES = [
    {"chosen": HH + " so", "rejected": HH + " no"},
    {"chosen": HH + " so", "rejected": HH.replace("why", "who") + " no"},
    {"chosen": HH + " so", "rejected": HH + " "},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
]
LONG = {"max_prompt_length": 60, "max_completion_length": 8}


class Turns:
    """A chat template that writes `U:hi!` and `A:yes!` over a character tokenizer; `!` ends a turn."""

    pad_token_id, eos_token_id, bos_token_id, chat_template = 0, TOKENIZER.encode("!")[0], None, "turns"
    all_special_ids, added_tokens_decoder = (), {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return TOKENIZER.encode(text)

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        return TOKENIZER.decode(ids)

    def apply_chat_template(self, messages: Any, *, add_generation_prompt: bool = False, tokenize: bool) -> str:
        names = {"user": "H:", "assistant": "A:", "system": "::"}
        text = "".join(f"{names[message['role']]}{message['content']}!\n" for message in messages)
        return text + ("A:" if add_generation_prompt else "")


def text_of(ids: np.ndarray, mask: np.ndarray) -> str:
    return TOKENIZER.decode(ids[mask])


def shown(batch: Any) -> list[tuple[str, ...]]:
    """Prompt and completions of each row as text."""
    return [
        (
            TOKENIZER.decode(batch.prompt[row, : batch.prompt_lengths[row]]),
            *(text_of(*side) for side in zip(batch.completion[row], batch.mask[row], strict=True)),
        )
        for row in range(len(batch.prompt))
    ]


def test_pairs():
    dataset = PreferenceFormat().dataset(ROWS, TOKENIZER, **SIZE)
    assert (len(dataset), dataset.dropped) == (3, 0)
    batch = dataset.batch([1, 2, 1])
    assert batch.prompt.shape == (3, 4) and batch.completion.shape == batch.mask.shape == (3, 2, 5)
    assert batch.prompt.dtype == batch.prompt_lengths.dtype == batch.completion.dtype == np.int32
    assert batch.mask.dtype == bool and batch.ref_logprobs is None
    assert shown(batch) == [
        ("bcd", "yes<eos>", "no<eos>"),
        ("ef", "<eos>", "long<eos>"),
        ("bcd", "yes<eos>", "no<eos>"),
    ]
    assert (batch.completion[~batch.mask] == TOKENIZER.pad_token_id).all()


def test_too_long_pairs_raise_or_are_dropped_and_counted():
    short = {"max_prompt_length": 4, "max_completion_length": 4}
    with pytest.raises(ValueError, match=r"row 0: the completion has 5 tokens, more than max_completion_length=4"):
        PreferenceFormat().dataset(ROWS, TOKENIZER, **short)
    dataset = PreferenceFormat().dataset(ROWS, TOKENIZER, **short, overlong="drop")
    assert (len(dataset), dataset.dropped, dataset.overlong) == (1, 2, 2)
    assert shown(dataset.batch([0])) == [("bcd", "yes<eos>", "no<eos>")]


def test_dialogues_are_split_at_the_last_turn_of_the_assistant():
    """As text; those whose beginnings differ, and empty replies, are counted."""
    form = PreferenceFormat(whole_dialogues=True)
    dataset = form.dataset(DIALOGUES, TOKENIZER, **LONG)
    assert (len(dataset), dataset.unusable, dataset.overlong, dataset.dropped) == (2, 2, 0, 2)
    assert shown(dataset.batch([0, 1])) == [
        (HH, " so<eos>", " no<eos>"),
        ("\n\nHuman: a\n\nAssistant:", " b<eos>", " c<eos>"),
    ]
    dropped = form.dataset(DIALOGUES, TOKENIZER, overlong="drop", max_prompt_length=30, max_completion_length=8)
    assert (len(dropped), dropped.unusable, dropped.overlong, dropped.dropped) == (1, 2, 1, 3)
    with pytest.raises(ValueError, match="none of 2 rows is a pair"):
        form.dataset(DIALOGUES[1:3], TOKENIZER, **LONG)


def test_dialogues_become_messages_for_the_chat_template():
    """The assistant's end of turn is trained, what the template writes after it is not."""
    form = PreferenceFormat(prompt=PromptFormat(conversational=True), whole_dialogues=True)
    dataset = form.dataset(DIALOGUES, Turns(), **LONG)
    assert counted(dataset, "rows") == "2 rows (2 dropped as nothing to train on)"
    assert shown(dataset.batch([0])) == [("H:hi!\nA:yes!\nH:why!\nA:", "so!", "no!")]
    assert (len(dataset), dataset.unusable) == (2, 2)


def test_message_dialogues_and_message_completions():
    prompt = [{"role": "user", "content": "hi"}]
    yes, no = ({"role": "assistant", "content": text} for text in ("yes", "no"))
    whole = [{"chosen": [*prompt, yes], "rejected": [*prompt, no]}]
    split = [{"prompt": prompt, "chosen": [yes], "rejected": [no]}, {"prompt": prompt, "chosen": "yes", "rejected": no}]
    system = PromptFormat(system="be")
    one = PreferenceFormat(system, whole_dialogues=True).dataset(whole, Turns(), **LONG)
    other = PreferenceFormat(system).dataset(split, Turns(), **LONG)
    expected = ("::be!\nH:hi!\nA:", "yes!", "no!")
    assert shown(one.batch([0])) == [expected]
    assert shown(other.batch([0, 1])) == [expected, expected]


@pytest.mark.parametrize(
    ("rows", "form", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], {}, "row 0: no column 'rejected'"),
        ([{"prompt": "a", "chosen": "b", "rejected": None}], {}, "row 0: the column 'rejected' is empty"),
        ([{"prompt": "a", "chosen": "b", "rejected": [{}]}], {}, "row 0: the prompt is text and the completion is not"),
        (
            [{"chosen": "hi", "rejected": HH}],
            {"whole_dialogues": True},
            "row 0: the dialogue has no turn of the assist",
        ),
        ([{"chosen": [], "rejected": []}], {"whole_dialogues": True}, "row 0: expected text or a list of messages"),
        ([], {}, "no rows"),
    ],
)
def test_what_is_refused(rows, form, message):
    with pytest.raises(ValueError, match=message):
        PreferenceFormat(**form).dataset(rows, TOKENIZER, **SIZE)


def test_hh_rlhf_as_it_is_published():
    """Roles by their names, whatever is said in a turn."""
    text = "\n\nHuman: say it\n\nnow: Human: x\n\nAssistant: no\n\nHuman: ok\n\nAssistant: bye"
    assert dialogue_messages(text) == [
        {"role": "user", "content": "say it\n\nnow: Human: x"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "bye"},
    ]
    with pytest.raises(ValueError, match="begins with a blank line"):
        dialogue_messages("hello\n\nHuman: x")


def test_fingerprint_follows_content():
    def fingerprint(rows: list[Any]) -> dict[str, Any]:
        return PreferenceFormat().dataset(rows, TOKENIZER, **SIZE).fingerprint

    assert fingerprint(ROWS) == fingerprint([dict(row) for row in ROWS])
    swapped = [ROWS[0] | {"chosen": ROWS[0]["rejected"], "rejected": ROWS[0]["chosen"]}, *ROWS[1:]]
    assert fingerprint(ROWS) != fingerprint(swapped)
    assert fingerprint(ROWS) == {"rows": 3, "pairs": 3, "content": "eb8dc94cc72477d5"}  # of older runs, which go on
    samples = UnpairedFormat().dataset(SAMPLES, TOKENIZER, **SIZE).fingerprint
    assert samples == {"rows": 4, "samples": 4, "content": "55fb53301a80bbdc", "mismatched": True}
    assert json.dumps(fingerprint(ROWS))
    for form in (PreferenceFormat(), UnpairedFormat(from_pairs=True)):
        assert isinstance(form, RowFormat)
        assert form.dataset(ROWS, TOKENIZER, **SIZE).fingerprint["rows"] == 3


SAMPLES = [
    {"prompt": "a", "completion": "good", "label": True},
    {"prompt": "a", "completion": "ok", "label": False},
    {"prompt": "b", "completion": "yes", "label": True},
    {"prompt": "c", "completion": "no", "label": False},
]


def test_samples_with_the_completion_of_another_prompt():
    """One place on, the first sample would meet its own prompt."""
    dataset = UnpairedFormat().dataset(SAMPLES, TOKENIZER, **SIZE)
    assert (len(dataset), dataset.dropped, dataset.num_desirable, dataset.num_undesirable) == (4, 0, 2, 2)
    batch = dataset.batch([0, 1, 2, 3])
    assert shown(batch) == [
        ("a", "good<eos>", "yes<eos>"),
        ("a", "ok<eos>", "no<eos>"),
        ("b", "yes<eos>", "good<eos>"),
        ("c", "no<eos>", "ok<eos>"),
    ]
    assert batch.labels.shape == (4, 2) and batch.labels.dtype == bool
    assert batch.labels[:, 0].tolist() == [True, False, True, False]
    assert shown(dataset.batch([2])) == shown(batch)[2:3]  # whatever else is in the batch


def test_a_sample_that_can_meet_no_other_prompt_has_none():
    rows = [{"prompt": p, "completion": c, "label": True} for p, c in (("a", "u"), ("a", "v"), ("b", "w"))]
    batch = UnpairedFormat().dataset(rows, TOKENIZER, **SIZE).batch([0, 1, 2])
    assert shown(batch) == [("a", "u<eos>", ""), ("a", "v<eos>", "w<eos>"), ("b", "w<eos>", "u<eos>")]
    with pytest.raises(ValueError, match="two prompts at least"):
        UnpairedFormat().dataset(rows[:2], TOKENIZER, **SIZE)
    alone = UnpairedFormat(mismatched=False).dataset(rows[:2], TOKENIZER, **SIZE)
    assert alone.batch([0, 1]).mask.shape == (2, 1, 5)


def test_samples_of_pairs():
    form = UnpairedFormat(from_pairs=True, mismatched=False)
    dataset = form.dataset(ROWS, TOKENIZER, **SIZE)
    assert len(dataset) == 6
    batch = dataset.batch([0, 1, 5])
    assert shown(batch) == [("a", "good<eos>"), ("a", "ok<eos>"), ("ef", "long<eos>")]
    assert batch.labels.tolist() == [[True], [False], [False]]
    dialogues = UnpairedFormat(from_pairs=True, pairs=PreferenceFormat(whole_dialogues=True))
    counted = dialogues.dataset(DIALOGUES, TOKENIZER, **LONG)
    assert (len(counted), counted.unusable) == (4, 2)


@pytest.mark.parametrize("yes", [1, 1.0, np.int64(1), np.True_, "true", "True", " TRUE ", "1"])
@pytest.mark.parametrize("no", [0, 0.0, np.bool_(0), "false", "0"])
def test_labels_as_data_sets_write_them(yes, no):
    rows = [{**row, "label": yes if row["label"] else no} for row in SAMPLES]
    assert UnpairedFormat().dataset(rows, TOKENIZER, **SIZE).fingerprint == (
        UnpairedFormat().dataset(SAMPLES, TOKENIZER, **SIZE).fingerprint
    )


@pytest.mark.parametrize("label", [2, -1, 0.5, float("nan"), "yes", "", [1], {"label": True}])
def test_labels_must_be_true_or_false(label):
    rows = [*SAMPLES, {"prompt": "a", "completion": "b", "label": label}]
    with pytest.raises(ValueError, match=r"row 4: the column 'label' is .*: a label is true or false, or 1 or 0"):
        UnpairedFormat().dataset(rows, TOKENIZER, **SIZE)


def test_pairs_in_place_of_samples_become_samples():
    of_pairs = UnpairedFormat(from_pairs=True).dataset(ROWS, TOKENIZER, **SIZE)
    assert UnpairedFormat().dataset(ROWS, TOKENIZER, **SIZE).fingerprint == of_pairs.fingerprint
    with pytest.raises(ValueError, match=r"row 0: no column 'completion'.*; completion_column names the column"):
        UnpairedFormat().dataset([{"prompt": "a", "answer": "b", "label": 1}], TOKENIZER, **SIZE)


# ---- Rows without a prompt ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("ab cd", "ab ef", ("ab", " cd", " ef")),
        ("ab cde", "ab cdf", ("ab", " cde", " cdf")),  # not within a word
        ("ab cd", "ab cdef", ("ab", " cd", " cdef")),
        ("a:bc", "a:d", ("a:", "bc", "d")),
        ("a:  b", "a:  c", ("a:", "  b", "  c")),
    ],
)
def test_a_prompt_that_both_texts_begin_with(chosen, rejected, expected):
    assert common_beginning(chosen, rejected) == expected
    tokenizer = CharTokenizer("abcdefghij: ")
    implicit = PreferenceFormat().dataset([{"chosen": chosen, "rejected": rejected}], tokenizer, **LONG)
    row = dict(zip(("prompt", "chosen", "rejected"), expected, strict=True))
    assert implicit.fingerprint == PreferenceFormat().dataset([row], tokenizer, **LONG).fingerprint


COLUMNS = ("chosen", "rejected")


def test_dialogues_without_a_prompt_are_whole_ones():
    whole = PreferenceFormat(whole_dialogues=True).dataset(DIALOGUES, TOKENIZER, **LONG)
    assert PreferenceFormat().dataset(DIALOGUES, TOKENIZER, **LONG).fingerprint == whole.fingerprint
    messages = [
        {
            side: [{"role": "user", "content": "hi"}, {"role": "assistant", "content": side[:2]}]
            for side in ("chosen", "rejected")
        }
    ]
    assert shown(PreferenceFormat().dataset(messages, Turns(), **LONG).batch([0])) == [("H:hi!\nA:", "ch!", "re!")]
    samples = UnpairedFormat(from_pairs=True, mismatched=False).dataset(messages, Turns(), **LONG)
    assert shown(samples.batch([0, 1])) == [("H:hi!\nA:", "ch!"), ("H:hi!\nA:", "re!")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"chosen": "ab", "rejected": "cd"}],
            "row 0: no column has the prompt, .*prompt_column.*whole_dialogues",
        ),
        ([{"chosen": "good", "rejected": "go"}], "row 0: no column has the prompt"),  # within a word
        ([*ROWS, {"chosen": "b", "rejected": "c"}], "row 3: no column 'prompt' .*; prompt_column names the column"),
        ([{"chosen": "a b", "rejected": 3}], "row 0: one of both is no text"),
        ([{"prompt": "a", "better": "b", "rejected": "c"}], "row 0: no column 'chosen'.*; chosen_column names"),
    ],
)
def test_pairs_without_a_prompt_that_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        PreferenceFormat().dataset(rows, TOKENIZER, **LONG)


def test_equal_sides_are_counted_and_refused_where_all_are():
    equal = {**ROWS[0], "rejected": ROWS[0]["chosen"]}
    dataset = PreferenceFormat().dataset([*ROWS, equal, equal], TOKENIZER, **SIZE)
    assert dataset.remarks == ("chosen and rejected are equal in 2 of them, first in row 3",) and len(dataset) == 5
    assert PreferenceFormat().dataset(ROWS, TOKENIZER, **SIZE).remarks == ()
    dialogue = "\n\nHuman: hi\n\nAssistant: yes"
    for rows in ([equal] * 3, [{"chosen": dialogue, "rejected": dialogue}] * 2):
        with pytest.raises(ValueError, match=r"equal in all \d pairs, .*chosen_column and rejected_column name"):
            PreferenceFormat().dataset(rows, TOKENIZER, **LONG)
