"""Solutions are tokenised step by step, and labels sit on the last token of their step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxrl_llm.data.encoded_rows import EncodedRows
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.rows import RowFormat
from jaxrl_llm.data.steps import LabelledSolution, StepDataset, StepFormat, encode_steps
from jaxrl_llm.data.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer("0123456789+=;,")
ROWS = [
    {"prompt": "1+2+3=", "completions": ["1+2=3", "3+3=7"], "labels": [True, False]},
    {"prompt": "4+5=", "completions": ["9;"], "labels": [0.25]},
]


class Merging:
    """A tokenizer that makes one token of a separator and what follows it, as trained ones do."""

    eos_token_id, pad_token_id, bos_token_id, chat_template = 99, 99, None, None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return list(map(ord, text.replace(";3", "#")))

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def dataset(rows: Any = ROWS, **settings: Any) -> StepDataset:
    widths = {"max_prompt_length": 8, "max_completion_length": 14}
    return StepFormat(separator=";").dataset(rows, TOKENIZER, **{**widths, **settings})


def test_a_row_becomes_tokens_and_labels_at_the_ends_of_steps():
    """The last step ends with the end of sequence, and a separator that a step brings along is not doubled."""
    batch = dataset().batch([1, 0])
    assert TOKENIZER.decode(batch.completion[1, 0]) == "1+2=3;3+3=7<eos><pad><pad>"
    assert TOKENIZER.decode(batch.completion[0, 0, :2]) == "9<eos>"
    assert TOKENIZER.decode(batch.prompt[1, : batch.prompt_lengths[1]]) == "1+2+3="
    assert [np.flatnonzero(row).tolist() for row in batch.mask[:, 0]] == [[1], [5, 11]]
    assert batch.labels[0, 0, 1] == 0.25
    assert batch.labels[1, 0, [5, 11]].tolist() == [1, 0]
    fields = [field for field in batch if field is not None]
    assert [field.shape for field in fields] == [(2, 8), (2,), (2, 1, 14), (2, 1, 14), (2, 1, 14)]
    assert [str(field.dtype) for field in fields] == ["int32", "int32", "int32", "bool", "float32"]


def test_a_separator_stays_a_token_of_its_own_whatever_follows_it():
    assert encode_steps(["1", "3"], Merging(), separator=";") == ([ord("1"), ord(";"), ord("3"), 99], [1, 3])
    assert Merging().encode("1;3") == [ord("1"), ord("#")]


def test_steps_without_a_label_do_not_count():
    solution = LabelledSolution.of([5], [6, 7, 8, 9], [1, 3], [None, 1])
    assert solution.mask.tolist() == [False, False, False, True]
    encoded = EncodedRows.fitting([[solution]], max_prompt_length=1, max_completion_length=4)
    batch = StepDataset(encoded).batch([0, 0])
    assert batch.mask.sum() == 2


def test_rows_that_cannot_be_used_raise_with_their_number():
    good = ROWS[0]
    for changes, message in [
        ({"labels": [True]}, "row 1: 2 steps have 1 labels"),
        ({"labels": [None, None]}, "row 1: no step has a label"),
        ({"labels": [True, float("nan")]}, "row 1: the label of step 1 is nan, not true, false or from -1 to 1"),
        ({"labels": ["true", True]}, "row 1: the label of step 0 is 'true'"),
        ({"labels": [True, 5]}, "row 1: the label of step 1 is 5"),
        ({"completions": "1+2=3"}, "row 1: the column 'completions' is a list of steps, text each, got '1"),
        ({"completions": ["1", 2]}, "row 1: the column 'completions' is a list of steps, text each"),
        ({"completions": []}, "row 1: the solution has no steps"),
        ({"completions": ["1", ""]}, "row 1: step 1 is empty"),
        ({"completions": ["1;2", "3"]}, "row 1: step 0 is empty, or holds the separator ';'"),
        ({"prompt": None}, "row 1: the column 'prompt' is empty"),
        ({"completions": ["123456789", "123456789"]}, "row 1: the completion has 20 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataset([good, {**good, **changes}])
    with pytest.raises(ValueError, match="has no tokens"):
        StepFormat(separator="").dataset(ROWS, TOKENIZER, max_prompt_length=8, max_completion_length=14)


def test_long_rows_can_be_dropped_and_equal_rows_have_equal_fingerprints():
    shorter = dataset(max_completion_length=5, overlong="drop")
    assert (len(shorter), shorter.dropped) == (1, 1)
    assert dataset().fingerprint == {"rows": 2, "solutions": 2, "content": "bb4a9725653fdb79"}  # of older runs, too
    changed = [{**ROWS[0], "labels": [True, True]}, ROWS[1]]
    assert dataset(changed).fingerprint != dataset().fingerprint


def test_the_format_is_one_that_trainers_take():
    assert isinstance(StepFormat(prompt=PromptFormat(template="{prompt}")), RowFormat)
