import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.ratio import clip_indicators, importance_ratio
from jaxrl_llm.masking import fill_masked, masked_mean


def test_golden_numbers(examples, tok):
    ratio = importance_ratio(fill_masked(tok.logprobs, tok.mask), fill_masked(tok.old, tok.mask))
    expected = np.array(examples["ppo.ratio"])
    np.testing.assert_allclose(np.where(tok.mask, ratio, 0), expected, atol=1e-6)
    clipped = clip_indicators(tok.logprobs, tok.old, tok.advantages)
    np.testing.assert_allclose(masked_mean(clipped.region, tok.mask), examples["ppo.clipfrac"], atol=1e-6)
    assert np.argwhere(clipped.high & tok.mask).tolist() == [[0, 0]]
    assert np.argwhere(clipped.low & tok.mask).tolist() == [[1, 1]]


def test_ratio_is_clamped_and_differentiates_the_policy_only():
    value, grads = jax.value_and_grad(importance_ratio, argnums=(0, 1))(-1.0, -1.5)
    np.testing.assert_allclose(value, np.exp(0.5), rtol=1e-6)
    np.testing.assert_allclose(grads, (np.exp(0.5), 0), rtol=1e-6)
    for difference in (-1e4, 1e4):
        value, grad = jax.value_and_grad(importance_ratio)(difference, 0.0)
        np.testing.assert_allclose(value, np.exp(np.sign(difference) * 20), rtol=1e-5)
        assert grad == 0


def test_ratio_without_old_policy_is_one_with_the_policy_gradient():
    value, grad = jax.value_and_grad(lambda x: importance_ratio(x, None))(-1.7)
    assert (value, grad) == (1, 1)


def test_indicators_mark_the_tokens_whose_gradient_is_cut():
    log_ratios = np.linspace(-0.5, 0.5, 11)
    ratios = np.exp(log_ratios)
    for advantage in (-1.0, 0.0, 1.0):
        clipped = clip_indicators(log_ratios, np.zeros(11), np.full(11, advantage), clip_low=0.1, clip_high=0.3)
        np.testing.assert_array_equal(clipped.low, (ratios < 0.9) & (advantage < 0))
        np.testing.assert_array_equal(clipped.high, (ratios > 1.3) & (advantage > 0))
        np.testing.assert_array_equal(clipped.region, clipped.low | clipped.high)
    unbounded = clip_indicators(log_ratios, np.zeros(11), np.ones(11), clip_low=None, clip_high=None)
    assert not unbounded.region.any()


def test_errors():
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(3,\), but logprobs has shape \(2,\)"):
        importance_ratio(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\), but logprobs has shape \(2, 4\)"):
        clip_indicators(jnp.zeros((2, 4)), jnp.zeros((2, 4)), jnp.zeros(3))
