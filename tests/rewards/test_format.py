import re

import pytest

from jaxrl_llm.rewards import make_regex_reward, make_think_answer_reward


def score(reward, completion):
    return reward(prompts=[""], completions=[completion], column=[1])[0]


def test_regex_matches_the_whole_completion():
    reward = make_regex_reward(r"Answer: \d+")
    assert score(reward, "Answer: 12") == 1.0
    assert score(reward, [{"role": "assistant", "content": "Answer: 12"}]) == 1.0
    assert score(reward, "Answer: 12\n") == 0.0
    assert score(reward, "The Answer: 12") == 0.0
    assert score(reward, "") == 0.0


def test_regex_flags_and_name():
    assert score(make_regex_reward("<a>.*</a>"), "<a>\n</a>") == 1.0
    assert score(make_regex_reward("<a>.*</a>", flags=re.NOFLAG), "<a>\n</a>") == 0.0
    assert make_regex_reward("a").__name__ == "regex_reward"
    assert make_regex_reward("a", name="shape").__name__ == "shape"


def test_regex_that_does_not_compile_raises():
    with pytest.raises(ValueError, match=r"'\(unclosed' is no regular expression"):
        make_regex_reward("(unclosed")


# completion, number of tags that occur exactly once, whether it is well formed
THINK_ANSWER = [
    ("<think>a</think><answer>b</answer>", 4, True),
    (" \n<think>\na\nb\n</think>\n\n<answer>ü 語</answer>\n", 4, True),
    ("<think></think><answer></answer>", 4, True),
    ("", 0, False),
    ("b", 0, False),
    ("<think>a", 1, False),
    ("<think>a</think>", 2, False),
    ("<think>a</think> so <answer>b</answer>", 4, False),
    ("Sure! <think>a</think><answer>b</answer>", 4, False),
    ("<think>a</think><answer>b</answer> done", 4, False),
    ("<answer>b</answer><think>a</think>", 4, False),
    ("<think>a<answer>b</answer></think>", 4, False),
    ("</answer></think><answer><think>", 4, False),
    ("<think><think>a</think></think><answer>b</answer>", 2, False),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 2, False),
    ("<think>a</think><answer>b</answer>" * 2, 0, False),
    ("<Think>a</Think><answer>b</answer>", 2, False),
    ("<think >a</think><answer>b</answer>", 4, True),
    ("a</think><answer>b</answer>", 4, True),
    ("a\n</think>\n", 2, False),
    ("a</think>so <answer>b</answer>", 4, False),
    ("a</think></think><answer>b</answer>", 3, False),
    ("a<answer>b</answer>", 2, False),
    ("<answer>b</answer>a</think>", 4, False),
    ("<think>" * 50_000, 0, False),
]


@pytest.mark.parametrize(("completion", "single", "well_formed"), THINK_ANSWER)
def test_think_answer(completion, single, well_formed):
    assert score(make_think_answer_reward(), completion) == float(well_formed)
    assert score(make_think_answer_reward(graded=True), completion) == pytest.approx((single + well_formed) / 5)


def test_graded_reward_rises_tag_by_tag_and_ends_at_one():
    text, rewards = "", []
    for part in ("<think>", "a</think>", "<answer>", "b</answer>"):
        text += part
        rewards.append(score(make_think_answer_reward(graded=True), text))
    assert rewards == pytest.approx([0.2, 0.4, 0.6, 1.0])


def test_a_completion_that_must_open_its_thought():
    reward = make_think_answer_reward(must_open=True)
    assert score(reward, "<think>a</think><answer>b</answer>") == 1.0
    assert score(reward, "a</think><answer>b</answer>") == 0.0
    assert score(reward, "<think >a</think><answer>b</answer>") == 0.0
    graded = make_think_answer_reward(must_open=True, graded=True)
    assert score(graded, "a</think><answer>b</answer>") == pytest.approx(3 / 5)


def test_think_answer_with_other_tags():
    reward = make_think_answer_reward(reasoning_tag="reasoning", name="tags")
    assert reward.__name__ == "tags"
    assert score(reward, "<reasoning>a</reasoning><answer>b</answer>") == 1.0
    assert score(reward, "<think>a</think><answer>b</answer>") == 0.0


@pytest.mark.parametrize("tags", [("think", "think"), ("<think>", "answer"), ("", "answer")])
def test_unusable_tags_raise(tags):
    with pytest.raises(ValueError, match="two different words"):
        make_think_answer_reward(reasoning_tag=tags[0], answer_tag=tags[1])
