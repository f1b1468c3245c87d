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
        ("first 5, then 72 of them", 1.0),
        ("first 5, then 100-72", 0.0),
        ("72 or 73", 0.0),
        ("73 or 72", 0.0),
        ("3 hours and 72 minutes", 0.0),
        ("The answer is 7 200", 0.0),
        ("The first line has 5\n72", 1.0),
        (r"It is \boxed{72}, since 70 + 2 = 72", 1.0),
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


@pytest.mark.parametrize("gold", [72, "72", 72.0, "72.", "$72", "so 70 + 2\n#### 72"])
def test_gold_may_be_the_bare_number(gold):
    assert score("#### 72", gold) == 1.0
    assert score("#### 73", gold) == 0.0
    assert gsm8k_reward.check_row(question="?", answer=gold) is None


@pytest.mark.parametrize(
    "gold", ["", "####", "#### none", "####72x", None, True, "70 + 2", "so it is 72 in all, or 73", float("nan")]
)
def test_gold_without_a_number_is_none_and_named_before_training(gold):
    assert score("#### 72", gold) is None
    problem = make_gsm8k_reward(answer_column="solution").check_row(solution=gold)
    assert problem is not None and problem.startswith(f"'solution': {gold!r}") and "#### <number>" in problem


# (completion, gold, whether it is right)
WRITTEN = [
    ("#### 5 o'clock", "5", True), ("#### 72rolls", "72", True), ("#### 5 theta", "5", False),
    ("#### 5 π", "5", False), ("#### R$ 72", "72", True), ("#### 72円", "72", True), ("#### ($5)", "5", True),
    ("#### 72 x 10^2", "72", False), ("#### 72 times", "72", True), ("#### 72 times three", "72", False),
    ("#### 72 per cent", "72", False), ("#### 72‰", "72", False), ("#### 1e3 dollars", "1000", True),
    ("#### 1e", "1", False), ("#### 2e+3", "2000", True), ("#### 2e+3", "2", False), ("#### 3√2", "3", False),
    ("#### 3∞", "3", False), ("#### 1_000", "1", False), ("#### 72,000.5", "72", False),
    ("#### 72+5", "72", False), ("#### 72 - 5", "72", False), ("#### 5/", "5", False),
    ("#### 7 / 2 hours", "3.5", True), ("#### 2 1/2 hours", "2.5", True), ("#### 2½ hours", "2", False),
    ("#### €1.234,56", "1234.56", False), ("#### €1.234", "1", False), ("#### -€5", "-5", True),
    ("#### €-5", "-5", True), ("#### − 5", "-5", True), ("#### (5)", "5", True), ("#### [5]", "5", True),
    ("#### <5>", "5", False), ("#### `5`", "5", True), ("#### \"5\"", "5", True), ("#### 5\\\\", "5", True),
    ("#### 5 million dollars", "5", False), ("#### 5 Million", "5000000", True), ("#### 5mil", "5", False),
    ("#### 5MM", "5", False), ("#### 5 score", "5", True), ("#### 10:30 am", "10", False),
    ("#### 10.30", "10", False), ("#### 5h30", "5", False), ("#### 5h 30m", "5", False), ("#### 1st", "1", True),
    ("#### *5*", "5", True), ("#### _5_", "5", True), ("#### ~5", "5", False), ("#### 5;6", "5", False),
    ("#### 5|6", "5", False), ("#### 5\t6", "5", False), (r"#### 2\times3", "2", False),
    (r"#### 2\pi r", "2", False), (r"#### 5\frac{1}{2}", "5", False), ("#### 5^", "5", False),
    ("#### 5⁴", "5", False), ("#### five 5", "5", False), ("#### No. 5", "5", False),
    ("#### answer: 5", "5", False), (r"#### $\$5$", "5", True), (r"#### \$5", "5", True),
    (r"#### \(5\)", "5", True), (r"#### 8\,000", "8000", True), (r"#### 8\,000", "8", False),
    ("#### 1{,}234{,}567", "1234567", True), ("#### 1{,}234.5", "1234.5", True), ("#### 1{,}2", "1", False),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "gold", "right"), WRITTEN)
def test_what_stands_after_the_marker(completion, gold, right):
    assert score(completion, gold) == float(right)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>#### 5</think>\n#### 72", 1.0),
        ("<think>#### 72</think>\n#### 5", 0.0),
        ("<think>#### 72", 0.0),
        ("<think>#### 72</think>", 0.0),
        ("#### 5</think>#### 72", 1.0),
        ("<answer>#### 72</answer>", 1.0),
        ("#### 72\n\n#### Notes\nnone", 1.0),
        ("#### Step 1\n#### 72", 1.0),
        ("#### 72\n#### 72 or 73", 0.0),
        ("#### 72. That is 5 more.", 1.0),
        ("#### 72, or rather 73", 0.0),
        (r"#### \boxed{72}", 1.0),
    ],
)
def test_thoughts_headings_and_second_thoughts(completion, expected):
    assert score(completion) == expected


def test_a_prompt_that_opens_a_thought():
    prompts = ["Assistant: <think>\n", [{"role": "assistant", "content": "<think>"}], "Assistant:"]
    completions = ["#### 72", "#### 72", "#### 72"]
    assert gsm8k_reward(prompts, completions, answer=[72] * 3) == [0.0, 0.0, 1.0]
    assert gsm8k_reward(prompts, ["hm</think>#### 72"] * 3, answer=[72] * 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("hours a week to go to and from work.", True),
        ("tennis balls Ralph didn't hit.", True),
        ("students got B and above in their final grade.", True),
        ("is left over after purchasing her bike", True),
        ("times the amount of apples Jack is carrying.", True),
        ("songs on average over the third and fourth sets.", True),
        ("for two pairs of shoes and a dress.", True),
        ("CDs", True),
        ("/year", True),
        ("to start.", True),
        ("hours and a half", False),
        ("feet three inches", False),
        ("to seventy-three", False),
        ("and five more", False),
        ("is not the answer", False),
        ("times three", False),
        ("million to manage public spaces.", False),
        ("point five", False),
        ("thirds of them", False),
    ],
)
def test_words_after_the_number_are_units_unless_they_go_on_with_it(said, right):
    space = "" if said.startswith("/") else " "
    assert score(f"#### 72{space}{said}") == float(right)
    assert score(f"so 100-28 = $72{space}{said}", strict=False) == float(right)


def test_names_and_column():
    assert gsm8k_reward.__name__ == "gsm8k_reward"
    reward = make_gsm8k_reward(answer_column="solution", name="correct")
    assert reward.__name__ == "correct"
    assert reward(["", ""], ["#### 1", "#### 2"], solution=["#### 1", "#### 1"], answer=["", ""]) == [
        1.0,
        0.0,
    ]
