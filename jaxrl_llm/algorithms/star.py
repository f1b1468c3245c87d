"""STaR: which rationales are trained on, and for how many steps."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.masking import check_same_shape


class Kept(NamedTuple):
    """Which problems are trained on; bool arrays, of which at most one holds for a problem."""

    first_try: Array
    """With the rationale that was sampled without a hint."""
    rationalized: Array
    """With the one that was sampled with the answer as a hint; the hint itself is not trained on."""


def keep_rationales(correct: ArrayLike, correct_with_hint: ArrayLike) -> Kept:
    """STaR's filter: right at the first try, or else right when the answer was given as a hint.

        first_try = correct;   rationalized = not correct and correct_with_hint

    Training starts anew from the *base* model in each iteration. Unlike rejection sampling (RAFT), problems that
    are never solved also give an example.

    Args:
        correct: Bool, any shape: the answer of the plain sample is right.
        correct_with_hint: Bool, of that shape: that of the hinted one is. Any value where `correct`.

    Returns:
        The two masks.

    Raises:
        ValueError: On unequal shapes.

    Source: Zelikman et al. 2022, "STaR" (2203.14465).
    """
    check_same_shape(correct=correct, correct_with_hint=correct_with_hint)
    correct = jnp.asarray(correct, bool)
    return Kept(correct, ~correct & jnp.asarray(correct_with_hint, bool))


def training_steps(iteration: int, *, start: int = 40, growth: float = 1.2) -> int:
    """Optimizer steps of an iteration, which grow as more problems are solved.

        ⌊ start · growth⁽ⁱᵗᵉʳᵃᵗⁱᵒⁿ ⁻ ¹⁾ ⌋

    Unlike a number of epochs, it does not depend on how many examples were kept.

    Args:
        iteration: Counted from 1.
        start: Steps of the first iteration.
        growth: Factor from one iteration to the next.

    Returns:
        The number of steps.

    Raises:
        ValueError: On an iteration below 1.

    Source: Zelikman et al. 2022, "STaR" (2203.14465), the authors' code.
    """
    if iteration < 1:
        raise ValueError(f"iteration is {iteration}: iterations are counted from 1")
    return int(start * growth ** (iteration - 1))
