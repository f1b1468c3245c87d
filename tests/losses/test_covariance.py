import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.covariance import clip_cov_loss, kl_cov_loss, token_covariance
from jaxrl_llm.losses.policy import ppo_loss

KEY = jax.random.key(0)
ADVANTAGES = np.array([[1.0, 2, -1, 0.5], [-1, -2, np.nan, np.nan]])


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def covariance_loop(data):
    lp, A = data.logprobs[data.mask], data.token_advantages[data.mask]
    out = np.zeros(data.mask.shape)
    out[data.mask] = (lp - lp.mean()) * (A - A.mean())
    return out


def test_golden_numbers(examples, tok):
    covariance = token_covariance(tok.logprobs, ADVANTAGES, tok.mask)
    close(covariance, examples["cov.values"])
    close((covariance > 0.5) & (covariance < 5), examples["clipcov.band_0p5_5"])
    args = (tok.logprobs, tok.old, ADVANTAGES, tok.mask)
    close(kl_cov_loss(*args, kl_coef=0.0)[0], examples["klcov.loss_noreg"])
    # One token of six, the fewest there can be.
    close(kl_cov_loss(*args)[0], examples["klcov.loss_coef1_k1"])
    grad = jax.grad(lambda x: kl_cov_loss(x, *args[1:], kl_coef=1e3)[0])(jnp.float32(tok.logprobs))
    assert np.flatnonzero(abs(grad) > 10).tolist() == examples["klcov.top1_flat_index"]


def test_covariance_equals_the_definition(ragged):
    close(token_covariance(ragged.logprobs, ragged.token_advantages, ragged.mask), covariance_loop(ragged))
    grad = jax.grad(lambda x: jnp.sum(token_covariance(x, ragged.token_advantages, ragged.mask) ** 2))
    assert not grad(jnp.float32(ragged.logprobs)).any()


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.35, 1.0])
def test_kl_cov_equals_the_definition(ragged, fraction):
    covariance, n = covariance_loop(ragged), ragged.mask.sum()
    ranked = sorted(zip(*np.nonzero(ragged.mask), strict=True), key=lambda i: -covariance[i])
    chosen = ranked[: max(1, int(fraction * n))]
    total = 0.0
    for i in ranked:
        lr = ragged.logprobs[i] - ragged.old[i]
        total += -ragged.token_advantages[i] * np.exp(lr) + (0.3 * abs(lr) if i in chosen else 0)
    args = (ragged.logprobs, ragged.old, ragged.token_advantages, ragged.mask)
    close(kl_cov_loss(*args, fraction=fraction, kl_coef=0.3)[0], total / n)


def test_of_equal_covariances_the_first_is_chosen():
    """Constant advantages: every covariance is 0."""
    x = jnp.arange(6.0).reshape(2, 3)
    grad = jax.grad(lambda x: kl_cov_loss(x, x - 1, jnp.zeros(2), jnp.ones((2, 3), bool), fraction=0.34)[0])(x)
    close(grad, np.array([[1, 1, 0], [0, 0, 0]]) / 6)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_clip_cov_leaves_tokens_of_the_band_out(ragged, fraction):
    covariance, n = covariance_loop(ragged), ragged.mask.sum()
    lr = ragged.logprobs - ragged.old
    r, A = np.exp(lr), ragged.token_advantages
    cut = ((r < 0.8) & (A < 0)) | ((r > 1.2) & (A > 0))
    band = ragged.mask & ~cut & (covariance > 0.05) & (covariance < 2)
    assert (ragged.mask & cut & (covariance > 0.05)).any()

    args = (ragged.old, A, ragged.mask)
    options = {"clip_low": 0.2, "clip_high": 0.2}
    cov = {"cov_low": 0.05, "cov_high": 2, "fraction": fraction}
    everything = jax.grad(lambda x: ppo_loss(x, *args, **options)[0])(jnp.float32(ragged.logprobs))
    seen = []
    for seed in range(10):
        key = jax.random.key(seed)
        value = jax.value_and_grad(lambda x, key=key: clip_cov_loss(x, *args, key, **options, **cov)[0])
        loss, grad = value(jnp.float32(ragged.logprobs))
        dropped = (np.asarray(grad) == 0) & (np.asarray(everything) != 0)
        assert dropped.sum() == min(max(1, int(fraction * n)), band.sum())
        assert not (dropped & ~band).any()
        terms = np.where(dropped, 0, np.maximum(-A * r, -A * np.clip(r, 0.8, 1.2)))
        close(loss, terms[ragged.mask].mean())
        metrics = clip_cov_loss(ragged.logprobs, *args, key, **options, **cov)[1]
        close(metrics["clip_ratio/covariance_mean"].value(), dropped.sum() / n)
        close(metrics["clip_ratio/region_mean"].value(), cut[ragged.mask].mean())
        seen.append(tuple(np.flatnonzero(dropped)))
    assert fraction == 1 or len(set(seen)) > 1


def test_the_draw_is_even():
    """Four tokens in the band, one of them drawn at a time."""
    logprobs, advantages = jnp.array([[1.0, 1, 1, 1, -4]]), jnp.array([[1.0, 1, 1, 1, -4]])
    mask = jnp.ones((1, 5), bool)

    def dropped(key):
        grad = jax.grad(lambda x: clip_cov_loss(x, None, advantages, mask, key, cov_high=3.9, cov_low=0.5)[0])
        return grad(logprobs)[0] == 0

    share = jax.vmap(dropped)(jax.random.split(KEY, 400)).mean(0)
    assert share[4] == 0
    np.testing.assert_allclose(share[:4], 0.25, atol=0.08)


def test_what_holds_of_every_loss(check_token_loss, ragged_rows):
    def clip_cov(**arguments):
        # All of the band, so that the order of rows does not matter.
        return clip_cov_loss(**arguments, key=KEY, fraction=1.0, cov_low=0.1)

    def kl_cov(**arguments):
        return kl_cov_loss(**arguments, fraction=0.2)

    arrays = ragged_rows("logprobs", "old_logprobs", "advantages", "mask", "weights")
    for loss in (clip_cov, kl_cov):
        check_token_loss(loss, arrays, mode=None)


@pytest.mark.parametrize("loss", [kl_cov_loss, lambda *args, **options: clip_cov_loss(*args, KEY, **options)])
def test_the_normalizer_is_the_denominator(ragged, loss):
    args = (ragged.logprobs, ragged.old, ragged.advantages, ragged.mask)
    close(loss(*args, normalizer=2 * ragged.mask.sum())[0], loss(*args)[0] / 2)


def test_errors(tok):
    with pytest.raises(ValueError, match=r"fraction is -0.1: it must be finite and not negative"):
        kl_cov_loss(tok.logprobs, tok.old, ADVANTAGES, tok.mask, fraction=-0.1)
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\)"):
        token_covariance(tok.logprobs, np.zeros(3), tok.mask)
