import numpy as np
import pytest

from jaxrl_llm.algorithms.star import keep_rationales, training_steps


def test_golden_numbers(examples):
    steps = [training_steps(iteration) for iteration in range(1, 5)]
    np.testing.assert_allclose(steps, examples["star.steps_start40_grow1p2_iters1_4"])
    kept = keep_rationales(np.array([1, 0, 1, 0]), np.array([1, 1, 0, 0]))
    np.testing.assert_allclose(kept.first_try, examples["star.keep_plain"])
    np.testing.assert_allclose(kept.rationalized, examples["star.keep_rationalised"])


def test_steps_are_cut_down_not_rounded():
    assert training_steps(3, start=10, growth=1.25) == 15  # 15.6
    with pytest.raises(ValueError, match="iteration is 0"):
        training_steps(0)


def test_errors():
    with pytest.raises(ValueError, match=r"correct_with_hint has shape \(3,\), but correct has shape \(2,\)"):
        keep_rationales(np.ones(2), np.ones(3))
