"""Rotary embeddings against the equations of their papers, in float64 loops."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.config import RopeConfig
from jaxrl_llm.models.rope import frequencies, rotate, rotation

LLAMA3 = RopeConfig(
    theta=500_000.0,
    scaling="llama3",
    factor=8.0,
    original_max_position_embeddings=8192,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
YARN = RopeConfig(theta=10_000.0, scaling="yarn", factor=4.0, original_max_position_embeddings=2048)


LONG = RopeConfig(
    scaling="longrope",
    factor=32.0,
    original_max_position_embeddings=4096,
    short_factors=tuple(1 + i / 8 for i in range(24)),
    long_factors=tuple(1 + i for i in range(24)),
    partial=0.75,
)


def plain(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def llama3(head_dim: int) -> list[float]:
    """Short waves as they are, long ones divided by 8, a blend linear in the number of turns between."""
    out = []
    for omega in plain(500_000.0, head_dim):
        turns = 8192 * omega / (2 * math.pi)
        share = min(max((turns - 1) / (4 - 1), 0.0), 1.0)
        out.append(share * omega + (1 - share) * omega / 8)
    return out


def yarn(head_dim: int) -> list[float]:
    """From the plane that turns 32 times in 2048 positions to the one that turns once, by plane numbers."""

    def plane(turns: float) -> float:
        return head_dim * math.log(2048 / (turns * 2 * math.pi)) / (2 * math.log(10_000.0))

    low, high = math.floor(plane(32)), math.ceil(plane(1))
    out = []
    for i, omega in enumerate(plain(10_000.0, head_dim)):
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        out.append(omega * (1 - interpolated) + omega / 4 * interpolated)
    return out


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (RopeConfig(theta=10_000.0), plain(10_000.0, 64)),
        (RopeConfig(theta=1e6), plain(1e6, 64)),
        (RopeConfig(scaling="linear", factor=4.0), [omega / 4 for omega in plain(10_000.0, 64)]),
        (LLAMA3, llama3(64)),
        (YARN, yarn(64)),
    ],
    ids=["plain", "theta", "linear", "llama3", "yarn"],
)
def test_frequencies_equal_the_equations(rope, expected):
    omega, _ = frequencies(rope, 64)
    assert omega.shape == (32,)
    np.testing.assert_allclose(omega, expected, rtol=2e-5)


def test_longrope_divides_each_plane_by_its_own_factor():
    """Of 64 numbers 48 are turned."""
    turned = np.array(plain(10_000.0, 48))
    for rope, factors in ((LONG, LONG.short_factors), (dataclasses.replace(LONG, long=True), LONG.long_factors)):
        omega, factor = frequencies(rope, 64)
        np.testing.assert_allclose(omega, turned / np.array(factors), rtol=2e-5)
        assert factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_partial_rotation_leaves_the_rest_of_a_head():
    x = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
    ours = rotate(jnp.asarray(x), rotation(RopeConfig(partial=0.5), 8, jnp.arange(3)))
    np.testing.assert_array_equal(ours[..., 4:], x[..., 4:])
    whole = rotate(jnp.asarray(x[..., :4]), rotation(RopeConfig(), 4, jnp.arange(3)))
    np.testing.assert_array_equal(ours[..., :4], whole)


def test_llama3_and_yarn_keep_fast_planes_and_divide_slow_ones():
    for rope in (LLAMA3, YARN):
        ratio = np.array(plain(rope.theta, 64)) / frequencies(rope, 64)[0]
        np.testing.assert_allclose([ratio[0], ratio[-1]], [1, rope.factor], rtol=1e-5)
        assert (np.diff(ratio) > -1e-5).all()
        assert ((ratio > 1.01) & (ratio < rope.factor - 0.01)).any()


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (RopeConfig(), 1.0),
        (RopeConfig(scaling="linear", factor=4.0), 1.0),
        (LLAMA3, 1.0),
        (YARN, 0.1 * math.log(4) + 1),
        (RopeConfig(scaling="yarn", factor=1.0, original_max_position_embeddings=64), 1.0),
        (RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.5), 1.5),
        (
            RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=64, mscale=2.0, mscale_all_dim=0.5),
            (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
        ),
    ],
)
def test_attention_factor(rope, expected):
    assert frequencies(rope, 16)[1] == pytest.approx(expected)
    # It multiplies cos and sin, so that it scales queries and keys.
    turn = rotation(rope, 16, jnp.array([5]))
    np.testing.assert_allclose(turn.cos**2 + turn.sin**2, np.full((1, 8), expected**2), rtol=1e-5)


def test_rotate_turns_the_planes_of_the_two_halves():
    """Plane (i, i + H/2) turns by position · ω_i, counterclockwise."""
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [9, 8, 100, 6, 31]])
    turned = np.asarray(rotate(jnp.asarray(x), rotation(RopeConfig(theta=100.0), 8, jnp.asarray(positions))))
    expected = np.zeros(x.shape)
    for i, omega in enumerate(plain(100.0, 8)):
        for row, time in np.ndindex(2, 5):
            angle = positions[row, time] * omega
            for head in range(3):
                first, second = float(x[row, time, head, i]), float(x[row, time, head, i + 4])
                expected[row, time, head, i] = first * math.cos(angle) - second * math.sin(angle)
                expected[row, time, head, i + 4] = second * math.cos(angle) + first * math.sin(angle)
    np.testing.assert_allclose(turned, expected, atol=1e-4)
    np.testing.assert_array_equal(turned[0, 0], x[0, 0])  # position 0


def test_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 1, 16)).astype(np.float32)

    def product(m: int, n: int) -> float:
        turns = [rotation(LLAMA3, 16, jnp.array([position])) for position in (m, n)]
        return float(jnp.sum(rotate(jnp.asarray(query), turns[0]) * rotate(jnp.asarray(key), turns[1])))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-3)
    assert product(7, 3) != pytest.approx(product(8, 3), abs=1e-2)


def test_rotation_is_float32_and_keeps_the_type_of_what_it_turns():
    turn = jax.eval_shape(lambda positions: rotation(YARN, 16, positions), jnp.arange(3))
    assert turn.cos.dtype == turn.sin.dtype == jnp.float32
    x = jnp.ones((3, 2, 16), jnp.bfloat16)
    turned = rotate(x, rotation(YARN, 16, jnp.arange(3)))
    assert turned.dtype == jnp.bfloat16
    # Rounded once, at the end: bfloat16 cannot even count the positions of a long context.
    far = rotation(RopeConfig(), 16, jnp.array([1001]))
    np.testing.assert_allclose(far.cos[0], np.cos(1001 * np.array(plain(1e4, 16))), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling": "dynamic"}, "'dynamic' is not one of"),
        ({"scaling": "llama3", "factor": 8.0}, "original_max_position_embeddings"),
        ({"scaling": "yarn", "factor": 8.0}, "original_max_position_embeddings"),
        ({"scaling": "longrope", "original_max_position_embeddings": 8}, "long_factors"),
        ({"long": True}, "only longrope has long factors"),
        ({"partial": 0.0}, "partial=0.0"),
    ],
)
def test_impossible_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**settings)


def test_gradients_are_turned_back():
    turn = rotation(LONG, 64, jnp.arange(5))  # its factor is not 1
    x, g = (jax.random.normal(jax.random.key(seed), (5, 2, 64)) for seed in range(2))
    (gradient,) = jax.vjp(lambda x: rotate(x, turn), x)[1](g)
    # ⟨Rx, g⟩ = ⟨x, Rᵀg⟩, whatever x
    np.testing.assert_allclose(jnp.vdot(rotate(x, turn), g), jnp.vdot(x, gradient), rtol=1e-5)
    (back,) = jax.linear_transpose(jax.vjp(lambda x: rotate(x, turn), x)[1], g)((x,))  # as trust regions do
    np.testing.assert_allclose(back, rotate(x, turn), rtol=1e-5, atol=1e-6)
