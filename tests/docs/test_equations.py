"""Equations in plain unicode become the LaTeX that a reader of the source would expect."""

from __future__ import annotations

import pytest

CASES = {
    # names
    "A r": r"A\, r",
    "beta h": r"\beta\, h",
    "1 + clip_high": r"1 + \mathrm{clip\_high}",
    "w_min + tau_pos + lambda_d + f_alpha": r"w_{\min} + \tau_{\mathrm{pos}} + \lambda_{d} + f_{\alpha}",
    "π_ref(y | x) y_w": r"\pi_{\mathrm{ref}}(y \mid x)\, y_{w}",
    "k3(logprobs, ref_logprobs)": r"k_{3}(\mathrm{logprobs},\; \mathrm{ref\_logprobs})",
    "η = eta · std": r"\eta = \mathrm{eta} \cdot \mathrm{std}",
    "z_loss_coef": r"\mathrm{z\_loss\_coef}",
    # functions
    "max(−A r, −A clip(r, 1 − ε))": r"\max(-A\, r,\; -A\, \mathrm{clip}(r,\; 1 - \varepsilon))",
    "−log σ(beta h)": r"-\log \sigma(\beta\, h)",
    "Agg[ −sg(r) logprobs ]": r"\mathrm{Agg}[-\mathrm{sg}(r)\, \mathrm{logprobs}]",
    "KL(old ‖ policy)": r"\mathrm{KL}(\mathrm{old} \;\Vert\; \mathrm{policy})",
    "softplus(−(s − margin)) + c · x²": r"\mathrm{softplus}(-(s - \mathrm{margin})) + c \cdot x^{2}",
    "sech²(x)": r"\mathrm{sech}^{2}(x)",
    "√(2 δ)": r"\sqrt{2\, \delta}",
    # scripts
    "Σₜ Aₜ₊₁ xᵢₖ²": r"\sum_{t} A_{t+1}\, x_{ik}^{2}",
    "Σⱼ≠ᵢ Rⱼ": r"\sum_{j\neq i} R_{j}",
    "Σ_{t ≤ n} y_<ₜ": r"\sum_{t \leq n} y_{<t}",
    "e⁻ᵈ − 1 + 10⁻⁶ gamma⁽ⁿ⁻ᵗ⁾": r"e^{-d} - 1 + 10^{-6}\, \gamma^{n-t}",
    "growth⁽ⁱᵗᵉʳᵃᵗⁱᵒⁿ ⁻ ¹⁾": r"\mathrm{growth}^{\mathrm{iteration}-1}",
    "H̄ᵢ⁻¹ + r̃": r"\bar{H}_{i}^{-1} + \tilde{r}",
    "y′ + Gₜ′": "y' + G_{t'}",
    "π(y)^(1/|y|)": r"\pi(y)^{1/|y|}",
    "F⁻¹ ∇⟨∇D, v⟩": r"F^{-1}\, \nabla \left\langle \nabla D,\; v \right\rangle",
    # fractions
    "(R − mean) / (std + eps)": r"\frac{R - \mathrm{mean}}{\mathrm{std} + \varepsilon}",
    "Σₜ log ρₜ / n": r"\frac{\sum_{t} \log \rho_{t}}{n}",
    "Σ −A r / number of valid tokens": r"\frac{\sum -A\, r}{\text{number of valid tokens}}",
    "A − Σⱼ nⱼ Rⱼ / Σⱼ nⱼ": r"A - \frac{\sum_{j} n_{j}\, R_{j}}{\sum_{j} n_{j}}",
    "Σₖ wₖ · (Rₖ − 1) / (sₖ + 1)": r"\sum_{k} w_{k} \cdot \frac{R_{k} - 1}{s_{k} + 1}",
    "−p / t": r"-\frac{p}{t}",
    "beta/2 x² + 4/τ": r"\frac{\beta}{2}\, x^{2} + \frac{4}{\tau}",
    "|Σᵢ Aᵢ| / G": r"\frac{\left| \sum_{i} A_{i} \right|}{G}",
    "log(p / (1 − p))": r"\log\left( \frac{p}{1 - p} \right)",
    "mean of  [a + b] / (1 − 2 c)": r"\text{mean of}\ \frac{a + b}{1 - 2\, c}",
    "∂logits/∂params": r"\frac{\partial \mathrm{logits}}{\partial \mathrm{params}}",
    # words
    "mean over pairs of  −x": r"\text{mean over pairs of}\ {-}x",
    "mean reward of the group − anchor": r"\text{mean reward of the group}\ - \mathrm{anchor}",
    "x if A > 0, else 0": r"x\ \text{if}\ A > 0,\ \text{else}\ 0",
    "over the N valid tokens": r"\text{over the}\ N\ \text{valid tokens}",
    "argmax over answers a of  x": r"\text{argmax over answers}\ a\ \text{of}\ x",
    "the length of a prompt": r"\text{the length of a prompt}",
    "soft: top_percent % of them": r"\text{soft:}\ \mathrm{top\_percent}\%\ \text{of them}",
    "reverse_kl:  log u": r"\mathrm{reverse\_kl}\text{:}\ \log u",
    '"sech2_literal", with `clip`': r"\mathtt{sech2\_literal},\ \text{with}\ \mathtt{clip}",
    "½ (mean over sides)": r"\frac{1}{2}\, (\text{mean over sides})",
}


@pytest.mark.parametrize("equation", CASES)
def test_translation(equations, equation):
    assert equations.latex(equation) == CASES[equation]


def test_arguments_keep_their_names(equations):
    assert equations.latex("mean_logprobs") == r"\mathrm{mean}_{\mathrm{logprobs}}"
    assert equations.latex("mean_logprobs", arguments=["mean_logprobs"]) == r"\mathrm{mean\_logprobs}"


def test_lines_and_columns(equations):
    assert equations.latex_block("−A s        s = exp(x)") == r"-A\, s \qquad s = \exp(x)"
    block = equations.latex_block('a        "one"\nb    "two"')
    assert block.splitlines() == [
        r"\begin{aligned}",
        r"& a && \qquad \mathtt{one} \\",
        r"& b && \qquad \mathtt{two}",
        r"\end{aligned}",
    ]
    assert r"& a \qquad b \\" in equations.latex_block("a    b\nc").splitlines()  # no columns


@pytest.mark.parametrize(
    ("equation", "message"),
    [("a ☃ b", "unexpected '☃'"), ("(a", r"no closing \)"), ("/ b", "lacks a side"), ("a) b", r"unexpected '\)'")],
)
def test_what_is_not_understood(equations, equation, message):
    with pytest.raises(ValueError, match=message):
        equations.latex(equation)
