import re

import numpy as np
import pytest

from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.data.tokens import encode_prompt

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be kind."}
ASSISTANT = {"role": "assistant", "content": "Hello"}


# --- from a row to a prompt ---


def test_text_and_messages_pass_as_they_are():
    assert PromptFormat().prompt({"prompt": "1+1=", "answer": "2"}) == "1+1="
    assert PromptFormat(prompt_column="question").prompt({"question": "q", "prompt": "p"}) == "q"
    assert PromptFormat().prompt({"prompt": [SYSTEM, USER, ASSISTANT, USER]}) == [
        SYSTEM,
        USER,
        ASSISTANT,
        USER,
    ]


def test_messages_are_copied_without_the_empty_entries_of_parquet():
    row = {"prompt": [{**USER, "name": None, "lang": "en"}]}
    prompt = PromptFormat().prompt(row)
    assert prompt == [{**USER, "lang": "en"}]
    prompt[0]["content"] = "changed"
    assert row["prompt"][0]["content"] == "Hi"


def test_template():
    row = {"question": "Q?", "level": {"name": "hard"}, "count": 3, "prompt": "unused"}
    template = "{question} ({level[name]}, {count:02d}) {{x}}\nAnswer:"
    assert PromptFormat(template=template).prompt(row) == "Q? (hard, 03) {x}\nAnswer:"
    assert PromptFormat(template=template).consumed_column is None
    assert PromptFormat(prompt_column="question").consumed_column == "question"


def test_template_takes_text_and_whole_numbers():
    """Of all else it says that it is to be written as Python writes it."""
    row = {"a": 5, "b": np.int64(7), "c": "x", "f": 0.5, "l": ["p", "q"]}
    assert PromptFormat(template="{a} {b} {c} {l[1]}").prompt(row) == "5 7 x q"
    assert PromptFormat(template="{f!s} {f:.2f} {l!r} {a:>3}").prompt(row) == "0.5 0.50 ['p', 'q']   5"


@pytest.mark.parametrize("value", [0.5, True, b"Hi", ["a"], {"a": 1}, float("nan"), np.float32(2), [USER]])
def test_template_of_what_is_no_text(value):
    kind = type(value).__name__
    with pytest.raises(
        ValueError, match=rf"^{{q}} of template '{{q}}': .* is a {kind}, .*make it text, or write {{q!s}}"
    ):
        PromptFormat(template="{q}").prompt({"q": value})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{q.x}", "'str' object has no attribute 'x'"),
        ("{q[x]}", "string ind"),
        ("{q:d}", "Unknown format code 'd'"),
        ("{q!x}", "Unknown conversion specifier"),
        ("{n[9]}", "index out of range"),
    ],
)
def test_template_that_does_not_fit_the_row(template, message):
    with pytest.raises(ValueError, match=rf"of template '{re.escape(template)}': .*{message}"):
        PromptFormat(template=template).prompt({"q": "text", "n": [1]})


def test_conversational():
    row = {"prompt": "Hi"}
    assert PromptFormat(conversational=True).prompt(row) == [USER]
    assert PromptFormat(conversational=True, system="Be kind.").prompt(row) == [SYSTEM, USER]
    assert PromptFormat(system="Be kind.").prompt(row) == [SYSTEM, USER]
    assert PromptFormat(system="Be kind.").prompt({"prompt": [USER]}) == [SYSTEM, USER]
    assert PromptFormat(template="{q}", conversational=True).prompt({"q": "Hi"}) == [USER]
    assert PromptFormat(conversational=False).prompt(row) == "Hi"


@pytest.mark.parametrize(
    ("prompt_format", "row", "message"),
    [
        (PromptFormat(), {"promt": 1, "x": 1}, r"'prompt'; did you mean 'promt'\? \(columns: promt, x\)"),
        (PromptFormat(), {"Prompt": "a"}, "did you mean 'Prompt'"),
        (PromptFormat(), {"zzz": "a"}, r"no column 'prompt' \(columns: zzz\); prompt_column names"),
        (PromptFormat(template="{qestion}"), {"question": "a"}, "'qestion'; did you mean 'question'"),
        (PromptFormat(), {"prompt": None}, r"column 'prompt' is empty \(None\)"),
        (PromptFormat(template="{q}"), {"q": None}, "column 'q' is empty"),
        (PromptFormat(), {"prompt": 3}, "expected text or a list of messages, got 3"),
        (PromptFormat(), {"prompt": []}, r"list of messages, got \[\]"),
        (PromptFormat(), {"prompt": ["Hi"]}, "a message is an object with role and content, got 'Hi'"),
        (PromptFormat(), {"prompt": [{"from": "user", "content": "Hi"}]}, "needs role and content"),
        (PromptFormat(), {"prompt": [{"role": "user", "content": [1]}]}, "message 0, part 0: content .* type 'int'"),
        (PromptFormat(), {"prompt": [USER, ASSISTANT]}, "last message is the assistant's"),
        (PromptFormat(conversational=False), {"prompt": [USER]}, "conversational=False, but .* list"),
        (PromptFormat(system="x"), {"prompt": [SYSTEM, USER]}, "has a system message already"),
    ],
)  # fmt: skip
def test_rows_without_a_prompt(prompt_format, row, message):
    with pytest.raises(ValueError, match=message):
        prompt_format.prompt(row)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"system": "x", "conversational": False}, "system message needs conversational prompts"),
        ({"template": "no column"}, "uses no column"),
        ({"template": "{q:>2000000000}"}, r"{q:>2000000000} pads beyond 100000 characters"),
        ({"template": "{q:{q}}"}, r"write the width in {q:{q}} as a number"),
        ({"template": "{q:.2000000000f}"}, "pads beyond"),
        ({"template": "{}"}, "name a column in each pair of braces"),
        ({"template": "{0}"}, "name a column in each pair of braces"),
        ({"template": '{"a": 1'}, "write a brace itself as {{ or }}"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptFormat(**settings)


# --- from a prompt to tokens ---

WORDS = ["<s>", "</s>", "Hi", "yes", "user", "assistant", ":"]
S, END, HI, YES, ROLE_USER, ROLE_ASSISTANT, COLON = range(7)


def word_tokenizer(prefix: str = "", suffix: str = "", chat_template: str | None = None):
    """A transformers tokenizer of a few words that writes special tokens before and after a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A {suffix}".split(), special_tokens=[("<s>", S), ("</s>", END)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def test_text_gets_its_special_tokens_once():
    assert encode_prompt("Hi yes", word_tokenizer()) == [HI, YES]
    assert encode_prompt("Hi yes", word_tokenizer("<s>")) == [S, HI, YES]
    assert encode_prompt("<s> Hi", word_tokenizer("<s>")) == [S, HI]
    assert encode_prompt("<s> Hi", word_tokenizer()) == [S, HI]


def test_no_end_of_text_after_the_prompt():
    assert encode_prompt("Hi yes", word_tokenizer("<s>", "</s>")) == [S, HI, YES]
    # One that the text itself has is left.
    assert encode_prompt("Hi </s>", word_tokenizer("<s>")) == [S, HI, END]


TEMPLATE = (
    "{{ '<s> ' }}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
)


@pytest.mark.parametrize("affixes", [(), ("<s>",), ("<s>", "</s>")])
def test_messages_get_only_what_the_template_writes(affixes):
    tokenizer = word_tokenizer(*affixes, chat_template=TEMPLATE)
    assert encode_prompt([USER], tokenizer) == [S, ROLE_USER, COLON, HI, END, ROLE_ASSISTANT, COLON]


def test_template_without_bos_gets_none():
    tokenizer = word_tokenizer("<s>", chat_template=TEMPLATE.removeprefix("{{ '<s> ' }}"))
    assert encode_prompt([USER], tokenizer) == [ROLE_USER, COLON, HI, END, ROLE_ASSISTANT, COLON]


def test_prompts_that_cannot_be_encoded():
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        encode_prompt([USER], CharTokenizer("Hi"))
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        encode_prompt("", CharTokenizer("Hi"))
