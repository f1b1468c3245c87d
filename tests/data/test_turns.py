"""Turns of the assistant under templates that open thoughts, forget them, or want a conversation of their kind."""

from __future__ import annotations

from typing import Any

import pytest

from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.preferences import PreferenceFormat
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.models.checkpoints.tokenizers import stop_token_ids
from tests.data.small_tokenizers import small_tokenizer
from tests.data.test_tokens import TALK, WIDE, assistant, demonstration, user

ROLE = "<|end|>{{ m['role'] }}\n"
TURNS = "{% for m in messages %}" + ROLE + "{{ m['content'] }}</s>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|end|>assistant\n"
KEEPS = TURNS + ASK + "<think>\n{% endif %}"
"""Opens a thought, and leaves what was said as it is."""
STRIPS = TURNS.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1].lstrip() }}")
"""Forgets thoughts."""
OPENS_AND_STRIPS = STRIPS + ASK + "<think>\n{% endif %}"
STRIPS_ONLY = STRIPS + ASK + "{% endif %}"
NO_THOUGHT = TURNS + ASK + "<think>\n\n</think>\n\n{% endif %}"
"""Begins with an empty thought, as where thinking is switched off."""

THOUGHT = "<think>\nhm\n</think>\n\nfour"
START = "<|end|>user\nwhat</s>\n<|end|>assistant\n"


def shown(template: str, said: str, **more: Any) -> tuple[str, str]:
    tokenizer = small_tokenizer("bytes", template)
    row = demonstration({"prompt": [user("what")], "completion": [assistant(said, **more)]}, tokenizer)
    assert row.mask.all()
    return tokenizer.decode(row.prompt), tokenizer.decode(row.completion)


@pytest.mark.parametrize(
    ("template", "said", "prompt", "completion"),
    [
        # A reply with a thought begins inside of the one that the prompt opens …
        (KEEPS, THOUGHT, "<think>\n", "hm\n</think>\n\nfour</s>"),
        (KEEPS, "<think>hm</think>four", "<think>\n", "hm</think>four</s>"),
        (KEEPS, "hm\n</think>\n\nfour", "<think>\n", "hm\n</think>\n\nfour</s>"),
        (OPENS_AND_STRIPS, THOUGHT, "<think>\n", "hm\n</think>\n\nfour</s>"),
        (OPENS_AND_STRIPS, "hm\n</think>\n\nfour", "<think>\n", "hm\n</think>\n\nfour</s>"),
        (OPENS_AND_STRIPS, "<think>4</think>4", "<think>\n", "4</think>4</s>"),
        # … one without begins before it, as the template writes it …
        (KEEPS, "four", "", "four</s>"),
        (OPENS_AND_STRIPS, "four", "", "four</s>"),
        # … and what the template forgets is learned all the same.
        (STRIPS_ONLY, THOUGHT, "", THOUGHT + "</s>"),
        (STRIPS_ONLY, "four", "", "four</s>"),
        (NO_THOUGHT, "four", "<think>\n\n</think>\n\n", "four</s>"),
        (NO_THOUGHT, THOUGHT, "", THOUGHT + "</s>"),
    ],
)
def test_a_reply_follows_the_prompt_of_sampling(template: str, said: str, prompt: str, completion: str) -> None:
    assert shown(template, said) == (START + prompt, completion)


@pytest.mark.parametrize("template", [KEEPS, OPENS_AND_STRIPS])
@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "completions"),
    [
        (THOUGHT, "<think>\nno\n</think>\nfive", "<think>\n", ["hm\n</think>\n\nfour</s>", "no\n</think>\nfive</s>"]),
        ("good", "bad", "", ["good</s>", "bad</s>"]),
        (THOUGHT, "bad", "", [THOUGHT + "</s>", "bad</s>"]),
        ("good", THOUGHT, "", ["good</s>", THOUGHT + "</s>"]),
    ],
)
def test_pairs_have_one_prompt(template: str, chosen: str, rejected: str, prompt: str, completions: list[str]) -> None:
    tokenizer = small_tokenizer("bytes", template)
    row = {"prompt": [user("what")], "chosen": [assistant(chosen)], "rejected": rejected}
    batch = PreferenceFormat().dataset([row], tokenizer, **WIDE).batch([0])
    assert tokenizer.decode(batch.prompt[0, : batch.prompt_lengths[0]]) == START + prompt
    sides = zip(batch.completion[0], batch.mask[0], strict=True)
    assert [tokenizer.decode(side[mask]) for side, mask in sides] == completions


@pytest.mark.parametrize("template", [KEEPS, OPENS_AND_STRIPS, STRIPS_ONLY])
def test_every_turn_of_a_conversation_without_thoughts(template: str) -> None:
    tokenizer = small_tokenizer("bytes", template)
    row = demonstration({"m": TALK}, tokenizer, messages_column="m", train_on="assistant_only")
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode([*row.prompt, *row.completion]) + "\n" == whole
    trained = [token for token, own in zip(row.completion, row.mask, strict=True) if own]
    assert tokenizer.decode(trained) == "Paris</s>London 4</s>"


def test_an_earlier_thought_that_is_forgotten_is_an_error_that_says_what_to_do() -> None:
    talk = [user("what"), assistant(THOUGHT), *TALK]
    tokenizer = small_tokenizer("bytes", STRIPS_ONLY)
    with pytest.raises(ValueError, match=r"row 0: the chat template writes the beginning .*train_on='completion_only'"):
        demonstration({"m": talk}, tokenizer, messages_column="m", train_on="assistant_only")
    row = demonstration({"m": talk}, tokenizer, messages_column="m")
    assert tokenizer.decode(row.completion) == "London 4</s>"


# ---- Templates that want something -------------------------------------------------------------------------

SYSTEM_FIRST = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message must come first') }}"
SYSTEM_FIRST += "{% endif %}" + TURNS + ASK + "{% endif %}"
ALTERNATES = "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
ALTERNATES += "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TURNS + ASK + "{% endif %}"
ASSISTANT_ONLY = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}" + TURNS


def test_the_end_of_a_turn_is_found_whatever_the_template_wants() -> None:
    for template in (SYSTEM_FIRST, ALTERNATES, ASSISTANT_ONLY, TURNS):
        tokenizer = small_tokenizer("bytes", template.replace("</s>", "<|end|>"))
        assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>"))
    for template in ("hello", "{{ raise_exception('never') }}", "<|end|>{{ messages[0]['role'] }}"):
        assert stop_token_ids(small_tokenizer("bytes", template)) == (2,)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            SYSTEM_FIRST,
            {"prompt": [user("a")]},
            r"row 1: .* refuses this conversation \(user\): a system",
        ),
        (
            ALTERNATES,
            {"prompt": [user("a"), user("b")]},
            r"row 1: .* conversation \(user, user\): roles must",
        ),
        (
            TURNS + "{{ messages[3].content }}",
            {"prompt": [user("a")]},
            "row 1: the chat template refuses .* element 3",
        ),
    ],
)
def test_what_a_template_refuses_is_an_error_that_names_the_row(template: str, row: Any, message: str) -> None:
    tokenizer, fine = small_tokenizer("bytes", template), {"prompt": "text", "completion": "a", "rejected": "b"}
    row = {**fine, **row, "chosen": "c"}
    for read in (
        lambda rows: PromptDataset(rows, tokenizer, max_prompt_length=99),
        lambda rows: PreferenceFormat().dataset([{**each, "chosen": "c"} for each in rows], tokenizer, **WIDE),
    ):
        with pytest.raises(ValueError, match=message + r".*--model.chat-template"):
            read([fine, row])


def test_the_way_out_is_one() -> None:
    tokenizer = small_tokenizer("bytes", SYSTEM_FIRST)
    row = demonstration({"prompt": [user("a")], "completion": "b"}, tokenizer, prompt=PromptFormat(system="s"))
    assert tokenizer.decode(row.prompt) == "<|end|>system\ns</s>\n<|end|>user\na</s>\n<|end|>assistant\n"


@pytest.mark.parametrize("history", [[], [{"role": "system", "content": "s"}]])
def test_an_assistant_that_speaks_first(history: list[Any]) -> None:
    tokenizer = small_tokenizer("bytes", TURNS + ASK + "{% endif %}{{ messages[0]['none'] }}")
    row = demonstration({"m": [*history, assistant("hello")]}, tokenizer, messages_column="m")
    assert tokenizer.decode(row.prompt) == "<|end|>system\ns</s>\n" * len(history) + "<|end|>assistant\n"
    assert tokenizer.decode(row.completion) == "hello</s>"


def test_a_template_that_never_writes_what_was_said() -> None:
    tokenizer = small_tokenizer("bytes", "hello")
    with pytest.raises(ValueError, match="row 0: the chat template does not write what the assistant says"):
        demonstration({"m": TALK}, tokenizer, messages_column="m")
