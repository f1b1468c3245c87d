"""Whether the code in a completion is Python, judged by the parser alone: nothing is executed."""

from __future__ import annotations

import ast
import re
import threading
import warnings

from jaxrl_llm.rewards.per_sample import RewardFunction, make_per_sample_reward

_FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>.*)")
# `warnings.catch_warnings` swaps a list of the whole process: of two threads in it, one could leave its own.
_WARNINGS_LOCK = threading.Lock()


def _last_code_block(text: str) -> str | None:
    """Returns what stands in the last Markdown fence, or None if there is none.

    As in CommonMark, a fence closes with at least as many of the same characters, a block that is never
    closed runs to the end, and the fence's own indentation is taken off its lines.
    """
    block: list[str] | None = None
    opening: re.Match[str] | None = None
    for line in text.split("\n"):
        match = _FENCE.fullmatch(line)
        if opening is None:
            # Backticks in the info string make it inline code.
            if match and not (match["fence"][0] == "`" and "`" in match["info"]):
                opening, block = match, []
        elif match and match["fence"].startswith(opening["fence"]) and not match["info"].strip():
            opening = None
        else:
            assert block is not None
            block.append(line.removeprefix(opening["indent"]))
    return None if block is None else "\n".join(block)


def _parses(source: str) -> bool:
    """Whether `source` is Python with at least one statement."""
    try:
        with _WARNINGS_LOCK, warnings.catch_warnings():
            # "\d" in a sampled string is no news to the user, and no error either.
            warnings.simplefilter("ignore")
            return bool(ast.parse(source).body)
    # ValueError: null bytes, lone surrogates. The last two: deep nesting.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def make_python_syntax_reward(*, require_fence: bool = False, name: str = "python_syntax_reward") -> RewardFunction:
    """Returns the reward 1 for a completion whose code parses as Python, else 0.

    The code is the last fenced block, in whatever language it says it is; without a fence it is the whole
    text. It must hold at least one statement: nothing, or comments only, is no program. It is parsed by the
    running Python.

    Args:
        require_fence: Whether a completion without a fence gets 0. A single word of prose is valid Python, so
            set it where the model is to answer in Markdown.
        name: The metric's name.
    """

    def score(text: str) -> float:
        """1 where the last fenced block (or, without one, the whole text) parses as Python, else 0."""
        block = _last_code_block(text)
        if block is None and require_fence:
            return 0.0
        return float(_parses(text if block is None else block))

    return make_per_sample_reward(score, name)


#: `make_python_syntax_reward()`: the last fenced block, or the whole text, parses as Python.
python_syntax_reward = make_python_syntax_reward()
