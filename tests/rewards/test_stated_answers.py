r"""Which answer a text states (thoughts, boxes, sentences), and answers that are letters, words or formulas."""

import pytest

from jaxrl_llm.rewards import make_math_reward

MATH = make_math_reward(timeout_s=20.0, batch_timeout_s=100.0)

# (text, gold, whether it is right)
CASES = {
    "thoughts": [
        (r"<think>\boxed{7}", "7", False), (r"<think>\boxed{7}</think>", "7", False),
        (r"<THINK>\boxed{7}", "7", False), (r"<think>x</think>\boxed{7}", "7", True),
        (r"x</think>\boxed{7}", "7", True), (r"\boxed{7}</think>3", "7", False),
        (r"<think>maybe \boxed{7}</think> The answer is 3", "7", False),
        (r"<think>\boxed{3}</think> \boxed{7}", "7", True),
        (r"<think>maybe \boxed{3}</think> The answer is 7", "7", True), (r"<thinking>\boxed{7}", "7", False),
        (r"<think>a</think> The answer is 7 <think>\boxed{3}", "7", True),
        ("<think>7</think><answer>8</answer>", "7", False), ("<think>1</think><answer>7</answer>", "7", True),
        ("<answer>7</answer> or 8", "7", True), ("<answer>7", "7", True),
        (r"<reasoning>\boxed{3}</reasoning><answer>\boxed{7}</answer>", "7", True),
        ("<answer>8</answer><answer>7</answer>", "7", True),
    ],
    "boxes": [
        (r"\fbox{72}", "72", True), (r"\fbox{73}", "72", False), (r"\boxed{\fbox{72}}", "72", True),
        (r"\boxed 72", "72", True), (r"\boxed{72", "72", False), (r"\boxed{72} or \boxed{73", "72", False),
        (r"$\fbox{x+1}$", "1+x", True), (r"\fbox{\frac12}", "1/2", True),
        (r"First \boxed{7}. No: \boxed{3}", "3", True), (r"First \boxed{7}. No: \boxed{3}", "7", False),
        (r"\boxed{5} or \boxed{7}", "5", False), (r"\boxed{5} and \boxed{7}", "5,7", True),
        (r"\boxed{5}, \boxed{7}", "5", False), (r"\boxed{5}, \boxed{5}", "5", True),
        (r"\boxed{x = \boxed{5} + 2}", "5", False), (r"\boxed{\boxed{5} + 2}", "5", False),
        (r"\boxed{x = 5}", "5", True), (r"The box \boxed{5}. The answer is 6.", "5", True),
        (r"\boxed{x=1, x=2}", "2", False), (r"$\boxed{\text{72}}$", "72", True),
    ],
    "sentences": [
        ("The answer is 5 or 7", "5", False), ("The answer is 5 or 7", "7", False),
        ("The answer is 5, not 7.", "5", True), ("The answer is 5 because 2+3=5.", "5", True),
        ("The answer is $5$ million.", "5", False), ("The answer is $5$ million.", "5000000", True),
        ("Answer: 72", "72", True), ("**Answer:** 72 rolls", "72", True), ("The final answer is", "72", False),
        ("I have 72. The final answer is", "72", False), ("The answer is:\n\n$$72$$", "72", True),
        (r"**Final Answer:** \(72\)", "72", True), ("The answer is 5. Wait, the answer is 7.", "7", True),
        ("The answer is 5. Wait, the answer is 7.", "5", False), (r"The answer is $\frac{1}{2}$.", "0.5", True),
        ("The answer is that she has 72 rolls.", "72", True), ("#### 72", "72", True),
        ("The answer is 5 feet 3 inches", "3", False), ("It takes 2 hours and 30 minutes", "30", False),
        ("we get x=1, y=5", "5", False), ("we get 2^{10}", "1024", True), ("we get 2^{10}", "10", False),
        ("so 5e3", "3", False), ("so $x+1$ for all x", "1+x", True),
        ("She pays $5 for eggs and $7 for milk, so $12.", "12", True), (r"so $\sqrt2$ squared", r"\sqrt2", False),
        ("", "72", False), ("so we have $x=3$ and $y=4$", "3,4", True), ("We add 70 and 2.\nSo 72.\n", "72", True),
        ("Answer\n\n72", "72", True),
    ],
    "letters": [
        ("The answer is A.", "A", True), ("The answer is (A).", "A", True), (r"\boxed{\text{A}}", "A", True),
        (r"\boxed{\textbf{(A)}}", "A", True), (r"\boxed{\textbf{(A)}\ 5}", "A", True), (r"\boxed{a}", "A", False),
        (r"\boxed{2A}", "A", False), (r"\boxed{A+B}", "A", False), (r"\boxed{A, B}", "A", False),
        ("The answer is A or B", "A", False), ("Let A be the area. The area is x", "A", False), ("A", "A", True),
        ("A train goes 5 km", "A", False), ("(B)", "B", True), ("**B**", "B", True), ("Option C", "C", True),
        ("So I pick:\nD", "D", True), (r"\boxed{x}", "x", True), (r"\boxed{y}", "x", False),
        (r"\boxed{E}", "E", True), (r"\boxed{e}", "E", False), (r"\boxed{I}", "I", True),
        (r"\boxed{2.718281828}", "E", False), (r"\boxed{i}", "I", False), ("Answer: B", "B", True),
        ("Answer: $B$", "B", True), ("The correct answer is option B.", "B", True),
        ("The correct option is B", "B", True), ("answer: (B) 12", "B", True), (r"\boxed{B}", r"\text{(B)}", True),
        ("The answer is not A", "A", False), ("The answer is Apple", "A", False), ("I got an A", "A", False),
        (r"\boxed{C}", "B", False), (r"\boxed{(b)}", "B", True), (r"\boxed{\mathrm{B}}", "B", True),
        (r"\boxed{BC}", "B", False), ("The answer is B, because 5 > 3.", "B", True),
        ("Answer: B) and C)", "B", False), (r"\boxed{x}", "5", False), ("5", "A", False),
    ],
    "words": [
        (r"\boxed{\text{no solution}}", "no solution", True), (r"\boxed{No Solution}", "no solution", True),
        (r"\boxed{\text{Yes}}", "Yes", True), (r"\boxed{\text{No}}", "Yes", False),
        ("The answer is Sunday.", "Sunday", True), ("The answer is Monday.", "Sunday", False),
        (r"\boxed{\text{not even}}", "even", False), (r"\boxed{5}", "no solution", False),
        (r"\boxed{\text{no solution}}", "0", False), ("True", "True", True), ("so it is\n**True**", "True", True),
        (r"\boxed{Evelyn}", r"\text{Evelyn}", True), (r"\boxed{\text{June 21}}", r"\text{June 20}", False),
        (r"\boxed{\text{June 20}}", r"\text{June 20}", True), (r"\boxed{June 20}", "20", False),
        (r"\boxed{10:30}", "10:30", True), (r"\boxed{3:4}", "3:4", True), (r"\boxed{4:3}", "3:4", False),
        (r"\boxed{101_2}", "101_{2}", True), (r"\boxed{101_3}", "101_2", False),
        (r"\boxed{\text{undefined}}", "undefined", True), ("7", "True or False", False),
        (r"\boxed{10:30\text{ am}}", "10:30 am", True),
    ],
    "formulas": [
        (r"\boxed{√2}", r"\sqrt{2}", True), (r"\boxed{2√3}", r"\sqrt{12}", True),
        (r"\boxed{sqrt(2)}", r"\sqrt2", True), (r"\boxed{√2}", "2", False), (r"\boxed{2π}", r"2\pi", True),
        (r"\boxed{3.14...}", r"\pi", False), (r"\boxed{x>5}", "x>5", True), (r"\boxed{x > 5}", "5", False),
        (r"\boxed{\frac{\sqrt{4}}{4}}", "1/2", True), (r"\boxed{(x+1)^2}", "x^2+2x+1", True),
        (r"\boxed{(1,2)}", "(1, 2)", True), (r"\boxed{(2,1)}", "(1,2)", False), (r"\boxed{[1,2)}", "[1,2)", True),
        (r"\boxed{(-∞, 5]}", r"(-\infty,5]", True), (r"\boxed{5, 7}", "7, 5", True),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"\boxed{\sqrt{2}\text{ cm}}", r"\sqrt2", True), (r"\boxed{\sqrt2\text{ million}}", r"\sqrt2", False),
        (r"\boxed{x \in \{1,2\}}", r"\{1,2\}", True), (r"\boxed{\emptyset}", r"\emptyset", True),
        (r"\boxed{\frac{3}{4}\pi}", r"\frac{3\pi}{4}", True), (r"\boxed{6 - 5i}", "6-5i", True),
        (r"\boxed{6 + 5i}", "6-5i", False), (r"\boxed{\frac{2}{3}}", "0.6666666666666666", True),
        (r"\boxed{0.67}", "2/3", False), (r"\boxed{(100,200)}", "100200", False), (r"\boxed{50}", "50%", True),
        (r"\boxed{0.5}", "50%", True), (r"\boxed{5}", "50%", False), (r"\boxed{1.41421356}", r"\sqrt2", True),
        (r"\boxed{1.414}", r"\sqrt2", False), (r"\boxed{5 @ 7}", "5", False), (r"\boxed{5!}", "120", True),
        (r"\boxed{x^{2}}", "x^2", True),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_stated_answers(kind):
    cases = CASES[kind]
    got = MATH([], [text for text, _, _ in cases], answer=[gold for _, gold, _ in cases])
    assert not [(*case, value) for case, value in zip(cases, got, strict=True) if value != float(case[2])]
