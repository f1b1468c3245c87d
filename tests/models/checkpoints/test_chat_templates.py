"""Another chat template, and arguments for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxrl_llm.models.checkpoints.chat_templates import apply_template
from tests.data.small_tokenizers import small_tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]
THINKS = """{%- macro ask() -%}<|end|>assistant {% if style is defined %}{{ style }} {% endif %}{%- endmacro %}
{%- for m in messages %}{{ m['content'] }}{% if not enable_thinking %} /no{% endif %}{% endfor -%}
{{ ask() }}{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"""


def written(template: str | None, arguments: dict[str, Any], own: str | None = THINKS, **given: Any) -> str:
    tokenizer = small_tokenizer("bytes", own)
    apply_template(tokenizer, template, arguments)
    return tokenizer.apply_chat_template(MESSAGES, tokenize=False, **given)


def test_arguments_are_defaults_of_the_template() -> None:
    plain = "hello /no<|end|>assistant "
    assert written(None, {}) == plain
    assert written(None, {"enable_thinking": False}) == plain + "<think></think>"
    assert written(None, {"enable_thinking": True}) == "hello<|end|>assistant "
    assert written(None, {"enable_thinking": False}, enable_thinking=True) == "hello<|end|>assistant "
    assert written(None, {"style": 'it\'s "é"\n', "enable_thinking": True}) == 'hello<|end|>assistant it\'s "é"\n '
    assert written(None, {"style": [1, None, {"a": True}], "enable_thinking": True}).endswith("[1, None, {'a': True}] ")


@pytest.mark.parametrize("template", ["\n{% if true %}a{% endif %}", "  {% if true %}a{% endif %}", "\na", "a\n\n"])
def test_nothing_else_changes(template: str) -> None:
    read = template + "{{ style }}"
    assert written(None, {"style": ""}, read) == written(None, {}, read)


def test_a_template_from_a_file_and_from_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jinja").write_text("é{{ messages[0]['content'] }}", encoding="utf-8")
    assert written(str(tmp_path / "mine.jinja"), {}, None) == written("~/mine.jinja", {}) == "éhello"
    assert written("{{ messages[0]['content'] }}{{ x }}", {"x": 3}) == "hello3"
    assert written("{{ raise_exception('no') if messages | length < 2 }}", {}, None, chat_template="a") == "a"


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        ("nowhere.jinja", {}, r"chat template 'nowhere.jinja': .*No such file.*; give a file, or the text"),
        (".", {}, "chat template '.': .*directory"),
        ("{% if %}", {}, r"chat template '{% if %}', line 1: "),
        ("a\n{{ b", {}, r"chat template 'a\\n{{ b', line 2: "),
        (
            None,
            {"enable_thinkin": False},
            "the argument 'enable_thinkin'; did you mean 'enable_thinking'",
        ),
        (None, {"tools": []}, "template argument 'tools' is given by the data"),
    ],
)
def test_what_cannot_be_used(template: str | None, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        written(template, arguments)


def test_arguments_of_a_tokenizer_without_a_template() -> None:
    with pytest.raises(ValueError, match="have no effect: the tokenizer has no chat template"):
        written(None, {"enable_thinking": False}, None)
