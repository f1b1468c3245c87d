from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.losses.aggregate import aggregate
from jaxrl_llm.losses.kl import (
    KLEstimator,
    kl_abs,
    kl_exact,
    kl_k1,
    kl_k1_straight_through,
    kl_k2,
    kl_k3,
    kl_k3_ratio_weighted,
    kl_k3_straight_through,
    kl_penalty,
)

ESTIMATORS = get_args(KLEstimator)
VALUES = {  # with r = 1 for "k3-ratio"
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: np.exp(-d) - 1 + d,
    "abs": abs,
    "k1+": lambda d: d,
    "k3+": lambda d: np.exp(-d) - 1 + d,
    "k3-ratio": lambda d: np.exp(-d) - 1 + d,
}
GRADIENTS = {
    "k1": lambda d: 1.0,
    "k2": lambda d: d,
    "k3": lambda d: 1 - np.exp(-d),
    "abs": np.sign,
    "k1+": lambda d: d,
    "k3+": lambda d: d,
    "k3-ratio": lambda d: d,
}


def test_golden_numbers(examples, tok):
    row = (tok.logprobs[0], tok.ref[0])
    np.testing.assert_allclose(kl_k1(*row), examples["kl.k1_row0"], atol=1e-6)
    np.testing.assert_allclose(kl_k2(*row), examples["kl.k2_row0"], atol=1e-6)
    np.testing.assert_allclose(kl_k3(*row), examples["kl.k3_row0"], atol=1e-6)
    np.testing.assert_allclose(kl_abs(*row), examples["kl.abs_row0"], atol=1e-6)
    k3 = kl_k3(tok.logprobs, tok.ref)
    token_mean = aggregate(k3, tok.mask, mode="token-mean")
    np.testing.assert_allclose(token_mean, examples["kl.k3_token_mean"], atol=1e-6)
    seq_mean = aggregate(k3, tok.mask, mode="seq-mean-token-mean")
    np.testing.assert_allclose(seq_mean, examples["kl.k3_seq_mean_token_mean"], atol=1e-6)
    np.testing.assert_allclose(seq_mean, examples["grpo.kl_k3_seqmean"], atol=1e-6)
    far = kl_k3(-4.0, -1.0)
    np.testing.assert_allclose(far, examples["kl.k3_unclamped_ref_minus_lp_3"], rtol=1e-6)
    np.testing.assert_allclose(kl_k3(-4.0, -1.0, clip=10), examples["kl.k3_clamped_ref_minus_lp_3"])
    np.testing.assert_allclose(kl_k3(0.5, 0.0), examples["kl.k3_value_at_0p5"], atol=1e-6)
    grads = [jax.grad(kl)(0.5, 0.0) for kl in (kl_k1, kl_k2, kl_k3)]
    np.testing.assert_allclose(grads, examples["kl.grad_coeff_k1_k2_k3_at_0p5"], atol=1e-6)
    ratio_weighted = jax.grad(kl_k3_ratio_weighted)(0.5, 0.5, 0.0)
    expected = examples["kl.grad_coeff_is_weighted_k3_onpolicy_at_0p5"]
    np.testing.assert_allclose(ratio_weighted, expected, atol=1e-6)


def test_new_against_old_policy_golden_numbers(examples, tok):
    # The sample comes from the old policy, so that it is the first argument.
    for kl, expected in zip((kl_k1, kl_k2, kl_k3), examples["ppo.approx_kl_k1_k2_k3"], strict=True):
        value = aggregate(kl(tok.old, tok.logprobs), tok.mask, mode="token-mean")
        np.testing.assert_allclose(value, expected, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_value_and_gradient_equal_the_table(estimator):
    d = np.random.default_rng(0).normal(size=(3, 5))
    ref = np.random.default_rng(1).normal(size=(3, 5)) - 3

    def penalty(logprobs):
        return kl_penalty(logprobs, ref, estimator=estimator)

    values, pullback = jax.vjp(jax.jit(penalty), jnp.float32(ref + d))
    np.testing.assert_allclose(values, VALUES[estimator](d), rtol=1e-4, atol=1e-6)
    (grads,) = pullback(jnp.ones_like(values))
    expected = np.broadcast_to(GRADIENTS[estimator](d), d.shape)
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kl", [kl_k1, kl_k2, kl_k3, kl_abs])
def test_gradient_equals_finite_differences(kl):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logprobs, ref = jnp.asarray(rng.normal(size=6)), jnp.asarray(rng.normal(size=6))
        check_grads(jax.jit(lambda x: kl(x, ref)), (logprobs,), order=1, modes=["rev"], eps=1e-6)
        old = logprobs + 0.3
        check_grads(
            jax.jit(lambda x: kl_k3_ratio_weighted(x, old, ref)),
            (logprobs,),
            order=1,
            modes=["rev"],
            eps=1e-6,
        )


def test_expected_gradients_over_a_vocabulary(examples):
    """Sums over all three tokens: which KL each estimator, as a loss, descends."""
    theta, ref = jnp.array([0.3, -0.2, 0.1]), jax.nn.log_softmax(jnp.array([-0.1, 0.4, 0.2]))

    def reverse_kl(theta):
        return kl_exact(theta, ref)

    def expected_gradient(kl):
        def loss(theta):  # tokens drawn from the policy, the draw not differentiated
            logprobs = jax.nn.log_softmax(theta)
            return jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * kl(logprobs))

        return jax.grad(loss)(theta)

    def close(value, name):
        np.testing.assert_allclose(value, examples[name], atol=1e-6)

    close(reverse_kl(theta), "kl.exact_reverse_kl_3way")
    close(jax.grad(reverse_kl)(theta), "kl.grad_reverse_kl")
    close(expected_gradient(lambda x: kl_k1(x, ref)), "kl.grad_E_k1_as_loss")
    close(expected_gradient(lambda x: kl_k2(x, ref)), "kl.grad_E_k2_as_loss")
    close(expected_gradient(lambda x: kl_k3(x, ref)), "kl.grad_E_k3_as_loss")
    close(expected_gradient(lambda x: kl_k3(x, ref)), "kl.grad_forward_kl")
    close(jax.grad(lambda theta: kl_exact(theta, ref, direction="forward"))(theta), "kl.grad_forward_kl")
    close(expected_gradient(lambda x: kl_k1_straight_through(x, ref)), "kl.grad_reverse_kl")
    close(expected_gradient(lambda x: kl_k3_straight_through(x, ref)), "kl.grad_reverse_kl")
    close(expected_gradient(lambda x: kl_k3_ratio_weighted(x, None, ref)), "kl.grad_reverse_kl")


def test_ratio_weighted_is_unbiased_off_policy():
    theta, ref = jnp.array([0.3, -0.2, 0.1]), jax.nn.log_softmax(jnp.array([-0.1, 0.4, 0.2]))
    old = jax.nn.log_softmax(jnp.array([1.0, -0.5, 0.0]))

    def exact(theta):
        logprobs = jax.nn.log_softmax(theta)
        return jnp.sum(jnp.exp(logprobs) * (logprobs - ref))

    def estimated(theta):
        logprobs = jax.nn.log_softmax(theta)
        return jnp.sum(jnp.exp(old) * kl_k3_ratio_weighted(logprobs, old, ref))

    np.testing.assert_allclose(estimated(theta), exact(theta), atol=1e-6)
    np.testing.assert_allclose(jax.grad(estimated)(theta), jax.grad(exact)(theta), atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reference_and_old_policy_are_constants(estimator):
    def penalty(ref, old):
        return kl_penalty(-1.0, ref, estimator=estimator, old_logprobs=old)

    assert jax.grad(penalty, argnums=(0, 1))(-2.0, -1.5) == (0, 0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("difference", [-1e4, 1e4])
def test_far_policies_are_finite(estimator, difference):
    penalty = jax.value_and_grad(lambda x: kl_penalty(x, 0.0, estimator=estimator))
    assert np.isfinite(penalty(difference)).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_clip_bounds_the_value(estimator):
    d = jnp.array([-9.0, -0.1, 0.1, 30.0])
    clipped = kl_penalty(d, jnp.zeros(4), estimator=estimator, clip=2)
    expected = np.clip(kl_penalty(d, jnp.zeros(4), estimator=estimator), -2, 2)
    np.testing.assert_allclose(clipped, expected, rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_vmap_and_half_precision(estimator):
    rng = np.random.default_rng(0)
    logprobs, ref = jnp.float32(rng.normal(size=(2, 3))), jnp.float32(rng.normal(size=(2, 3)))

    def penalty(logprobs, ref):
        return kl_penalty(logprobs, ref, estimator=estimator, old_logprobs=0.9 * logprobs)

    expected = penalty(logprobs, ref)
    np.testing.assert_allclose(jax.jit(jax.vmap(penalty))(logprobs, ref), expected, rtol=1e-5, atol=1e-6)
    half = logprobs.astype(jnp.bfloat16)
    assert kl_penalty(half, ref, estimator=estimator).dtype == jnp.float32
    widened = kl_penalty(half.astype(jnp.float32), ref, estimator=estimator)
    np.testing.assert_array_equal(kl_penalty(half, ref, estimator=estimator), widened)


def exact_loop(p_logits, q_logits):
    """KL(p ‖ q), one position and one token at a time."""
    total = np.zeros(p_logits.shape[:-1])
    for index in np.ndindex(total.shape):
        p, q = (np.exp(x[index]) / np.exp(x[index]).sum() for x in (p_logits, q_logits))
        total[index] = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    return total


def test_exact_kl_equals_the_definition():
    rng = np.random.default_rng(0)
    logits, ref = 2 * rng.normal(size=(3, 4, 7)), 2 * rng.normal(size=(3, 4, 7))
    for direction, pair in (("reverse", (logits, ref)), ("forward", (ref, logits))):
        expected = exact_loop(*pair)
        np.testing.assert_allclose(kl_exact(logits, ref, direction=direction), expected, rtol=1e-5, atol=1e-6)
        mapped = jax.jit(jax.vmap(lambda x, y, d=direction: kl_exact(x, y, direction=d)))(logits, ref)
        np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)
        with jax.enable_x64(True):
            constant = jnp.asarray(ref)
            term = jax.jit(lambda x, y=constant, d=direction: kl_exact(x, y, direction=d))
            check_grads(term, (jnp.asarray(logits),), order=2, modes=["rev", "fwd"])
        half = jnp.asarray(logits, jnp.bfloat16)
        assert kl_exact(half, ref, direction=direction).dtype == jnp.float32
        widened = kl_exact(jnp.float32(half), ref, direction=direction)
        np.testing.assert_array_equal(kl_exact(half, ref, direction=direction), widened)


def test_exact_kl_is_what_k1_estimates():
    rng = np.random.default_rng(0)
    logits, ref = rng.normal(size=5), rng.normal(size=5)
    logprobs, ref_logprobs = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref)
    expected = jnp.sum(jnp.exp(logprobs) * kl_k1(logprobs, ref_logprobs))
    np.testing.assert_allclose(kl_exact(logits, ref), expected, rtol=1e-5)
    np.testing.assert_allclose(kl_exact(logprobs, ref_logprobs), expected, rtol=1e-5)  # log-probs are logits


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_exact_kl_of_a_cut_vocabulary_is_finite(direction):
    """What neither policy can emit adds nothing, to the value or the gradient."""
    logits, ref = jnp.array([1.0, -jnp.inf, 0.5, -2.0]), jnp.array([0.0, -jnp.inf, 0.1, 0.2])
    both = jnp.array([0, 2, 3])
    term = jax.value_and_grad(lambda x, y: kl_exact(x, y, direction=direction))
    (value, grad), (expected, expected_grad) = term(logits, ref), term(logits[both], ref[both])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad[both], expected_grad, rtol=1e-5, atol=1e-7)
    assert grad[1] == 0
    # The policy may lack what the reference has, but then the forward divergence is infinite.
    value = kl_exact(logits.at[0].set(-jnp.inf), ref, direction=direction)
    assert np.isfinite(value) if direction == "reverse" else np.isposinf(value)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("almost", [-1e9, -3e38, -200.0, -95.0])
def test_exact_kl_of_vocabularies_cut_in_two_ways_is_finite(direction, almost):
    """A probability that rounds to 0 is 0, where the other one is exactly 0, too."""
    cut, barely = jnp.array([1.0, -jnp.inf, 0.5]), jnp.array([0.0, almost, 0.1])
    both = jnp.array([0, 2])
    for logits, ref in ((cut, barely), (barely, cut)):
        value, grad = jax.value_and_grad(lambda x, y=ref: kl_exact(x, y, direction=direction))(logits)
        np.testing.assert_allclose(value, kl_exact(logits[both], ref[both], direction=direction), rtol=1e-6)
        assert np.isfinite(grad).all() and grad[1] == 0


def test_exact_kl_has_a_constant_reference():
    logits, ref = jnp.array([1.0, 0.0]), jnp.array([0.0, 0.5])
    for direction in ("reverse", "forward"):
        assert not np.any(jax.grad(lambda y, d=direction: kl_exact(logits, y, direction=d))(ref))


def test_errors():
    with pytest.raises(ValueError, match="unknown direction 'up': choose one of reverse, forward"):
        kl_exact(jnp.zeros(2), jnp.zeros(2), direction="up")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"ref_logits has shape \(3,\), but logits has shape \(2,\)"):
        kl_exact(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match="unknown KL estimator 'k4': choose one of k1, k2"):
        kl_penalty(0.0, 0.0, estimator="k4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(3,\), but logprobs has shape \(2,\)"):
        kl_k3(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match="clip is -1: it bounds a distance from 0"):
        kl_penalty(0.0, 0.0, estimator="k3", clip=-1)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(3,\), but logprobs has shape \(2,\)"):
        kl_k3_ratio_weighted(jnp.zeros(2), jnp.zeros(3), jnp.zeros(2))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_logits_that_are_no_distribution_are_nan_and_pass_no_gradient_on(direction):
    logits = jnp.array([[0.3, -1.0], [jnp.nan, 0.0], [0.5, 0.0]])
    reference = jnp.array([[0.0, 0.5], [0.0, 1.0], [0.0, jnp.inf]])
    fine = jnp.array([True, False, False])
    values = kl_exact(logits, reference, direction=direction)
    np.testing.assert_array_equal(np.isnan(values), ~fine)
    gradient = jax.grad(lambda z: jnp.sum(jnp.where(fine, kl_exact(z, reference, direction=direction), 0.0)))(logits)
    assert np.abs(gradient[0]).min() > 0.01 and not gradient[1:].any()
