"""Published ways to distil a policy from itself: which divergence, who teaches, and what it is told."""

from __future__ import annotations

from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.algorithms.distillation.self_teacher import SelfTeacher


def sdft() -> Distillation:
    """Self-distillation fine-tuning: reverse KL to the policy that has seen a demonstration, a column of the data.

    Shenfeld et al. 2026, "Self-Distillation Enables Continual Learning" (2601.19897). Samples are the policy's own, so
    that what it knew is kept better than where it is fine-tuned on the demonstrations themselves.
    """
    hints = ("\n\nThis is an example of a good answer:\n\n{demonstration}",)
    return Distillation(beta=1.0, itself=SelfTeacher(hints=hints))


def sdpo() -> Distillation:
    """Self-distillation policy optimization: JSD to the policy that has seen a right answer, or feedback on its own.

    Hübotter et al. 2026, "Reinforcement Learning via Self-Distillation" (2601.20802). The right answer is another
    sample of the same prompt, which was rewarded; feedback is what a reward function said of the sample.
    """
    return Distillation(beta=0.5, itself=SelfTeacher())


PRESETS = (sdft, sdpo)
"""In the order in which they are listed."""
