from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.losses.preference_terms import (
    FDivergence,
    cdpo_term,
    discopop_term,
    dpo_term,
    exo_term,
    f_divergence_score,
    hinge_term,
    ipo_term,
    robust_dpo_term,
)


def sigma(x):
    return 1 / (1 + np.exp(-x))


def discopop(h, beta=0.05, tau=0.05):
    z = beta * h
    w = sigma(z / tau)
    return (1 - w) * np.log(1 + np.exp(-z)) + w * np.exp(-z)


TERMS = {  # the equations, at the defaults, of β h = z
    "dpo": (dpo_term, {}, lambda h: -np.log(sigma(0.1 * h))),
    "cdpo": (
        cdpo_term,
        {"label_smoothing": 0.2},
        lambda h: -0.8 * np.log(sigma(0.1 * h)) - 0.2 * np.log(sigma(-0.1 * h)),
    ),
    "robust": (
        robust_dpo_term,
        {"label_smoothing": 0.2},
        lambda h: (-0.8 * np.log(sigma(0.1 * h)) + 0.2 * np.log(sigma(-0.1 * h))) / 0.6,
    ),
    "ipo": (ipo_term, {}, lambda h: (h - 5) ** 2),
    "ipo_target": (ipo_term, {"target": 0.5}, lambda h: (h - 0.5) ** 2),
    "hinge": (hinge_term, {}, lambda h: np.maximum(0, 1 - 0.1 * h)),
    "exo": (
        exo_term,
        {"label_smoothing": 0.01},
        lambda h: sigma(0.1 * h) * np.log(sigma(0.1 * h) / 0.99) + sigma(-0.1 * h) * np.log(sigma(-0.1 * h) / 0.01),
    ),
    "discopop": (discopop_term, {}, discopop),
}
SCORES = {  # derivatives of f at u = exp(log-ratio)
    "reverse_kl": lambda u: np.log(u),
    "forward_kl": lambda u: 1 - 1 / u,
    "js": lambda u: np.log(2 * u / (1 + u)),
    "alpha": lambda u: (u ** (0.5 - 1) - 1) / (0.5 - 1),
}


def close(value, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", TERMS)
def test_terms_equal_the_definition(name):
    term, options, definition = TERMS[name]
    h = 8 * np.random.default_rng(0).normal(size=(3, 5))
    close(term(h, **options), definition(h))
    close(jax.jit(jax.vmap(lambda h: term(h, **options)))(h), definition(h))
    with jax.enable_x64(True):
        check_grads(jax.jit(lambda h: term(h, **options)), (jnp.asarray(h),), 1, ["rev"], eps=1e-6)
    half = jnp.asarray(h, jnp.bfloat16)
    assert term(half, **options).dtype == jnp.float32
    close(term(half, **options), term(half.astype(jnp.float32), **options))


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("far", [-1e5, 1e5])
def test_terms_far_out_are_finite(name, far):
    term, options, _ = TERMS[name]
    assert np.isfinite(jax.value_and_grad(lambda h: term(h, **options))(far)).all()


def test_where_the_minima_are():
    """What each loss asks of the margin: forever more, a finite one, or enough."""
    h = jnp.linspace(-60.0, 60.0, 601)
    assert h[jnp.argmin(dpo_term(h))] == 60
    close(h[jnp.argmin(cdpo_term(h, label_smoothing=0.1))], np.log(9) / 0.1, atol=0.2)
    close(h[jnp.argmin(ipo_term(h))], 5)
    close(jax.grad(hinge_term)(10.5), 0)
    # The expectation of the robust loss over flipped labels is the loss of the right ones.
    flipped = 0.9 * robust_dpo_term(h, label_smoothing=0.1) + 0.1 * robust_dpo_term(-h, label_smoothing=0.1)
    close(flipped, dpo_term(h), atol=1e-5)
    close(h[jnp.argmin(exo_term(h, label_smoothing=0.1))], np.log(9) / 0.1, atol=0.2)


@pytest.mark.parametrize("f_divergence", get_args(FDivergence))
def test_divergence_scores_equal_the_definition(f_divergence):
    log_ratio = np.random.default_rng(0).normal(size=20)
    close(f_divergence_score(log_ratio, f_divergence=f_divergence), SCORES[f_divergence](np.exp(log_ratio)))
    for far in (-1e4, 1e4):
        score = jax.value_and_grad(lambda x: f_divergence_score(x, f_divergence=f_divergence))
        assert np.isfinite(score(far)).all()
    with jax.enable_x64(True):
        term = jax.jit(lambda x: f_divergence_score(x, f_divergence=f_divergence))
        check_grads(term, (jnp.asarray(log_ratio),), 1, ["rev"], eps=1e-6)


def test_alpha_divergence_has_both_kls_at_its_ends():
    log_ratio = np.linspace(-2, 2, 9)

    def alpha(f_alpha):
        return f_divergence_score(log_ratio, f_divergence="alpha", f_alpha=f_alpha)

    close(alpha(1.0), log_ratio)
    close(alpha(1 + 1e-4), log_ratio, rtol=1e-3)
    close(alpha(0.0), f_divergence_score(log_ratio, f_divergence="forward_kl"))


@pytest.mark.parametrize("f_divergence", get_args(FDivergence))
def test_terms_of_far_scores_are_finite(f_divergence):
    """Also the square of a score."""
    for far in (-1e4, 1e4):
        score = f_divergence_score(far, f_divergence=f_divergence)
        assert np.isfinite(ipo_term(score) * 1000) and np.isfinite(dpo_term(score, beta=1e3) * 1000)


def test_errors():
    for term in (dpo_term, ipo_term, hinge_term, exo_term, discopop_term):
        with pytest.raises(ValueError, match="beta is -1"):
            term(0.0, beta=-1)
    for smoothing in (-0.1, 0.5, float("nan")):
        for term in (cdpo_term, robust_dpo_term, exo_term):
            with pytest.raises(ValueError, match="label_smoothing is"):
                term(0.0, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="label_smoothing is 0"):
        exo_term(0.0, label_smoothing=0)
    with pytest.raises(ValueError, match="tau is 0"):
        discopop_term(0.0, tau=0)
    with pytest.raises(ValueError, match="unknown f_divergence 'kl': choose one of reverse_kl, forward_kl, js, alpha"):
        f_divergence_score(0.0, f_divergence="kl")  # pyright: ignore[reportArgumentType]
