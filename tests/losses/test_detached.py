import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.detached import cispo_loss, divergence_mask, dppo_loss, vespo_loss, vespo_weights


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def check_detached(loss, data, weights):
    """The value is the token mean of −w A logprobs, and the gradient that of a constant w."""
    value, grad = jax.value_and_grad(lambda x: loss(x)[0])(jnp.float32(data.logprobs))
    by_token = -weights * data.token_advantages / data.mask.sum()
    close(value, np.sum(by_token * data.logprobs, where=data.mask))
    close(grad, np.where(data.mask, by_token, 0))


def binary_kl(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def keep_loop(data, low, high, divergence):
    keep = np.zeros(data.mask.shape, bool)
    for i in zip(*np.nonzero(data.mask), strict=True):
        p, old, A = np.exp(data.logprobs[i]), np.exp(data.old[i]), data.token_advantages[i]
        if divergence == "tv":
            keep[i] = p - old <= high if A > 0 else p - old >= -low
        else:
            kl = binary_kl(old, p)
            keep[i] = (kl <= high or p <= old) if A > 0 else (kl <= low or p >= old)
    return keep


def phi_loop(data, k_pos=2.0, lam_pos=3.0, k_neg=3.0, lam_neg=2.0):
    phi = np.zeros(data.mask.shape)
    for i in zip(*np.nonzero(data.mask), strict=True):
        w = np.exp(np.sum((data.logprobs - data.old)[i[:-1]], where=data.mask[i[:-1]]))
        k, lam = (k_pos, lam_pos) if data.token_advantages[i] >= 0 else (k_neg, lam_neg)
        phi[i] = w**k * np.exp(lam - lam * w)
    return phi


def test_golden_numbers(examples, tok):
    args = (tok.logprobs, tok.old, tok.advantages)
    close(cispo_loss(*args, tok.mask, w_max=1.2)[0], examples["cispo.loss_eps_high0p2"])
    close(cispo_loss(*args, tok.mask)[0], examples["cispo.loss_trl_max5"])
    # The weights are what is left of the gradient.
    grad = jax.grad(lambda x: cispo_loss(x, *args[1:], tok.mask, w_max=1.2, aggregation="token-sum")[0])
    weights = -grad(jnp.float32(tok.logprobs)) / tok.advantages[:, None]
    close(weights, examples["cispo.weights_low1_high0p2"])

    delta = {"delta_low": 0.05, "delta_high": 0.05}
    keep = divergence_mask(*args, **delta)
    close(keep & tok.mask, examples["dppo.tv_valid_mask_0p05"])
    close(dppo_loss(*args, tok.mask, **delta)[0], examples["dppo.tv_loss_0p05"])
    close(dppo_loss(*args, tok.mask, **delta, log_ratio_coef=0.1)[0], examples["dppo.tv_log2_loss_0p05"])

    close(vespo_weights(*args, tok.mask)[:, 0], examples["vespo.phi"])
    close(vespo_loss(*args, tok.mask)[0], examples["vespo.loss_token_mean"])


def test_cispo_equals_the_definition(ragged):
    r = np.exp(ragged.logprobs - ragged.old)

    def loss(x, **options):
        return cispo_loss(x, ragged.old, ragged.token_advantages, ragged.mask, w_min=0.9, w_max=1.1, **options)

    check_detached(loss, ragged, np.clip(r, 0.9, 1.1))
    _, metrics = loss(ragged.logprobs)
    close(metrics["clip_ratio/low_mean"].value(), (r < 0.9)[ragged.mask].mean())
    close(metrics["clip_ratio/high_mean"].value(), (r > 1.1)[ragged.mask].mean())
    close(metrics["ratio/mean"].value(), r[ragged.mask].mean())
    means = [np.mean((-np.clip(r, 0.9, 1.1) * ragged.token_advantages * ragged.logprobs)[i][ragged.mask[i]])
             for i in zip(*np.nonzero(ragged.mask.any(-1)), strict=True)]  # fmt: skip
    close(loss(ragged.logprobs, aggregation="seq-mean-token-mean")[0], np.mean(means))


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_equals_the_definition(ragged, divergence):
    ragged.logprobs, ragged.old = ragged.logprobs - 1, ragged.old - 1  # no probability above 1
    low, high = {"tv": (0.02, 0.04), "kl": (0.005, 0.01)}[divergence]
    options = {"delta_low": low, "delta_high": high, "divergence": divergence}
    args = (ragged.old, ragged.token_advantages)
    keep = keep_loop(ragged, low, high, divergence)
    assert 5 < keep.sum() < ragged.mask.sum() - 5
    np.testing.assert_array_equal(divergence_mask(ragged.logprobs, *args, **options) & ragged.mask, keep)
    weights = np.where(keep, np.minimum(np.exp(ragged.logprobs - ragged.old), 1.2), 0)
    check_detached(lambda x: dppo_loss(x, *args, ragged.mask, **options, w_max=1.2), ragged, weights)

    _, metrics = dppo_loss(ragged.logprobs, *args, ragged.mask, **options, w_max=1.2)
    advantages = ragged.token_advantages
    close(metrics["clip_ratio/low_mean"].value(), (~keep & (advantages < 0))[ragged.mask].mean())
    close(metrics["clip_ratio/high_mean"].value(), (~keep & (advantages > 0))[ragged.mask].mean())
    capped = (keep & (np.exp(ragged.logprobs - ragged.old) > 1.2))[ragged.mask].mean()
    assert capped > 0
    close(metrics["ratio/capped_mean"].value(), capped)
    # Where nothing is to be learned, nothing is cut.
    _, metrics = dppo_loss(ragged.logprobs, ragged.old, 0 * advantages, ragged.mask, **options)
    assert metrics["clip_ratio/region_mean"].value() == 0


def test_the_squared_log_ratio_of_dppo_acts_on_all_tokens(ragged):
    """Also on those that are cut off or have no weight: here all of them."""
    args = (ragged.old, np.zeros_like(ragged.token_advantages), ragged.mask)
    options = {"delta_low": 1e-9, "delta_high": 1e-9, "log_ratio_coef": 0.3, "weights": 0 * ragged.weights}
    value, grad = jax.value_and_grad(lambda x: dppo_loss(x, *args, **options)[0])(jnp.float32(ragged.logprobs))
    expected, slope = 0.0, np.zeros(ragged.mask.shape)
    for i in zip(*np.nonzero(ragged.mask), strict=True):
        log_ratio = ragged.logprobs[i] - ragged.old[i]
        expected += 0.3 * log_ratio**2 / ragged.mask.sum()
        slope[i] = 0.6 * log_ratio / ragged.mask.sum()
    close(value, expected)
    close(grad, slope)
    with pytest.raises(ValueError, match="log_ratio_coef is -1: it must be finite and not negative"):
        dppo_loss(ragged.logprobs, *args, delta_low=0.1, delta_high=0.1, log_ratio_coef=-1)


def test_binary_kl_is_exact_for_likely_and_unlikely_tokens():
    """Beside a bound on either side of the true value, in float32."""
    old = np.array([-1e-3, -0.1, -12.0, -1e-5])
    new = np.array([-0.3, -2.0, -3.0, -1e-3])
    kl = binary_kl(np.exp(old), np.exp(new))
    for A in (1.0, -1.0):
        # Away from the old policy in the direction of A; back to it is kept at once.
        away = (new > old) if A > 0 else (new < old)
        for factor, expected in ((0.999, ~away), (1.001, np.ones(4, bool))):
            keep = [
                divergence_mask(n, o, A, delta_low=k * factor, delta_high=k * factor, divergence="kl")
                for n, o, k in zip(new, old, kl, strict=True)
            ]
            np.testing.assert_array_equal(keep, expected)


def test_certain_tokens_are_finite():
    options = {"delta_low": 0.1, "delta_high": 0.1, "divergence": "kl"}
    args = (jnp.zeros(2), jnp.array([0.0, -1.0]), jnp.array([1.0, 1.0]))
    assert divergence_mask(*args, **options).tolist() == [True, False]
    value, grad = jax.value_and_grad(lambda x: dppo_loss(x, *args[1:], jnp.ones(2, bool), **options)[0])(args[0])
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_vespo_equals_the_definition(ragged):
    args = (ragged.old, ragged.token_advantages, ragged.mask)
    settings = {"k_pos": 1.5, "lam_pos": 2.0, "k_neg": 2.5, "lam_neg": 1.0}
    for options in ({}, settings):
        phi = phi_loop(ragged, **options)
        np.testing.assert_allclose(
            np.where(ragged.mask, vespo_weights(ragged.logprobs, *args, **options), 0), phi, rtol=1e-4
        )
        check_detached(lambda x, options=options: vespo_loss(x, *args, **options), ragged, phi)
    _, metrics = vespo_loss(ragged.logprobs, ragged.old, ragged.advantages, ragged.mask)
    ragged.token_advantages = np.broadcast_to(ragged.advantages[..., None], ragged.mask.shape)
    close(metrics["vespo/phi_seq_mean"].value(), phi_loop(ragged)[..., 0][ragged.mask[..., 0]].mean())


@pytest.mark.parametrize("far", [-1e4, -3.0, 3.0, 1e4])
def test_vespo_fades_for_far_sequences(far):
    phi = vespo_weights(jnp.full((1, 3), far), jnp.zeros((1, 3)), jnp.ones(1), jnp.ones((1, 3), bool))
    assert (phi < 1e-3).all()
    assert np.isfinite(phi).all()


@pytest.mark.parametrize("loss", [cispo_loss, vespo_loss, "tv", "kl"])
def test_what_holds_of_every_loss(check_token_loss, ragged_rows, loss):
    def dppo(**arguments):
        return dppo_loss(**arguments, delta_low=0.05, delta_high=0.1, divergence=loss)

    arrays = ragged_rows("logprobs", "old_logprobs", "advantages", "mask", "weights")
    check_token_loss(dppo if isinstance(loss, str) else loss, arrays, mode="token-mean", detached=True)


@pytest.mark.parametrize("loss", [cispo_loss, vespo_loss])
def test_on_its_own_samples_the_weight_is_one(ragged, loss):
    grad = jax.grad(lambda x: loss(x, None, ragged.advantages, ragged.mask)[0])(jnp.float32(ragged.logprobs))
    close(grad, np.where(ragged.mask, -ragged.advantages[..., None], 0) / ragged.mask.sum())


def test_errors():
    one = (np.zeros(1), np.zeros(1), np.ones(1))
    with pytest.raises(ValueError, match="unknown divergence 'js': choose one of tv, kl"):
        divergence_mask(*one, delta_low=1, delta_high=1, divergence="js")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="delta_high is 0"):
        divergence_mask(*one, delta_low=1, delta_high=0)
    with pytest.raises(ValueError, match="w_max is -1: it must be finite and positive"):
        cispo_loss(*one, np.ones(1, bool), w_max=-1)
    with pytest.raises(ValueError, match="lam_neg is 0"):
        vespo_weights(*one, np.ones(1, bool), lam_neg=0)


def test_bounds_and_shapes_that_do_not_fit(tok):
    with pytest.raises(ValueError, match=r"w_min is 5.0 and w_max is 1.0: no weight is between them"):
        cispo_loss(tok.logprobs, tok.old, tok.advantages, tok.mask, w_min=5.0, w_max=1.0)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(4,\)"):
        divergence_mask(tok.logprobs, tok.old[0], tok.advantages, delta_low=0.1, delta_high=0.1)
