import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.kl_control import adaptive_kl_coef


def test_golden_numbers(examples):
    adapt = functools.partial(adaptive_kl_coef, target=6.0)
    np.testing.assert_allclose(adapt(0.2, 9.0, 256), examples["kl.adaptive_0p2_target6_cur9_n256_h10000"], atol=1e-6)
    np.testing.assert_allclose(adapt(0.2, 5.4, 256), examples["kl.adaptive_0p2_target6_cur5p4_n256_h10000"], atol=1e-6)


def test_equals_the_definition_over_many_updates():
    expected = coef = 0.3
    step = jax.jit(functools.partial(adaptive_kl_coef, target=2.0, horizon=100, error_clip=0.1))
    for kl in (0.0, 1.9, 2.0, 2.1, 50.0):
        expected *= 1 + min(max(kl / 2.0 - 1, -0.1), 0.1) * 8 / 100
        coef = step(coef, kl, 8)
        np.testing.assert_allclose(coef, expected, rtol=1e-5)


def test_vmap_and_narrow_types():
    controller = functools.partial(adaptive_kl_coef, target=6.0)
    coefs = jax.vmap(controller)(jnp.full(3, 0.2, jnp.bfloat16), jnp.array([6.0, 6.0, 6.0]), jnp.array([1, 2, 3]))
    assert coefs.dtype == jnp.float32
    np.testing.assert_allclose(coefs, np.float32(jnp.bfloat16(0.2)))


@pytest.mark.parametrize("option", ["target", "horizon", "error_clip"])
def test_errors(option):
    with pytest.raises(ValueError, match=f"{option} is 0: it must be positive"):
        adaptive_kl_coef(0.2, 1.0, 1, **{"target": 1.0, option: 0})
