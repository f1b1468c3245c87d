"""A chat template of one's own, and arguments for the one that there is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.checks import nearest_name

_GIVEN = ("messages", "tools", "add_generation_prompt")
"""Arguments that a template gets anyway."""


def read_template(template: str) -> str:
    """The template itself: of a path the file's content, of anything that holds a brace the text as it is.

    Raises:
        ValueError: there is no such file, or it is no text.
    """
    if "{" in template or "\n" in template:
        return template
    path = Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"chat template {template!r}: {error}; give a file, or the text of a Jinja template, which holds braces"
        ) from error


def apply_template(tokenizer: Any, template: str | None, arguments: Mapping[str, Any]) -> None:
    """Gives a tokenizer another chat template, or arguments for its own.

    Arguments become defaults written at the beginning of the template, so that they hold wherever it is used, also
    where the exported model is served, unless it is given others there.

    Args:
        tokenizer: see `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer`; changed.
        template: as `read_template`; `None`: the tokenizer's own.
        arguments: such as `{"enable_thinking": False}`.

    Raises:
        ValueError: the template cannot be read or is no Jinja template, or does not read an argument.
    """
    if template is not None:
        tokenizer.chat_template = read_template(template)
        _check_syntax(tokenizer, template)
    if not arguments:
        return
    if tokenizer.chat_template is None:
        raise ValueError(f"template arguments {dict(arguments)} have no effect: the tokenizer has no chat template")
    if isinstance(tokenizer.chat_template, Mapping):  # several by name
        own = {name: _with_arguments(text, arguments) for name, text in tokenizer.chat_template.items()}
    else:
        own = _with_arguments(tokenizer.chat_template, arguments)
    tokenizer.chat_template = own


def _with_arguments(text: str, arguments: Mapping[str, Any]) -> str:
    names = re.findall(r"[A-Za-z_]\w*", text)
    for name in arguments:
        if name in _GIVEN:
            raise ValueError(f"template argument {name!r} is given by the data: leave it out")
        if name not in names:
            raise ValueError(f"the chat template does not read the argument {name!r}{nearest_name(name, names)}")
    defaults = (
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in arguments.items()
    )
    return "".join(defaults) + "\n" + text  # templates are read so that a line break behind a block is not written


def _check_syntax(tokenizer: Any, name: str) -> None:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"chat template {name[:80]!r}, line {error.lineno}: {error.message}") from error
    except (TemplateError, TypeError):  # it is a template, and refuses this conversation: rows are not this one
        pass
