import pytest

from jaxrl_llm.rewards import gsm8k_reward, make_gsm8k_reward

GOLD = "She bakes 6*12 = <<6*12=72>>72 rolls.\n#### 72"


def score(completion, gold=GOLD, *, strict=True):
    return make_gsm8k_reward(strict=strict)([""], [completion], answer=[gold])[0]


@pytest.mark.parametrize(
    "completion",
    [
        GOLD,
        "#### 72",
        "####72",
        "so 72.\n#### $72.00.",
        "#### 72.0",
        "#### \\$72",
        "#### +72 rolls",
        "####\n72",
        "#### 70\nWait.\n#### 72",
        [{"role": "assistant", "content": "#### 72"}],
    ],
)
def test_right(completion):
    assert score(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "72",
        "The answer is 72",
        "####",
        "#### ",
        "#### seventy-two",
        "#### 720",
        "#### 72.5",
        "#### -72",
        "#### 72/4",
        "#### 72.0 / 4",
        "#### 72 * 2",
        "#### 72^2",
        "#### 1,72",
        "#### 72,5",
        "#### 72\n#### 5",
        "### 72",
        "#### \u0667\u0662",  # 72 in Arabic-Indic digits
        "#### 7\x002",
        "#### ....72",
    ],
)
def test_wrong(completion):
    assert score(completion) == 0.0


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("#### 1,234,567", "#### 1234567"),
        ("#### 1234567", "#### $1,234,567.00"),
        ("#### -5", "#### -5"),
        ("#### -5", "#### \u22125.0"),
        ("#### -5", "#### -$5"),
        ("#### -5", "#### $-5"),
        ("#### 0.5", "#### .5"),
        ("#### 0", "#### -0"),
        ("#### " + "9" * 5000, "#### " + "9" * 5000),
    ],
)
def test_forms_of_the_same_number(gold, completion):
    assert score(completion, gold) == 1.0


def test_comparison_is_exact():
    assert score("#### 0.1", "#### 0.10000000000000000001") == 0.0
    assert score("#### 9007199254740993", "#### 9007199254740992") == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("The answer is 72.", 1.0),
        ("It costs $72, I think.", 1.0),
        ("100-28 = 72", 1.0),
        ("first 5, then 100-72", 1.0),
        ("71 + 1 = 72 (not 70)", 0.0),
        ("The answer is -72", 0.0),
        ("72 #### none", 1.0),
        ("#### 71, or rather 72", 0.0),
        ("no number", 0.0),
        ("", 0.0),
    ],
)
def test_not_strict_falls_back_to_the_last_number(completion, expected):
    assert score(completion, strict=False) == expected


@pytest.mark.parametrize("gold", ["72", "", "####", "#### none", None])
def test_gold_without_a_number_is_none(gold):
    assert score("#### 72", gold) is None


def test_names_and_column():
    assert gsm8k_reward.__name__ == "gsm8k_reward"
    reward = make_gsm8k_reward(answer_column="solution", name="correct")
    assert reward.__name__ == "correct"
    assert reward(["", ""], ["#### 1", "#### 2"], solution=["#### 1", "#### 1"], answer=["", ""]) == [
        1.0,
        0.0,
    ]
