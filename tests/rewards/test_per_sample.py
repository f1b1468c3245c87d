import inspect
import subprocess
import sys

import pytest

from jaxrl_llm.rewards import completion_text, make_per_sample_reward


def test_completion_text_of_a_string_and_of_messages():
    assert completion_text("plain\ntext") == "plain\ntext"
    assert completion_text("") == ""
    assert completion_text([{"role": "assistant", "content": "héllo"}]) == "héllo"
    assert completion_text([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]) == "a\nb"


@pytest.mark.parametrize("completion", [None, 3, [{"role": "assistant"}], [{"content": None}], ["text"]])
def test_completion_that_has_no_text_raises(completion):
    with pytest.raises(ValueError, match="string or a list of messages"):
        completion_text(completion)


def test_columns_are_part_of_the_signature_and_reach_the_rule():
    reward = make_per_sample_reward(lambda text, a, b: float(text == a + b), "sum_reward", ["a", "b"])
    assert reward.__name__ == "sum_reward"
    assert list(inspect.signature(reward).parameters) == ["prompts", "completions", "a", "b", "other_columns"]
    completions = ["xy", [{"role": "assistant", "content": "xz"}]]
    assert reward(["", ""], completions, ["x", "x"], ["y", "y"]) == [1.0, 0.0]
    assert reward(prompts=["", ""], completions=completions, b=["z", "z"], a=["x", "x"], more=[0, 0]) == [
        0.0,
        1.0,
    ]
    with pytest.raises(TypeError, match=r"sum_reward\(\): missing a required argument: 'b'"):
        reward(prompts=[""], completions=["x"], a=["x"])


def test_columns_of_another_length_and_unusable_names_raise():
    reward = make_per_sample_reward(lambda text, a: 1.0, "reward", ["a"])
    with pytest.raises(ValueError):
        reward(["", ""], ["x", "y"], ["only one"])
    with pytest.raises(ValueError, match="final answer"):
        make_per_sample_reward(lambda text, a: 1.0, "reward", ["final answer"])


def test_importing_the_rewards_loads_neither_math_verify_nor_jax():
    code = (
        "import sys, jaxrl_llm.rewards; "
        "print([m for m in ('math_verify', 'sympy', 'jax', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
