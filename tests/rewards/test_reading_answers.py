"""Texts, gold answers and what is right, by kind; each row both for mathematics and, where it is a number, GSM8K."""

import pytest

from jaxrl_llm.rewards import gsm8k_reward, make_gsm8k_reward, make_math_reward

MATH = make_math_reward(timeout_s=20.0, batch_timeout_s=100.0)
LOOSE = make_gsm8k_reward(strict=False)

# How a number may be written, and the number.
SAME_NUMBER = {
    "exponents": [
        ("1e3", "1000"), ("1E3", "1000"), ("1.5e3", "1500"), ("2e-3", "0.002"), ("5e+2", "500"), ("10^3", "1000"),
        ("10^{3}", "1000"), ("10^{-2}", "0.01"), ("10³", "1000"), ("10⁻³", "0.001"), (r"5 \times 10^3", "5000"),
        (r"5\times10^{3}", "5000"), (r"5 \cdot 10^{3}", "5000"), ("5 × 10^3", "5000"), ("5 x 10^3", "5000"),
        ("5*10^3", "5000"), ("5*10**3", "5000"), ("6.02 × 10²³", "602000000000000000000000"), ("-2e2", "-200"),
        ("2^{10}", "1024"), ("2**10", "1024"),
    ],
    "thousands": [
        ("1,000", "1000"), ("1{,}000", "1000"), (r"1\,000", "1000"), (r"1\;000", "1000"), ("1~000", "1000"),
        ("1\u2009000", "1000"), ("1\u202f000", "1000"), ("1\xa0000", "1000"), ("1 000", "1000"), (r"1\ 000", "1000"),
        ("1'000", "1000"), ("1,234,567.50", "1234567.5"), (r"1\,234\,567", "1234567"), (r"1,\!000", "1000"),
        ("12,345", "12345"), ("1{,}000{,}000", "1000000"),
    ],
    "currency": [
        ("$5", "5"), (r"\$5", "5"), ("€5", "5"), ("£5", "5"), ("¥5", "5"), ("₹5", "5"), ("5€", "5"), ("5 €", "5"),
        ("5 USD", "5"), ("USD 5", "5"), ("US$5", "5"), ("5 dollars", "5"), ("5 euros", "5"), (r"\$5.00", "5"),
        ("$ 5", "5"), ("-$5", "-5"), ("$-5", "-5"), ("$1,234.50", "1234.5"), (r"\text{\$}5", "5"),
        (r"\pounds 5", "5"),
    ],
    "signs": [
        ("-5", "-5"), ("−5", "-5"), ("–5", "-5"), ("- 5", "-5"), ("+5", "5"), ("minus 5", "-5"), ("negative 5", "-5"),
        (r"-\frac{1}{2}", "-0.5"), (r"\frac{-1}{2}", "-0.5"), ("-0", "0"), ("− 5.0", "-5"),
    ],
    "units": [
        ("5 km", "5"), ("5km", "5"), (r"5\text{ cm}", "5"), (r"5 \text{ m}", "5"), (r"5\,\mathrm{kg}", "5"),
        (r"5\text{ cm}^2", "5"), ("5 cm^2", "5"), ("5 cm²", "5"), ("5 square feet", "5"), (r"5^\circ", "5"),
        (r"5^{\circ}", "5"), ("5°", "5"), ("5°C", "5"), ("5 degrees", "5"), ("5 km/h", "5"), (r"5 \text{ m/s}", "5"),
        ("5 apples", "5"), ("5 rolls per day", "5"), ("5 pm", "5"), ("5 p.m.", "5"), ("5 hours", "5"), ("5 lbs", "5"),
        ("5th", "5"),
    ],
    "fractions": [
        ("1/2", "0.5"), (r"\frac{1}{2}", "0.5"), (r"\frac12", "0.5"), (r"\dfrac{1}{2}", "0.5"), (r"\tfrac12", "0.5"),
        ("1 / 2", "0.5"), ("½", "0.5"), ("1⁄2", "0.5"), ("10/4", "2.5"), ("72.0/4", "18"),
    ],
    "mixed numbers": [
        ("2 1/2", "2.5"), (r"2\frac12", "2.5"), (r"2\frac{1}{2}", "2.5"), (r"2 \frac{1}{2}", "2.5"), ("2½", "2.5"),
        ("2 ½", "2.5"), (r"-2\frac{1}{2}", "-2.5"), ("2 and a half", "2.5"), ("2 and 1/2", "2.5"),
        (r"2\dfrac{3}{4}", "11/4"), ("3 1/7", "22/7"), ("2 1/2 cups", "2.5"),
    ],
    "repeating decimals": [
        (r"0.\overline{3}", "1/3"), (r"0.\bar{3}", "1/3"), (r"0.\dot{3}", "1/3"), (r"0.\overline3", "1/3"),
        ("0.(3)", "1/3"), ("0.333...", "1/3"), ("0.333…", "1/3"), (r"0.333\ldots", "1/3"),
        (r"0.1\overline{6}", "1/6"), ("0.1666...", "1/6"), (r"0.\overline{142857}", "1/7"),
        (r"1.\overline{09}", "12/11"), ("0.3̅", "1/3"), (r"0.\dot{1}4285\dot{7}", "1/7"),
        (r"-0.\overline{3}", "-1/3"),
    ],
    "scale words": [
        ("5 million", "5000000"), ("$5 million", "5000000"), ("5 thousand", "5000"), ("5k", "5000"), ("5K", "5000"),
        (r"5\text{ million}", "5000000"), (r"\$5\text{ million}", "5000000"), ("1.5 billion", "1500000000"),
        ("$5M", "5000000"), ("$5m", "5000000"), ("£7bn", "7000000000"), ("5 hundred", "500"), ("2 dozen", "24"),
        ("5 million dollars", "5000000"), ("5 hundred thousand", "500000"), ("5-million", "5000000"),
    ],
    "percent": [
        ("50%", "0.5"), (r"50\%", "0.5"), ("50 percent", "0.5"), ("50 %", "0.5"), ("12.5%", "1/8"),
    ],
    "plain": [
        ("72", "72"), ("72.", "72"), ("72.0", "72"), ("**72**", "72"), ("$72$", "72"), (r"\(72\)", "72"),
        ("(72)", "72"), ("{72}", "72"), ("x = 72", "72"), ("6*12 = 72", "72"), (".5", "0.5"), ("072", "72"),
        (r"\text{72}", "72"),
    ],
}  # fmt: skip

# A text that holds the number, and is another one, or none.
OTHER_NUMBER = {
    "exponents": [
        ("5e3", "5"), ("5E3", "5"), ("5e-3", "5"), ("5^2", "5"), ("5²", "5"), ("5^{2}", "5"), ("5**2", "5"),
        ("10^5", "5"), (r"5 \times 10^3", "5"), ("5 × 10³", "5"), ("5*10^3", "5"), ("3e5", "5"), ("10^{5}", "10"),
        ("5e3x", "5"), ("5e", "5"), ("1e999999999", "1"),
    ],
    "thousands": [
        ("5,000", "5"), ("5{,}000", "5"), (r"5\,000", "5"), ("5\u2009000", "5"), ("5\u202f000", "5"), ("5 000", "5"),
        ("5 000", "0"), ("5,000", "0"), ("1,72", "72"), ("72,5", "72"), ("1,2345", "1"), ("5.000.000", "5"),
        ("5'000", "5"), (r"1,\!005", "5"), ("5, 6", "5"), ("5, 6", "6"),
    ],
    "signs": [
        ("-5", "5"), ("−5", "5"), ("–5", "5"), ("minus 5", "5"), ("negative 5", "5"), ("-$5", "5"), ("$-5", "5"),
        ("--5", "-5"), ("5-", "5"), ("±5", "5"), (r"\pm 5", "5"),
    ],
    "fractions": [
        ("5/7", "5"), ("5/7", "7"), (r"\frac{5}{7}", "5"), (r"\frac57", "5"), ("5⁄7", "5"), ("7/5", "5"),
        ("5 / 7", "5"), ("5÷7", "5"), ("1/0", "1"), ("5/", "5"), ("1/2/5", "5"), (r"\frac{5}{x}", "5"),
    ],
    "mixed numbers": [
        ("5 1/2", "5"), ("5 1/2", "0.5"), (r"5\frac12", "5"), ("5½", "5"), ("5 and a half", "5"), ("5 1/2", "2"),
        ("5 and three quarters", "5"), (r"5\frac{1}{2}", "2.5"),
    ],
    "repeating decimals": [
        (r"0.\overline{3}", "0.3"), ("0.333...", "0.333"), (r"0.\overline{16}", "1/6"), ("0.3", "1/3"),
        ("0.333", "1/3"), ("3.14...", "3.14"), ("5...", "5"), (r"5.\overline{5}", "5"),
    ],
    "scale words": [
        ("5 million", "5"), ("$5 million", "5"), ("5k", "5"), ("5 K", "5"), ("$5M", "5"), ("$5m", "5"), ("5bn", "5"),
        ("5 thousand", "5"), ("5 Thousand", "5"), (r"5\text{ thousand}", "5"), (r"5\text{k}", "5"), ("5 dozen", "5"),
        ("5 hundred", "5"), ("5 hundred thousand", "500"), ("5 lakh", "5"), ("5 billion dollars", "5"),
    ],
    "percent": [
        ("5%", "5"), (r"5\%", "5"), ("5 percent", "5"), ("5 per cent", "5"), ("5 %", "5"), (r"5\text{ percent}", "5"),
    ],
    "products and more": [
        ("5x", "5"), ("5 x", "5"), ("5ab", "5"), ("x5", "5"), (r"5\pi", "5"), (r"5\sqrt{2}", "5"), ("5i", "5"),
        ("5 squared", "5"), ("5!", "5"), ("5*2", "5"), ("2*5", "5"), ("5(2)", "5"), ("10 + 5", "5"), ("10 - 5", "10"),
        ("10-5", "10"), ("5 + x", "5"), ("log 5", "5"), (r"\sqrt{5}", "5"), ("√5", "5"), ("|5|x", "5"),
        ("5 mod 3", "5"), ("5 choose 2", "2"),
    ],
    "times, ratios, bases, bounds": [
        ("10:30", "10"), ("10:30", "30"), ("5:7", "5"), ("5:7", "7"), ("101_2", "101"), ("101_{2}", "101"),
        ("0x10", "10"), ("5 feet 3 inches", "5"), ("5 feet 3 inches", "3"), ("5'3\"", "5"), ("x > 5", "5"),
        (r"x \le 5", "5"), ("≥ 5", "5"), (r"x \neq 5", "5"), ("<5", "5"), ("5-7", "5"), ("5-7", "7"), ("5 to 7", "7"),
        ("5 or 7", "5"), ("5 or 7", "7"), ("5 and 7", "7"), ("5 ± 1", "5"), ("1.2.5", "5"), ("5.5.5", "5"),
        ("x=1, y=5", "5"), ("not 5", "6"),
    ],
    "others": [
        ("7\x005", "5"), ("٥", "5"), ("five", "5"), ("....5", "5"), ("", "5"), ("55", "5"), ("5.5", "5"),
        ("0.5", "5"), ("#5#", "6"),
    ],
}  # fmt: skip


def mistakes(reward, cases):
    """Which of the cases `(text, gold, right)` the reward judges otherwise."""
    got = reward([], [text for text, _, _ in cases], answer=[gold for _, gold, _ in cases])
    return [(*case, value) for case, value in zip(cases, got, strict=True) if value != float(case[2])]


@pytest.mark.parametrize("kind", SAME_NUMBER)
def test_a_number_however_it_is_written_is_that_number(kind):
    written = SAME_NUMBER[kind]
    assert not mistakes(MATH, [(rf"so \boxed{{{text}}}", gold, True) for text, gold in written])
    assert not mistakes(MATH, [(rf"so \boxed{{{gold}}}", text, True) for text, gold in written])
    assert not mistakes(MATH, [(f"The answer is {text}.", gold, True) for text, gold in written])
    assert not mistakes(gsm8k_reward, [(f"so\n#### {text}", gold, True) for text, gold in written])
    assert not mistakes(gsm8k_reward, [(f"#### {gold}", f"so\n#### {text}", True) for text, gold in written])
    assert not mistakes(LOOSE, [(f"Altogether this is\n{text}", gold, True) for text, gold in written])


@pytest.mark.parametrize("kind", OTHER_NUMBER)
def test_a_number_read_in_part_is_never_right(kind):
    written = OTHER_NUMBER[kind]
    assert not mistakes(MATH, [(rf"so \boxed{{{text}}}", gold, False) for text, gold in written])
    assert not mistakes(MATH, [(f"The answer is {text}.", gold, False) for text, gold in written])
    assert not mistakes(MATH, [(f"Altogether this is {text}", gold, False) for text, gold in written])
    assert not mistakes(gsm8k_reward, [(f"so\n#### {text}", gold, False) for text, gold in written])
    assert not mistakes(LOOSE, [(f"Altogether this is {text}", gold, False) for text, gold in written])
