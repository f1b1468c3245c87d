import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.losses.ratio import clip_indicators, clipped_surrogate, importance_ratio
from jaxrl_llm.masking import fill_masked, masked_mean


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def surrogate_loop(lr, A, low, high, dual=None, cap=None):
    r = np.exp(lr)
    unclipped = r if cap is None else min(r, cap)
    clipped = r
    if low is not None:
        clipped = max(clipped, 1 - low)
    if high is not None:
        clipped = min(clipped, 1 + high)
    loss = max(-A * unclipped, -A * clipped)
    return min(loss, -A * dual) if dual is not None and A < 0 else loss


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
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\), but the tokens have shape \(2, 4\)"):
        clip_indicators(jnp.zeros((2, 4)), jnp.zeros((2, 4)), jnp.zeros(3))


def test_surrogate_golden_numbers(examples, tok):
    def masked(**clip):
        return np.where(tok.mask, clipped_surrogate(tok.logprobs, tok.old, tok.advantages, **clip), 0)

    close(masked(), examples["ppo.clip_token_losses"])
    close(masked(clip_high=0.28), examples["dapo.token_losses"])
    close(masked().sum() / 6, examples["ppo.clip_loss_token_mean"])
    close(masked().sum() / 6, examples["dapo.token_mean_of_ppo_losses"])
    close(masked(clip_low=None, clip_high=None).sum() / 6, examples["ppo.noclip_seed000"])
    four, ten = np.log(4.0), np.log(10.0)
    duals = [clipped_surrogate(four, 0.0, -1.0), clipped_surrogate(four, 0.0, -1.0, dual_clip=3)]
    close(duals, examples["ppo.dual_clip_r4_Am1_c3"])
    close(clipped_surrogate(four, 0.0, 1.0, dual_clip=3), examples["ppo.dual_clip_r4_Ap1_c3"])
    close(clipped_surrogate(ten, 0.0, -1.0, ratio_cap=4), examples["ppo.two_sided_r10_Am1_delta4"])
    close(clipped_surrogate(ten, 0.0, 1.0, ratio_cap=4), -1.2)


@pytest.mark.parametrize("low", [None, 0.0, 0.1])
@pytest.mark.parametrize(("high", "cap"), [(None, None), (0.3, None), (0.3, 1.6)])
@pytest.mark.parametrize("dual", [None, 1.5])
def test_surrogate_equals_the_definition(low, high, dual, cap):
    rng = np.random.default_rng(0)
    lr, A = rng.normal(size=50), rng.normal(size=50)
    A[0] = 0
    value = clipped_surrogate(lr, np.zeros(50), A, clip_low=low, clip_high=high, dual_clip=dual, ratio_cap=cap)
    close(value, [surrogate_loop(*pair, low, high, dual, cap) for pair in zip(lr, A, strict=True)])


def test_surrogate_gradient_is_cut_where_the_ratio_has_gone_far_enough():
    lr = jnp.log(jnp.array([0.5, 0.5, 1.0, 1.0, 2.0, 2.0]))
    A = jnp.array([1.0, -1, 1, -1, 1, -1])
    grad = jax.grad(lambda x: clipped_surrogate(x, jnp.zeros(6), A).sum())(lr)
    close(grad, [-0.5, 0, -1, 1, 0, 2])
    capped = jax.grad(lambda x: clipped_surrogate(x, jnp.zeros(6), A, ratio_cap=1.5).sum())(lr)
    close(capped, [-0.5, 0, -1, 1, 0, 0])
    dual = jax.grad(lambda x: clipped_surrogate(x, jnp.zeros(6), A, dual_clip=1.5).sum())(lr)
    close(dual, capped)


@pytest.mark.parametrize("options", [{}, {"clip_low": None}, {"dual_clip": 1.5}, {"ratio_cap": 1.5}])
def test_surrogate_gradient_equals_finite_differences(options):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        lr, A = jnp.asarray(0.4 * rng.normal(size=20)), jnp.asarray(rng.normal(size=20))
        term = jax.jit(lambda x: clipped_surrogate(x, jnp.zeros(20), A, **options))
        check_grads(term, (lr,), order=1, modes=["rev"], eps=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": -0.1}, "clip_low is -0.1"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"dual_clip": 0.5}, "dual_clip is 0.5"),
        ({"ratio_cap": 1.1}, "ratio_cap is 1.1"),
        ({"ratio_cap": 4, "clip_high": None}, "ratio_cap is 4, but clip_high is None"),
    ],
)
def test_surrogate_rejects_bounds_without_sense(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_surrogate(0.0, 0.0, 1.0, **options)


@pytest.mark.parametrize("function", [clip_indicators, clipped_surrogate])
@pytest.mark.parametrize("bound", [-0.2, float("nan")])
def test_bounds_are_checked_alike(tok, function, bound):
    with pytest.raises(ValueError, match=r"clip_low is (-0.2|nan): it is a distance"):
        function(tok.logprobs, tok.old, tok.advantages, clip_low=bound)
