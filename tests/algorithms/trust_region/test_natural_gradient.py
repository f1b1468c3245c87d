from __future__ import annotations

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.trust_region.conjugate_gradient import conjugate_gradient, damped, tree_dot
from jaxrl_llm.algorithms.trust_region.fisher import (
    gauss_newton_vector_product,
    hessian_vector_product,
    sampled_fisher_vector_product,
)
from jaxrl_llm.algorithms.trust_region.natural_gradient import (
    line_search,
    trpo_direction,
    trpo_step,
    trust_region_scale,
)
from jaxrl_llm.logprobs import scores_from_logits
from jaxrl_llm.losses import clipped_surrogate
from jaxrl_llm.losses.aggregate import aggregate, aggregation_normalizer
from jaxrl_llm.losses.kl import kl_exact


def close(value, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol)


@pytest.fixture
def one_state(examples) -> SimpleNamespace:
    """The specification's example: logits are the parameters, two samples with advantages 1 and −1."""
    params = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    actions, advantages = jnp.array([0, 1]), jnp.array([1.0, -1.0])
    mask = jnp.ones(1, bool)

    def surrogate(theta):
        gap = jax.nn.log_softmax(theta)[actions] - jax.nn.log_softmax(params)[actions]
        return jnp.mean(jnp.exp(gap) * advantages)

    def kl(theta):
        return kl_exact(theta, params, direction="forward")

    return SimpleNamespace(
        params=params, surrogate=surrogate, kl=kl, logits=lambda theta: theta[None], mask=mask, examples=examples
    )


@pytest.mark.parametrize("form", ["reverse", "forward", "gauss-newton"])
def test_golden_numbers(one_state, form):
    def product(vector):
        if form == "gauss-newton":
            return gauss_newton_vector_product(one_state.logits, one_state.params, vector, one_state.mask)
        return hessian_vector_product(one_state.kl, one_state.params, vector, reverse=form == "reverse")

    golden = one_state.examples
    gradient = jax.grad(one_state.surrogate)(one_state.params)
    close(gradient, golden["trpo.grad"])
    close(product(jnp.array([1.0, 0, 0])), golden["trpo.fisher_times_e0"])
    found = trpo_direction(product, gradient)
    close(found.solver.solution, golden["trpo.direction"])
    close(found.step, golden["trpo.full_step"])
    full = one_state.params + found.step
    close([one_state.surrogate(full), one_state.kl(full)], golden["trpo.full_step_surrogate_kl"])
    shorter = one_state.params + 0.8 * found.step
    close([one_state.surrogate(shorter), one_state.kl(shorter)], golden["trpo.backtrack0p8_surrogate_kl"])
    params, metrics = trpo_step(one_state.surrogate, one_state.kl, one_state.params, product=product)
    assert metrics["trpo/backtracks"].value() == golden["trpo.accepted_backtrack_index"]
    close(params, full)
    close([metrics["trpo/improvement"].value(), metrics["trpo/kl"].value()], golden["trpo.full_step_surrogate_kl"])
    assert metrics["trpo/accepted"].value() == 1


def test_one_backtrack(one_state):
    """With a bound between the divergences of the first two tries, the second is taken."""
    step = jnp.asarray(one_state.examples["trpo.full_step"])
    arguments = (one_state.surrogate, one_state.kl, one_state.params, step)
    found = line_search(*arguments, max_kl=0.006)
    assert found.accepted and found.backtracks == 1
    close([found.improvement, found.kl], one_state.examples["trpo.backtrack0p8_surrogate_kl"])
    close(found.params, one_state.params + 0.8 * step)
    slack = line_search(*arguments, max_kl=0.006, kl_tolerance=1.5)
    assert slack.backtracks == 0


@pytest.fixture(scope="module")
def policy() -> SimpleNamespace:
    """A small network over ragged rows: `[3, 5]` tokens, a vocabulary of 6, a pytree of parameters."""
    rng = np.random.default_rng(0)
    mask = np.arange(5) < np.array([[5], [2], [3]])
    inputs = jnp.float32(np.where(mask[..., None], rng.normal(size=(3, 5, 4)), 3.0))
    tokens = jnp.asarray(rng.integers(0, 6, (3, 5)))
    advantages = jnp.float32(rng.normal(size=3))
    params = {
        "hidden": {"weight": jnp.float32(rng.normal(size=(4, 3))), "bias": jnp.float32(rng.normal(size=3))},
        "head": jnp.float32(rng.normal(size=(3, 6))),
    }

    def logits(p, rows=slice(None)):
        return jnp.tanh(inputs[rows] @ p["hidden"]["weight"] + p["hidden"]["bias"]) @ p["head"]

    def logprobs(p, rows=slice(None)):
        return scores_from_logits(logits(p, rows), tokens[rows]).logprobs

    old_logits = logits(params)

    def surrogate(p):
        old = scores_from_logits(old_logits, tokens).logprobs
        losses = clipped_surrogate(logprobs(p), old, advantages, clip_low=None, clip_high=None)
        return -aggregate(losses, mask, mode="token-mean")

    def kl(p):
        return aggregate(kl_exact(logits(p), old_logits, direction="forward"), mask, mode="token-mean")

    vector = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)
    return SimpleNamespace(
        params=params, logits=logits, logprobs=logprobs, surrogate=surrogate, kl=kl, mask=mask, vector=vector
    )


def fisher_loop(policy, mode="token-mean"):
    """The Fisher matrix in float64, from Jacobians token by token: Σ w Σᵥ p(v) ∇log p(v) ∇log p(v)ᵀ."""
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda x: jnp.float64(x), policy.params))

        def logprobs(x):
            return jax.nn.log_softmax(policy.logits(unravel(x)))

        jacobian, p = np.asarray(jax.jacfwd(logprobs)(flat)), np.exp(np.asarray(logprobs(flat)))
    matrix, lengths = np.zeros((flat.size, flat.size)), policy.mask.sum(-1)
    for b, t in zip(*np.nonzero(policy.mask), strict=True):
        weight = 1 / policy.mask.sum() if mode == "token-mean" else 1 / (len(lengths) * lengths[b])
        for v in range(p.shape[-1]):
            matrix += weight * p[b, t, v] * np.outer(jacobian[b, t, v], jacobian[b, t, v])
    return matrix


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


@pytest.mark.parametrize("jit", [False, True])
def test_products_equal_the_matrix(policy, jit):
    expected = fisher_loop(policy) @ flat(policy.vector)
    products = [
        lambda p, v: hessian_vector_product(policy.kl, p, v),
        lambda p, v: hessian_vector_product(policy.kl, p, v, reverse=False),
        lambda p, v: gauss_newton_vector_product(policy.logits, p, v, policy.mask),
    ]
    for product in products:
        result = (jax.jit(product) if jit else product)(policy.params, policy.vector)
        assert jax.tree.structure(result) == jax.tree.structure(policy.params)
        close(flat(result), expected, rtol=1e-4, atol=1e-5)
    if jit:
        by_sequence = fisher_loop(policy, "seq-mean-token-mean") @ flat(policy.vector)
        result = jax.jit(
            lambda p, v: gauss_newton_vector_product(
                policy.logits, p, v, policy.mask, aggregation="seq-mean-token-mean"
            )
        )(policy.params, policy.vector)
        close(flat(result), by_sequence, rtol=1e-4, atol=1e-5)


def test_the_sampled_product_equals_its_definition_and_is_unbiased(policy):
    v = flat(policy.vector)

    def product(logprobs):
        return sampled_fisher_vector_product(logprobs, policy.params, policy.vector, policy.mask)

    unravel = jax.flatten_util.ravel_pytree(policy.params)[1]
    jacobian = np.asarray(jax.jacrev(lambda x: policy.logprobs(unravel(x)))(flat(policy.params)))
    grads = jacobian[policy.mask]
    close(flat(product(policy.logprobs)), grads.T @ (grads @ v) / policy.mask.sum(), rtol=1e-4, atol=1e-5)

    # The expectation over the token at each position, which is exact as a sum over the vocabulary: every token
    # once, each with its probability as the weight of its square.
    def every_token(params):
        logprobs = jax.nn.log_softmax(policy.logits(params))
        return jnp.exp(jax.lax.stop_gradient(logprobs) / 2) * logprobs

    everywhere = np.broadcast_to(policy.mask[..., None], (*policy.mask.shape, 6))
    summed = sampled_fisher_vector_product(
        every_token, policy.params, policy.vector, everywhere, normalizer=policy.mask.sum()
    )
    close(flat(summed), fisher_loop(policy) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("product", [gauss_newton_vector_product, sampled_fisher_vector_product])
def test_parts_add_up_and_padding_does_not_matter(policy, product):
    function = policy.logits if product is gauss_newton_vector_product else policy.logprobs
    whole = product(function, policy.params, policy.vector, policy.mask)
    normalizer = aggregation_normalizer(policy.mask, mode="token-mean")

    def part(rows):
        return product(
            lambda p: function(p, rows), policy.params, policy.vector, policy.mask[rows], normalizer=normalizer
        )

    parts = part(slice(0, 1)), part(slice(1, 3))
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *parts), whole, rtol=1e-5, atol=1e-6)

    def dirty(params):  # whatever came back from there would reach the parameters
        x = function(params)
        return x + jnp.where(policy.mask if x.ndim == 2 else policy.mask[..., None], 0.0, jnp.nan)

    chex.assert_trees_all_close(product(dirty, policy.params, policy.vector, policy.mask), whole, rtol=1e-6, atol=1e-7)
    empty = product(function, policy.params, policy.vector, np.zeros_like(policy.mask))
    assert not np.any(flat(empty))


def test_parameters_in_half_precision_have_wide_vectors(policy):
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), policy.params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    for params in (narrow, wide):
        result = gauss_newton_vector_product(policy.logits, params, policy.vector, policy.mask)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(result))
    stepped, metrics = trpo_step(policy.surrogate, policy.kl, narrow)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(stepped))
    assert all(np.isfinite(metric.value()) for metric in metrics.values())


@jax.custom_vjp
def tanh(x):
    """Defined for reverse mode only, at both levels, as an attention kernel may be."""
    return jnp.tanh(x)


tanh.defvjp(lambda x: (tanh(x), tanh(x)), lambda y, g: ((1 - y * y) * g,))


def test_reverse_mode_is_enough_for_the_hessian():
    x, v = jnp.array([0.1, -0.4]), jnp.array([1.0, 2.0])
    expected = jax.hessian(lambda x: jnp.sum(jnp.tanh(x) ** 2))(x) @ v
    close(hessian_vector_product(lambda x: jnp.sum(tanh(x) ** 2), x, v), expected)
    with pytest.raises(TypeError, match="forward-mode"):
        gauss_newton_vector_product(lambda x: tanh(x)[None], x, v, np.ones(1, bool))


def matrix_product(matrix):
    return lambda v: {
        "a": matrix[:2, :2] @ v["a"] + matrix[:2, 2:] @ v["b"],
        "b": matrix[2:] @ jnp.append(v["a"], v["b"]),
    }


def test_conjugate_gradient_equals_the_solution():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    matrix, b = root @ root.T + np.eye(5), rng.normal(size=5)
    target = {"a": jnp.float32(b[:2]), "b": jnp.float32(b[2:])}
    solve = jax.jit(lambda target: conjugate_gradient(matrix_product(jnp.float32(matrix)), target, iterations=20))
    found = solve(target)
    close(flat(found.solution), np.linalg.solve(matrix, b), rtol=1e-3, atol=1e-5)
    assert found.residual <= 1e-10
    assert 5 <= found.iterations < 20  # stopped by the residual

    # After k iterations: the best point of the Krylov space, by the energy norm.
    three = conjugate_gradient(matrix_product(jnp.float32(matrix)), target, iterations=3)
    basis = np.stack([np.linalg.matrix_power(matrix, k) @ b for k in range(3)], axis=1)
    basis, _ = np.linalg.qr(basis)
    best = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
    close(flat(three.solution), best, rtol=1e-3, atol=1e-4)
    assert three.iterations == 3
    close(three.residual, np.sum((b - matrix @ best) ** 2), rtol=1e-2)


def test_conjugate_gradient_at_the_edges():
    zero = conjugate_gradient(lambda v: v, jnp.zeros(3))
    assert zero.iterations == 0 and not np.any(zero.solution)
    indefinite = conjugate_gradient(lambda v: -v, jnp.ones(3))
    assert indefinite.iterations == 1 and not np.any(indefinite.solution)
    singular = conjugate_gradient(lambda v: v * jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]))
    assert np.isfinite(singular.solution).all()
    half = conjugate_gradient(lambda v: 2 * v, jnp.ones(3, jnp.bfloat16))
    assert half.solution.dtype == jnp.float32
    batch = jax.vmap(lambda b: conjugate_gradient(lambda v: 2 * v, b).solution)(jnp.eye(3))
    close(batch, np.eye(3) / 2)


def test_the_scaled_direction_has_the_divergence_asked_for(policy):
    """To second order: xᵀ (F + damping I) x / 2 = max_kl for the step."""

    def product(v):
        return gauss_newton_vector_product(policy.logits, policy.params, v, policy.mask)

    gradient = jax.grad(policy.surrogate)(policy.params)
    found = trpo_direction(product, gradient, max_kl=0.003, damping=0.2, iterations=40)
    close(tree_dot(found.step, damped(product, 0.2)(found.step)) / 2, 0.003)
    matrix = fisher_loop(policy) + 0.2 * np.eye(flat(gradient).size)
    close(flat(found.solver.solution), np.linalg.solve(matrix, flat(gradient)), rtol=1e-3, atol=1e-4)
    # The scale of the objective cancels.
    larger = jax.tree.map(lambda g: 100 * g, gradient)
    other = trpo_direction(product, larger, max_kl=0.003, damping=0.2, iterations=40)
    chex.assert_trees_all_close(other.step, found.step, rtol=1e-3, atol=1e-5)
    assert trust_region_scale({"x": jnp.zeros(2)}, lambda v: v) == 0


def test_a_step_improves_and_stays_in_the_region(policy):
    step = jax.jit(lambda p: trpo_step(policy.surrogate, policy.kl, p, max_kl=0.02))
    params, metrics = step(policy.params)
    assert metrics["trpo/accepted"].value() == 1
    assert 0 < policy.kl(params) <= 0.02
    assert policy.surrogate(params) > policy.surrogate(policy.params)
    close(metrics["trpo/kl"].value(), policy.kl(params))
    close(metrics["trpo/improvement"].value(), policy.surrogate(params) - policy.surrogate(policy.params), atol=1e-6)
    close(metrics["grad_norm"].value(), np.linalg.norm(flat(jax.grad(policy.surrogate)(policy.params))))
    eager, _ = trpo_step(policy.surrogate, policy.kl, policy.params, max_kl=0.02)
    chex.assert_trees_all_close(eager, params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cause", ["no improvement", "divergence", "nan"])
def test_a_failed_search_keeps_the_old_parameters_bit_for_bit(policy, cause):
    surrogate = {"no improvement": lambda p: -policy.surrogate(p), "nan": lambda p: policy.surrogate(p) * jnp.nan}
    divergence = {"divergence": lambda p: policy.kl(p) + 1}
    step = trpo_direction(lambda v: v, jax.grad(policy.surrogate)(policy.params)).step
    search = jax.jit(
        lambda p: line_search(
            surrogate.get(cause, policy.surrogate), divergence.get(cause, policy.kl), p, step, tries=4
        )
    )
    found = search(policy.params)
    assert not found.accepted and found.backtracks == 4
    assert found.improvement == found.kl == 0
    chex.assert_trees_all_equal(found.params, policy.params)


def test_without_a_gradient_nothing_moves(policy):
    params, metrics = trpo_step(lambda p: 0.0 * policy.surrogate(p), policy.kl, policy.params)
    chex.assert_trees_all_equal(params, policy.params)
    assert metrics["trpo/accepted"].value() == 0
    assert all(np.isfinite(metric.value()) for metric in metrics.values())


def test_bounds_may_be_traced(policy):
    fixed, _ = trpo_step(policy.surrogate, policy.kl, policy.params, max_kl=0.02, damping=0.3)
    traced = jax.jit(lambda kl, d: trpo_step(policy.surrogate, policy.kl, policy.params, max_kl=kl, damping=d)[0])
    chex.assert_trees_all_close(traced(0.02, 0.3), fixed, rtol=1e-4, atol=1e-5)


def test_errors(policy):
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\), but the logits are of \(3, 5\) tokens"):
        gauss_newton_vector_product(policy.logits, policy.params, policy.vector, policy.mask[:, :4])
    with pytest.raises(ValueError, match="mask must be bool"):
        sampled_fisher_vector_product(policy.logprobs, policy.params, policy.vector, np.ones((3, 5)))
    with pytest.raises(ValueError, match="damping is -1: it must not be negative"):
        trpo_direction(lambda v: v, jnp.ones(2), damping=-1)
    with pytest.raises(ValueError, match="max_kl is 0: it must be positive"):
        trpo_direction(lambda v: v, jnp.ones(2), max_kl=0)
    with pytest.raises(ValueError, match="iterations is 0"):
        conjugate_gradient(lambda v: v, jnp.ones(2), iterations=0)
    with pytest.raises(ValueError, match="tolerance is -1"):
        conjugate_gradient(lambda v: v, jnp.ones(2), tolerance=-1)
    with pytest.raises(ValueError, match="shrink is 1"):
        line_search(policy.surrogate, policy.kl, policy.params, policy.vector, shrink=1)
    with pytest.raises(ValueError, match="tries is 0"):
        line_search(policy.surrogate, policy.kl, policy.params, policy.vector, tries=0)
