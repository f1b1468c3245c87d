import threading
import warnings

import pytest

from jaxrl_llm.rewards import make_python_syntax_reward, python_syntax_reward


def score(completion, reward=python_syntax_reward):
    return reward(prompts=[""], completions=[completion])[0]


@pytest.mark.parametrize(
    "completion",
    [
        "x = 1",
        "def f(x):\n    return x\n",
        "```python\nx = 1\n```",
        "```python\r\nif x:\r\n    y\r\n```\r\n",
        "Here:\n```py\nfor i in range(3):\n    print(i)\n```\nDone, isn't it?",
        "```\nx = 1\n```",
        "~~~python\nx = '```'\n~~~",
        "````python\nx = '''\n```\n'''\n````",
        "```python\nx = (\n```\nBetter:\n```python\nx = 1\n```",
        "1. A list:\n   ```python\n   if x:\n       y = 1\n   ```",
        "```python\nx = 1",  # cut off, but what there is parses
        "naïve = '語'",
        "x = '\u2028'",
        "x = '\\d'",  # an invalid escape warns and parses
        "x = 1 is 1",
        "import os; os.remove('/nothing/such')",
        [{"role": "assistant", "content": "```python\nx = 1\n```"}],
    ],
)
def test_parses(completion):
    assert score(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "   \n",
        "# a comment only",
        "```python\n```",
        "```",
        "This is prose.",
        "def f(:",
        "x = 1\n```python\nx = (\n```",
        "```python\nx = 1\n```\nor\n```python\nx = (\n```",
        "if x:\ny = 1",
        "x = 1\x00",
        "x = '\ud800'",
        "(" * 100_000,
        "1" * 100_000,
        "    " * 150 + "x",
        "\n".join(" " * i + "if x:" for i in range(200)),
    ],
)
def test_does_not_parse(completion):
    assert score(completion) == 0.0


@pytest.mark.parametrize(
    "completion",
    ["(" * 150 + ")" * 150, "[" * 100_000 + "]" * 100_000, "-" * 1_000_000 + "1", "x" + ".a" * 500_000],
)
def test_deep_nesting_is_survived(completion):
    # How deep the parser goes is for each version of Python to say.
    assert score(completion) in (0.0, 1.0)


def test_require_fence():
    reward = make_python_syntax_reward(require_fence=True, name="code")
    assert reward.__name__ == "code"
    assert python_syntax_reward.__name__ == "python_syntax_reward"
    assert score("Yes", reward) == 0.0
    assert score("Yes") == 1.0
    assert score("```\nyes\n```", reward) == 1.0
    assert score("inline ```code``` only", reward) == 0.0
    assert score("```code```", reward) == 0.0


def test_never_executes(tmp_path):
    target = tmp_path / "made"
    assert score(f"open({str(target)!r}, 'w')") == 1.0
    assert not target.exists()


def test_threads_leave_the_warning_filters_alone():
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [score("x = '\\d'") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
