"""From a row to a prompt.

A prompt is plain text or conversational: a list of messages with `role` and `content`. Both are what reward
functions receive, before any chat template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxrl_llm.checks import nearest_name
from jaxrl_llm.data.interfaces import Row
from jaxrl_llm.data.messages import Message, check_messages
from jaxrl_llm.data.prompt_templates import fill_template, template_columns

Prompt = str | list[Message]


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes a prompt.

    Raises:
        ValueError: The template is not a format string over named columns, or a system message is given for
            plain prompts.
    """

    prompt_column: str = "prompt"
    """Column with the prompt, text or messages. Not read where `template` is given."""

    template: str | None = None
    """Python format string over the row's columns, such as `"{question}\\nAnswer:"`; `{{` writes a brace. Columns
    are text or whole numbers; `{score!s}` takes others as Python writes them."""

    system: str | None = None
    """System message put before the prompt; makes text prompts conversational."""

    conversational: bool | None = None
    """True wraps text into a user message, so that the chat template applies; False insists on text; None
    leaves the prompt as the row has it."""

    def __post_init__(self) -> None:
        if self.system is not None and self.conversational is False:
            raise ValueError("a system message needs conversational prompts: leave out system or conversational=False")
        if self.template is not None:
            template_columns(self.template)

    @property
    def consumed_column(self) -> str | None:
        """The column that reward functions receive as `prompts` rather than under its own name."""
        return self.prompt_column if self.template is None else None

    def prompt(self, row: Row) -> Prompt:
        """Returns the prompt of a row, as reward functions see it.

        Raises:
            ValueError: A column is missing or empty, or the prompt is neither text nor a list of messages
                that ends with the user's.
        """
        if self.template is None:
            prompt = column_of(row, self.prompt_column, setting="prompt_column")
        else:
            columns = {name: column_of(row, name) for name in template_columns(self.template)}
            prompt = fill_template(self.template, columns)
        if isinstance(prompt, str):
            if not self.conversational and self.system is None:
                return prompt
            messages: list[Message] = [{"role": "user", "content": prompt}]
        elif self.conversational is False:
            raise ValueError(f"conversational=False, but the prompt is a {type(prompt).__name__}, not text")
        else:
            messages = check_messages(prompt)
            if messages[-1]["role"] == "assistant":
                raise ValueError("the last message is the assistant's; a prompt ends before its turn")
        return self.with_system(messages)

    def with_system(self, messages: list[Message]) -> list[Message]:
        """Messages with the system message in front, if there is to be one.

        Raises:
            ValueError: they have another one.
        """
        if self.system is None:
            return messages
        if messages[0]["role"] == "system":
            raise ValueError("the prompt has a system message already; leave out system=")
        return [{"role": "system", "content": self.system}, *messages]


def column_of(row: Row, name: str, *, setting: str | None = None) -> Any:
    """The value of a column.

    Args:
        row: of the data.
        name: of the column.
        setting: that names another, for errors.

    Raises:
        ValueError: it is missing or empty; names the nearest one, and the setting.
    """
    if name not in row:
        way_out = f"; {setting} names the column" if setting else ""
        raise ValueError(f"no column {name!r}{nearest_name(name, list(row))} (columns: {', '.join(row)}){way_out}")
    if row[name] is None:
        raise ValueError(f"the column {name!r} is empty (None)")
    return row[name]
