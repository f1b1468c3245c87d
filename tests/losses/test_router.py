"""Losses of routers against loops over tokens and experts, on ragged masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import load_balance_loss, router_loss, router_tokens

LAYERS, ROWS, TOKENS, EXPERTS, K = 3, 2, 5, 4, 2
LOGITS = np.random.default_rng(0).normal(size=(LAYERS, ROWS, TOKENS, EXPERTS)).astype("f")
MASK = np.array([[True, True, False, True, False], [False, False, True, False, False]])


def mean_over_layers(logits, others=None):
    each = []
    for layer in range(LAYERS):
        experts = jax.lax.top_k(logits[layer], K)[1]
        each.append(router_tokens(logits[layer], experts, None if others is None else others[layer]))
    return jax.tree.map(lambda *layers: sum(layers) / LAYERS, *each)


def looped() -> dict[str, float]:
    """Of layers and tokens together, as `transformers` takes it."""
    load, probs, z, entropy, count = np.zeros(EXPERTS), np.zeros(EXPERTS), 0.0, 0.0, 0
    for layer in range(LAYERS):
        for row, time in zip(*np.nonzero(MASK), strict=True):
            token = LOGITS[layer, row, time].astype(float)
            p = np.exp(token) / np.exp(token).sum()
            for expert in np.argsort(-token)[:K]:
                load[expert] += 1
            probs += p
            z += np.log(np.exp(token).sum()) ** 2
            entropy -= (p * np.log(p)).sum()
            count += 1
    load, probs = load / count, probs / count
    return {
        "router/balance_loss": EXPERTS * (load * probs).sum(),
        "router/z_loss": z / count,
        "router/entropy": entropy / count,
        "router/max_load": load.max() / load.mean(),
    }


def test_equals_the_loop_and_padding_does_not_matter():
    expected = looped()
    spoilt = np.where(MASK[None, ..., None], LOGITS, np.nan)
    for logits in (LOGITS, spoilt):
        loss, metrics = jax.jit(lambda x: router_loss(mean_over_layers(x), MASK, balance_coef=0.5, z_coef=0.1))(logits)
        for name, value in expected.items():
            assert metrics[name].value() == pytest.approx(value, rel=1e-5), name
        assert loss == pytest.approx(0.5 * expected["router/balance_loss"] + 0.1 * expected["router/z_loss"], rel=1e-5)


def test_an_even_load_has_the_least_loss():
    probs, load = jnp.full((1, 4, 4), 0.25), jax.nn.one_hot(jnp.array([[0, 1, 2, 3]]), 4)
    assert load_balance_loss(probs, load, jnp.ones((1, 4), bool)) == pytest.approx(1.0)


def test_gradient_lowers_what_is_chosen_most_and_is_0_without_tokens():
    one = jnp.array([[[2.0, 0.0, -1.0]]])

    def loss(logits, mask):
        return load_balance_loss(*router_tokens(logits, jnp.array([[[0]]]))[:2], mask)

    gradient = jax.grad(loss)(one, jnp.ones((1, 1), bool))[0, 0]
    assert gradient[0] > 0 > gradient[1]
    assert not np.any(jax.grad(loss)(one, jnp.zeros((1, 1), bool)))


def test_parts_add_up_to_their_mean_by_tokens():
    tokens = mean_over_layers(LOGITS)
    parts = [jax.tree.map(lambda x, row=row: x[row : row + 1], tokens) for row in range(ROWS)]
    made = [router_loss(part, MASK[row : row + 1], balance_coef=1.0, normalizer=4)[0] for row, part in enumerate(parts)]
    own = [router_loss(part, MASK[row : row + 1], balance_coef=1.0)[0] for row, part in enumerate(parts)]
    assert float(sum(made)) == pytest.approx(float(3 * own[0] + own[1]) / 4, rel=1e-5)


def test_sets_are_compared_and_not_their_order():
    logits = jnp.array([[3.0, 2.0, 1.0, 0.0]] * 3)
    differs = router_tokens(logits, jnp.zeros((3, 2), int), jnp.array([[1, 0], [0, 2], [-1, -1]])).differs
    assert differs.tolist() == [0, 1, 0]
