from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.losses.aggregate import aggregate, aggregation_normalizer
from jaxrl_llm.losses.distillation import (
    generalized_jsd,
    generalized_jsd_from_hidden,
    gkd_loss,
    on_policy_distillation_advantages,
)
from jaxrl_llm.losses.kl import kl_exact

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def close(value, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol)


def test_golden_numbers(examples, tok):
    student, teacher = np.array([[2.0, 1.0, 0.0]]), np.array([[1.0, 1.0, 0.0]])
    names = {0.0: "gkd.forward_kl_beta0", 1.0: "gkd.reverse_kl_beta1", 0.5: "gkd.jsd_beta0p5", 0.9: "gkd.jsd_beta0p9"}
    for beta, name in names.items():
        close(generalized_jsd(student, teacher, beta=beta), [examples[name]])
        close(gkd_loss(student, teacher, np.ones(1, bool), beta=beta)[0], examples[name])
    advantages = on_policy_distillation_advantages(tok.old, tok.ref, tok.mask)
    close(advantages, examples["opd.reverse_kl_pg_adv"])


@pytest.fixture
def rows(ragged_rows):
    """Logits over seven tokens, `[12, 6, 7]`, NaN at the padding."""
    mask = ragged_rows("mask")["mask"]
    rng = np.random.default_rng(0)
    logits = {name: rng.normal(size=(*mask.shape, 7)) for name in ("logits", "teacher_logits")}
    return {name: np.where(mask[..., None], x, np.nan) for name, x in logits.items()} | {"mask": mask}


def jsd_loop(logits, teacher_logits, mask, beta, temperature=1.0):
    """One position at a time; 0 at the padding."""
    total = np.zeros(mask.shape)
    for index in zip(*np.nonzero(mask), strict=True):
        s, t = (np.exp(x[index] / temperature) for x in (logits, teacher_logits))
        s, t = s / s.sum(), t / t.sum()
        m = beta * t + (1 - beta) * s
        if beta in (0, 1):
            total[index] = np.sum(t * np.log(t / s)) if beta == 0 else np.sum(s * np.log(s / t))
        else:
            total[index] = beta * np.sum(t * np.log(t / m)) + (1 - beta) * np.sum(s * np.log(s / m))
    return total


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_equals_the_definition(rows, beta, temperature):
    expected = jsd_loop(**rows, beta=beta, temperature=temperature)
    mask = rows["mask"]
    for chunk_size in (None, 4, 1):
        options = {"beta": beta, "temperature": temperature, "chunk_size": chunk_size}
        term = jax.jit(lambda x, y, options=options: generalized_jsd(x, y, **options))
        close(np.asarray(term(rows["logits"], rows["teacher_logits"]))[mask], expected[mask])
        for mode, mean in (
            ("token-mean", expected[mask].mean()),
            ("seq-mean-token-mean", np.mean([x[m].mean() for x, m in zip(expected, mask, strict=True) if m.any()])),
        ):
            loss, metrics = gkd_loss(**rows, **options, aggregation=mode)
            close(loss, mean)
            close(metrics["jsd"].value(), expected[mask].mean())


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_equals_finite_differences_and_the_formula(rows, beta):
    mask = rows["mask"]
    clean = {name: np.where(mask[..., None], x, 0.0) for name, x in rows.items() if name != "mask"}

    def loss(logits, chunk_size=None):
        return gkd_loss(logits, clean["teacher_logits"], mask, beta=beta, chunk_size=chunk_size)[0]

    grad = jax.grad(loss)(jnp.float32(rows["logits"]))
    close(jax.grad(lambda x: loss(x, 4))(jnp.float32(rows["logits"])), grad)
    assert not np.any(np.asarray(grad)[~mask])
    # ∂/∂logits = p ∘ (g − Σ p g) with g the derivative by the probabilities of the student.
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (clean["logits"], clean["teacher_logits"]))
    mixture = beta * q + (1 - beta) * p
    g = {0.0: -q / p, 1.0: np.log(p / q)}.get(beta, (1 - beta) * np.log(p / mixture))
    expected = p * (g - np.sum(p * g, -1, keepdims=True)) / mask.sum()
    close(grad, np.where(mask[..., None], expected, 0), rtol=1e-4)
    with jax.enable_x64(True):
        check_grads(jax.jit(lambda x: loss(x, 4)), (jnp.asarray(clean["logits"]),), order=1, modes=["rev"])


def test_padding_does_not_matter_and_the_teacher_is_constant(rows):
    mask = rows["mask"]

    def run(padding):
        arrays = [jnp.float32(np.where(mask[..., None], rows[n], padding)) for n in ("logits", "teacher_logits")]
        return jax.value_and_grad(lambda x, y: gkd_loss(x, y, mask)[0], argnums=(0, 1))(*arrays)

    value, (grad, to_teacher) = run(np.nan)
    assert np.isfinite(value) and np.isfinite(grad).all()
    assert not np.any(to_teacher)
    for padding in (0.0, np.inf, 1e30):
        chex.assert_trees_all_equal(run(padding), (value, (grad, to_teacher)))
    empty, grad = jax.value_and_grad(lambda x: gkd_loss(x, x, np.zeros_like(mask))[0])(jnp.float32(rows["logits"]))
    assert empty == 0 and not np.any(grad)


def test_parts_add_up_and_packed_equals_padded(rows):
    whole, metrics = gkd_loss(**rows)
    normalizer = aggregation_normalizer(rows["mask"], mode="token-mean")
    parts = [
        gkd_loss(**{n: x[part] for n, x in rows.items()}, normalizer=normalizer) for part in (slice(5), slice(5, 12))
    ]
    close(parts[0][0] + parts[1][0], whole)
    close(parts[0][1]["jsd"].merge(parts[1][1]["jsd"]).value(), metrics["jsd"].value())
    options = {"aggregation": "seq-mean-token-mean"}
    packed = {n: np.concatenate([x[:6], x[6:]], axis=1) for n, x in rows.items()}
    segment_ids = np.repeat([[0] * 6 + [1] * 6], 6, axis=0)
    close(gkd_loss(**packed, **options, segment_ids=segment_ids)[0], gkd_loss(**rows, **options)[0])


def test_vmap_and_half_precision(rows):
    arrays = [jnp.float32(np.where(rows["mask"][..., None], rows[n], 0)) for n in ("logits", "teacher_logits")]
    mapped = jax.vmap(lambda x, y: generalized_jsd(x, y, chunk_size=2))(*arrays)
    close(mapped, generalized_jsd(*arrays))
    half = [x.astype(jnp.bfloat16) for x in arrays]
    for chunk_size in (None, 2):
        value = generalized_jsd(*half, chunk_size=chunk_size)
        assert value.dtype == jnp.float32
        close(value, generalized_jsd(*(x.astype(jnp.float32) for x in half)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_the_ends_are_the_exact_divergences_and_the_middle_is_bounded(beta):
    rng = np.random.default_rng(0)
    logits, teacher = 9 * rng.normal(size=(20, 7)), 9 * rng.normal(size=(20, 7))
    value = generalized_jsd(logits, teacher, beta=beta)
    if beta in (0, 1):
        close(value, kl_exact(logits, teacher, direction="forward" if beta == 0 else "reverse"))
    else:
        entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
        assert np.all(value >= 0) and np.all(value <= entropy + 1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_a_cut_vocabulary_is_finite(beta):
    """What neither model can emit adds nothing; between the ends also what one of them cannot."""
    student, teacher = jnp.array([1.0, -jnp.inf, 0.5, -2.0]), jnp.array([0.0, -jnp.inf, 0.1, 0.2])
    some = jnp.array([0, 2, 3])
    term = jax.value_and_grad(lambda x, y: generalized_jsd(x[None], y[None], beta=beta)[0])
    (value, grad), (expected, expected_grad) = term(student, teacher), term(student[some], teacher[some])
    close(value, expected)
    close(grad[some], expected_grad)
    assert grad[1] == 0
    if beta not in (0, 1):
        value, grad = term(student.at[0].set(-jnp.inf), teacher.at[2].set(-jnp.inf))
        assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_from_hidden_states_it_is_the_same(chunk_size):
    rng = np.random.default_rng(0)
    shapes = {"hidden": (2, 6, 5), "head": (7, 5), "teacher_hidden": (2, 6, 3), "teacher_head": (7, 3)}
    arrays = {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    weights = jnp.float32(rng.normal(size=(2, 6)))

    def plain(a):
        return generalized_jsd(a["hidden"] @ a["head"].T, a["teacher_hidden"] @ a["teacher_head"].T, beta=0.3)

    def from_hidden(a):
        return generalized_jsd_from_hidden(**a, beta=0.3, chunk_size=chunk_size)

    close(from_hidden(arrays), plain(arrays))
    grads, expected = (jax.grad(lambda a, f=f: jnp.sum(weights * f(a)))(arrays) for f in (from_hidden, plain))
    for name in ("hidden", "head"):
        close(grads[name], expected[name], rtol=1e-4)
    assert not np.any(grads["teacher_hidden"]) and not np.any(grads["teacher_head"])


def test_from_hidden_states_the_gradient_of_a_narrow_head_is_summed_in_float32():
    """Many chunks that all pull alike: their sum must not stall at the rounding of bfloat16."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(np.repeat(rng.normal(size=(1, 4)), 1024, 0), jnp.bfloat16)
    head, teacher_head = (jnp.asarray(rng.normal(size=(5, 4)), jnp.bfloat16) for _ in range(2))

    def gradient(chunk_size):
        def loss(head):
            return jnp.sum(generalized_jsd_from_hidden(hidden, head, hidden, teacher_head, chunk_size=chunk_size))

        return np.asarray(jax.grad(loss)(head), np.float32)

    close(gradient(1), gradient(1024), rtol=0.01, atol=0.01 * np.abs(gradient(1024)).max())


def test_from_hidden_states_no_array_spans_time_and_vocabulary():
    """Memory of value and gradient: the widest temporary arrays are those of one chunk."""
    time, vocabulary, chunk = 512, 4096, 16
    hidden, head = jax.ShapeDtypeStruct((1, time, 8), jnp.float32), jax.ShapeDtypeStruct((vocabulary, 8), jnp.float32)

    def temporaries(chunk_size):
        def loss(hidden, head, teacher_hidden, teacher_head):
            return jnp.sum(
                generalized_jsd_from_hidden(hidden, head, teacher_hidden, teacher_head, chunk_size=chunk_size)
            )

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head, hidden, head).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = time * vocabulary * 4
    assert temporaries(time) > 2 * one
    assert temporaries(chunk) < 0.5 * one


def test_on_policy_distillation_is_a_constant_gap(ragged_rows):
    rows = ragged_rows("old_logprobs", "ref_logprobs", "mask")
    old, teacher, mask = rows.values()
    expected = np.where(mask, teacher - old, 0)
    close(jax.jit(on_policy_distillation_advantages)(old, teacher, mask), expected)
    grads = jax.grad(lambda x, y: jnp.sum(on_policy_distillation_advantages(x, y, mask)), argnums=(0, 1))(
        jnp.float32(old), jnp.float32(teacher)
    )
    assert not np.any(grads[0]) and not np.any(grads[1])
    # The policy gradient with it descends KL(policy ‖ teacher), in expectation over a vocabulary.
    logits, target = jnp.array([0.3, -0.2, 0.1]), jax.nn.log_softmax(jnp.array([-0.1, 0.4, 0.2]))

    def expected_loss(theta):
        logprobs = jax.nn.log_softmax(theta)
        advantages = on_policy_distillation_advantages(logprobs, target, np.ones(3, bool))
        return -jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * advantages * logprobs)

    close(jax.grad(expected_loss)(logits), jax.grad(lambda x: kl_exact(x, target))(logits))


def test_aggregated_divergences_are_the_loss(rows):
    term = generalized_jsd(rows["logits"], rows["teacher_logits"])
    close(aggregate(term, rows["mask"], mode="token-mean"), gkd_loss(**rows)[0])


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_an_empty_batch_has_loss_0(shape, chunk_size):
    logits = jnp.zeros(shape)
    loss, grad = jax.value_and_grad(lambda x: gkd_loss(x, x, np.ones(shape[:-1], bool), chunk_size=chunk_size)[0])(
        logits
    )
    assert loss == 0 and grad.shape == shape


def test_errors(rows):
    logits, teacher, mask = rows.values()
    with pytest.raises(ValueError, match="beta is 2: it is the teacher's weight"):
        gkd_loss(logits, teacher, mask, beta=2)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        gkd_loss(logits, teacher, mask, temperature=0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1 position, got 0"):
        gkd_loss(logits, teacher, mask, chunk_size=0)
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(12, 6, 6\)"):
        gkd_loss(logits, teacher[..., :6], mask)
    with pytest.raises(ValueError, match=r"logits has shape \(12, 6, 7\), but mask has shape \(12, 5\)"):
        gkd_loss(logits, teacher, mask[:, :5])
    with pytest.raises(ValueError, match="mask must be bool"):
        gkd_loss(logits, teacher, mask.astype(int))
    hidden = jnp.zeros((2, 3, 4))
    with pytest.raises(ValueError, match=r"hidden \(2, 3, 4\), head \(7, 4\), .* do not fit"):
        generalized_jsd_from_hidden(hidden, jnp.zeros((7, 4)), hidden, jnp.zeros((6, 4)))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("of", ["logits", "states"])
def test_what_is_no_distribution_is_nan_and_passes_no_gradient_on(beta, of):
    rng = np.random.default_rng(0)
    student, teacher, head = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((4, 3), (4, 3), (5, 3)))
    broken = student.at[1, 0].set(jnp.nan), teacher.at[2, 1].set(jnp.inf)
    fine = jnp.array([True, False, False, True])

    def divergence(student, head, teacher):
        if of == "logits":
            return generalized_jsd(student @ head.T, teacher @ head.T, beta=beta)
        return generalized_jsd_from_hidden(student, head, teacher, head, beta=beta)

    def loss(student, head, teacher, mask):
        return jnp.sum(jnp.where(mask, divergence(student, head, teacher), 0.0))

    values = divergence(broken[0], head, broken[1])
    assert np.isfinite(values[fine]).all() and np.isnan(values[~fine]).all()
    given = jax.grad(loss, argnums=(0, 1) if of == "states" else 0)(broken[0], head, broken[1], fine)
    clean = jax.grad(loss, argnums=(0, 1) if of == "states" else 0)(student, head, teacher, fine)
    if of == "logits":  # the product that makes the logits is not ours
        given, clean = given[fine], clean[fine]
    chex.assert_trees_all_close(given, clean, atol=1e-6)
