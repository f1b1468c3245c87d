from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from jaxrl_llm.training.episodes.estimates import Estimate, solved_within


@pytest.mark.parametrize("n", [1, 2, 5])
def test_solved_within_is_the_share_of_subsets_that_hold_a_solution(n: int) -> None:
    solved = np.array(list(itertools.product([False, True], repeat=n)))
    for k in range(1, n + 1):
        subsets = [[any(row[list(chosen)]) for chosen in itertools.combinations(range(n), k)] for row in solved]
        np.testing.assert_allclose(solved_within(solved, k), np.mean(subsets, axis=1))


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} samples of each prompt, there are 3"):
        solved_within(np.ones((2, 3), bool), k)


def test_standard_errors_are_over_prompts() -> None:
    """Of shares the binomial one; what does not apply does not count, nor does a prompt without any value."""
    value, stderr, prompts = Estimate.of(np.array([True, False, False, True, True]))
    assert (value, prompts) == (0.6, 5)
    assert stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    nan = math.nan
    found = Estimate.of(np.array([[1.0, 3.0], [nan, 5.0], [nan, nan]], np.float32))
    assert found == pytest.approx((3.5, np.std([2, 5], ddof=1) / math.sqrt(2), 2))
    assert Estimate.of(np.array([2.0]))[0] == 2.0 and math.isnan(Estimate.of(np.array([2.0])).stderr)
    nothing = Estimate.of(np.array([nan, nan]))
    assert math.isnan(nothing.value) and math.isnan(nothing.stderr) and nothing.prompts == 0
