import subprocess
import sys

import numpy as np
import pytest

from jaxrl_llm.data.encoded_rows import counted
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.prompts import PromptDataset, _stable_text
from jaxrl_llm.data.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer("abcdefgh+=0123456789")
ROWS = [{"prompt": "a", "answer": 1}, {"prompt": "bcd"}, {"prompt": "ef", "level": "hard", "answer": 3}]


def test_batch():
    dataset = PromptDataset(ROWS, TOKENIZER, max_prompt_length=4)
    assert (len(dataset), dataset.dropped, dataset.longest) == (3, 0, 3)
    batch = dataset.batch([1, 2, 1], epoch=5)
    assert batch.tokens.tolist() == [[3, 4, 5, 0], [6, 7, 0, 0], [3, 4, 5, 0]]
    assert batch.tokens.dtype == batch.lengths.dtype == np.int32
    assert batch.lengths.tolist() == [3, 2, 3]
    assert batch.prompts == ["bcd", "ef", "bcd"]
    assert batch.columns == {"answer": [None, 3, None], "level": [None, "hard", None]}
    assert batch.indices.tolist() == [1, 2, 1]
    assert batch.valid.tolist() == [True] * 3
    assert batch.epoch == 5


def test_columns_do_not_depend_on_the_rows_of_a_batch():
    dataset = PromptDataset(ROWS, TOKENIZER, max_prompt_length=4)
    assert dataset.column_names == ("answer", "level")
    assert dataset.batch([1]).columns == {"answer": [None], "level": [None]}


def test_a_template_leaves_its_columns_to_the_rewards():
    rows = [{"question": "1", "prompt": "x"}]
    dataset = PromptDataset(rows, TOKENIZER, max_prompt_length=4, prompt_format=PromptFormat(template="{question}="))
    batch = dataset.batch([0])
    assert batch.prompts == ["1="]
    assert batch.columns == {"question": ["1"], "prompt": ["x"]}


def test_too_long_prompts_raise():
    rows = [{"prompt": text} for text in ("ab", "abcd", "abc", "abcdef")]
    with pytest.raises(
        ValueError,
        match=r"row 1: the prompt has 4 tokens, more than max_prompt_length=3 \(2 of 4 prompts are too long, "
        r"the longest has 6\); raise max_prompt_length or set overlong='drop'",
    ):
        PromptDataset(rows, TOKENIZER, max_prompt_length=3)
    PromptDataset(rows, TOKENIZER, max_prompt_length=6)


def test_too_long_prompts_are_dropped_and_counted():
    rows = [{"prompt": text, "n": n} for n, text in enumerate(("abcd", "ab", "abcde", "abc"))]
    dataset = PromptDataset(rows, TOKENIZER, max_prompt_length=3, overlong="drop")
    assert (len(dataset), dataset.dropped, dataset.longest) == (2, 2, 3)
    batch = dataset.batch([0, 1])
    assert batch.indices.tolist() == batch.columns["n"] == [1, 3]
    assert batch.tokens.tolist() == [[2, 3, 0], [2, 3, 4]]
    with pytest.raises(ValueError, match=r"4 of 4 prompts .* raise max_prompt_length$"):
        PromptDataset(rows, TOKENIZER, max_prompt_length=1, overlong="drop")


def test_first_rows_only():
    dataset = PromptDataset([*ROWS, {"no": "prompt"}], TOKENIZER, max_prompt_length=4, max_rows=2)
    assert len(dataset) == 2
    assert dataset.column_names == ("answer",)
    assert len(PromptDataset(ROWS, TOKENIZER, max_prompt_length=4, max_rows=99)) == 3


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "the data set has no rows"),
        ([{"prompt": "a"}, "b"], {}, "row 1 is a str, not a mapping of columns: 'b'"),
        ([{"prompt": "a"}, {"promt": "b"}], {}, "row 1: no column 'prompt'; did you mean 'promt'"),
        ([{"prompt": "a"}, {"prompt": "ax"}], {}, "row 1: character 'x' at position 1"),
        ([{"prompt": "a"}, {"prompt": ""}], {}, "row 1: the prompt has no tokens"),
        ([{"prompt": "a", "completions": 1}], {}, "column 'completions' clashes with an argument of reward"),
        ([{"prompt": "a"}], {"overlong": "cut"}, "overlong is 'raise' or 'drop', got 'cut'"),
        ([{"prompt": "a"}], {"max_rows": 0}, "max_rows must be positive, got 0"),
    ],
)
def test_what_is_refused(rows, settings, message):
    with pytest.raises(ValueError, match=message):
        PromptDataset(rows, TOKENIZER, max_prompt_length=4, **settings)


def test_tokenizer_errors_name_the_row():
    class Failing(CharTokenizer):
        def encode(self, text, *, add_special_tokens=True):
            raise RuntimeError("roles must alternate")

    with pytest.raises(ValueError, match="row 0: roles must alternate"):
        PromptDataset(ROWS, Failing("a"), max_prompt_length=4)

    class Exhausted(CharTokenizer):
        chat_template = "x"

        def encode(self, text, *, add_special_tokens=True):
            raise MemoryError

        def apply_chat_template(self, messages, **settings):
            raise MemoryError

    for prompt in ("a", [{"role": "user", "content": "a"}]):
        with pytest.raises(ValueError, match=r"row 0: .*MemoryError"):
            PromptDataset([{"prompt": prompt}], Exhausted("a"), max_prompt_length=4)


def test_tokenizer_without_padding():
    class NoPad(CharTokenizer):
        pad_token_id = None

    assert PromptDataset(ROWS, NoPad("abcdef"), max_prompt_length=2, max_rows=1).batch([0]).tokens.tolist() == [[2, 0]]


def test_fingerprint_sees_every_row():
    def fingerprint(rows, **settings):
        return PromptDataset(rows, TOKENIZER, max_prompt_length=4, **settings).fingerprint

    original = fingerprint(ROWS)
    assert original == fingerprint([dict(row) for row in ROWS])
    assert original["rows"] == original["prompts"] == 3
    assert original != fingerprint([ROWS[0], {"prompt": "bce"}, ROWS[2]])
    assert original != fingerprint([ROWS[0], {**ROWS[1], "answer": 2}, ROWS[2]])
    assert original != fingerprint(ROWS, max_rows=2)


def test_content_is_written_alike_in_every_process():
    value = "{'s': {'b', 'a', 'c'}, 'o': object(), 'n': np.arange(2), 't': (1, None, 2.5)}"
    code = f"import numpy as np\nfrom jaxrl_llm.data.prompts import _stable_text\nprint(_stable_text({value}), end='')"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {"{'s':{'a','b','c'},'o':object,'n':[0,1],'t':[1,None,2.5]}"}
    assert _stable_text({"a": "1"}) != _stable_text({"a": 1})


def test_prompts_that_are_all_alike_in_tokens_alone():
    """A chat template that never writes the messages."""

    class Deaf(CharTokenizer):
        chat_template = "hello"

        def apply_chat_template(self, messages, **settings):
            return "abc"

    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "b")]
    dataset = PromptDataset(rows, Deaf("abc"), max_prompt_length=4)
    assert dataset.remarks == ("all have the same tokens: does the chat template write the messages?",)
    assert counted(dataset, "prompts") == f"2 prompts ({dataset.remarks[0]})"
    for equal in (rows[:1], rows[:1] * 3):
        assert PromptDataset(equal, Deaf("abc"), max_prompt_length=4).remarks == ()
    assert counted(PromptDataset(ROWS, TOKENIZER, max_prompt_length=4), "prompts") == "3 prompts"
    assert counted(None, "rows") == "none"
