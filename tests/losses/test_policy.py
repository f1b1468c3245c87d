import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.losses.aggregate import aggregation_normalizer
from jaxrl_llm.losses.kl import kl_k3
from jaxrl_llm.losses.policy import clipped_surrogate, dapo_loss, dr_grpo_loss, grpo_loss
from jaxrl_llm.masking import Max, Mean


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


def grpo_loop(data, *, low=0.2, high=0.2, kl_coef=0.04, advantages=None):
    """The objective as the paper prints it: mean over sequences of the mean over tokens."""
    sequences = []
    for row in np.ndindex(data.mask.shape[:-1]):
        terms = []
        for t in np.flatnonzero(data.mask[row]):
            A = data.advantages[row] if advantages is None else advantages[row][t]
            loss = surrogate_loop(data.logprobs[row][t] - data.old[row][t], A, low, high)
            d = data.logprobs[row][t] - data.ref[row][t]
            terms.append(loss + kl_coef * (np.exp(-d) - 1 + d))
        if terms:
            sequences.append(np.mean(terms))
    return np.mean(sequences)


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


# ---- the term ----


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


# ---- named losses ----


def test_grpo_golden_numbers(examples, tok):
    args = (tok.logprobs, tok.old, tok.advantages, tok.mask)
    loss, metrics = grpo_loss(*args, ref_logprobs=tok.ref)
    close(loss, examples["grpo.loss_seqmean_beta0p04"])
    close(metrics["kl"].value(), examples["kl.k3_token_mean"])
    close(metrics["clip_ratio/region_mean"].value(), examples["ppo.clipfrac"])
    close(metrics["approx_kl"].value(), examples["ppo.approx_kl_k1_k2_k3"][2])
    close(metrics["ratio/max"].value(), np.exp(0.2))
    plain = grpo_loss(*args, kl_coef=0)[0]
    close(plain, examples["grpo.loss_seqmean_beta0"])
    close(plain, examples["dapo.seq_mean_of_ppo_losses"])
    close(plain / 2, examples["dapo.seed000_L_GRPO_literal"])
    close(plain / 6, examples["dapo.seed000_L_DAPO_literal"])
    groups = grpo_loss(*args, kl_coef=0, aggregation="group-sum-token-mean", group_ids=np.arange(2))[0]
    close(groups, examples["seed004.group_sum"])


def test_dr_grpo_and_dapo_golden_numbers(examples, tok):
    args = (tok.logprobs, tok.old, tok.advantages, tok.mask)
    close(dr_grpo_loss(*args, max_length=8)[0], examples["drgrpo.loss_norm8"])
    paper = grpo_loss(*args, kl_coef=0, aggregation="seq-mean-token-sum")[0]
    close(paper, examples["drgrpo.loss_paper_sum"])
    close(dapo_loss(*args)[0], examples["dapo.loss_token_mean"])


def test_grpo_equals_the_definition(ragged):
    args = (ragged.logprobs, ragged.old)
    options = {"ref_logprobs": ragged.ref, "clip_high": 0.28}
    loss, _ = grpo_loss(*args, ragged.advantages, ragged.mask, **options)
    close(loss, grpo_loop(ragged, high=0.28))
    loss, _ = grpo_loss(*args, ragged.token_advantages, ragged.mask, **options)
    close(loss, grpo_loop(ragged, high=0.28, advantages=ragged.token_advantages))


def test_metrics_equal_the_definition(ragged):
    _, metrics = grpo_loss(ragged.logprobs, ragged.old, ragged.token_advantages, ragged.mask, ref_logprobs=ragged.ref)
    valid = ragged.mask
    r = np.exp(ragged.logprobs - ragged.old)[valid]
    A, d = ragged.token_advantages[valid], (ragged.logprobs - ragged.ref)[valid]
    low, high = (r < 0.8) & (A < 0), (r > 1.2) & (A > 0)
    assert low.any() and high.any()
    expected = {
        "clip_ratio/low_mean": low.mean(),
        "clip_ratio/high_mean": high.mean(),
        "clip_ratio/region_mean": (low | high).mean(),
        "ratio/mean": r.mean(),
        "ratio/max": r.max(),
        "approx_kl": (r - 1 - np.log(r)).mean(),
        "kl": (np.exp(-d) - 1 + d).mean(),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        close(metrics[name].value(), value)
        assert isinstance(metrics[name], Max if name == "ratio/max" else Mean)


@pytest.mark.parametrize("estimator", ["k3", "k3-ratio", "k2"])
@pytest.mark.parametrize("per_token", [False, True])
def test_gradient_equals_finite_differences(ragged, estimator, per_token):
    with jax.enable_x64(True):
        advantages = ragged.token_advantages if per_token else ragged.advantages

        @jax.jit
        def loss(valid):
            logprobs = jnp.asarray(ragged.logprobs).at[np.nonzero(ragged.mask)].set(valid)
            return grpo_loss(
                logprobs,
                ragged.old,
                advantages,
                ragged.mask,
                ref_logprobs=ragged.ref,
                kl_coef=0.5,
                kl_estimator=estimator,
            )[0]

        check_grads(loss, (jnp.asarray(ragged.logprobs[ragged.mask]),), order=1, modes=["rev"], eps=1e-6)


def test_padding_does_not_matter(ragged):
    """NaN reaches neither value nor gradient, and other garbage gives the same bits."""

    def run(padding):
        arrays = [jnp.float32(np.where(ragged.mask, x, padding)) for x in (ragged.logprobs, ragged.old, ragged.ref)]
        advantages = jnp.float32(np.where(ragged.mask, ragged.advantages[..., None], padding))

        def loss(logprobs):
            return grpo_loss(logprobs, arrays[1], advantages, ragged.mask, ref_logprobs=arrays[2])

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays[0])

    (loss, metrics), grad = run(np.nan)
    assert np.isfinite(loss)
    assert all(np.isfinite(metric.value()) for metric in metrics.values())
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[~ragged.mask] == 0).all()
    for padding in (0.0, -np.inf, 1e30):
        jax.tree.map(np.testing.assert_array_equal, run(padding), ((loss, metrics), grad))


def test_only_the_policy_is_differentiated(ragged):
    def loss(old, advantages, ref):
        return grpo_loss(ragged.logprobs, old, advantages, ragged.mask, ref_logprobs=ref)[0]

    grads = jax.grad(loss, argnums=(0, 1, 2))(
        jnp.float32(ragged.old), jnp.float32(ragged.advantages), jnp.float32(ragged.ref)
    )
    assert all((grad == 0).all() for grad in grads)


def test_without_old_policy_it_is_the_policy_itself(ragged):
    def loss(logprobs, old):
        return grpo_loss(logprobs, old, ragged.advantages, ragged.mask, kl_coef=0, aggregation="token-sum")

    logprobs = jnp.float32(ragged.logprobs)
    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(logprobs, None)
    assert metrics["ratio/mean"].value() == metrics["ratio/max"].value() == 1
    assert metrics["clip_ratio/region_mean"].value() == metrics["approx_kl"].value() == 0
    with_old = jax.value_and_grad(loss, has_aux=True)(logprobs, logprobs)
    jax.tree.map(np.testing.assert_array_equal, with_old, ((value, metrics), grad))
    # The policy gradient: −A for each valid token.
    close(grad, np.where(ragged.mask, -ragged.advantages[..., None], 0))


@pytest.mark.parametrize("loss_function", [grpo_loss, dr_grpo_loss, dapo_loss])
def test_micro_batches_with_the_global_normalizer_add_up(ragged, loss_function):
    options = {
        grpo_loss: {"mode": "seq-mean-token-mean"},
        dr_grpo_loss: {"mode": "seq-mean-token-sum-norm"},
        dapo_loss: {"mode": "token-mean"},
    }[loss_function]
    extra = {grpo_loss: {"ref_logprobs": True}, dr_grpo_loss: {"max_length": 6}, dapo_loss: {}}[loss_function]

    def run(x, rows, normalizer):
        kwargs = dict(extra)
        if "ref_logprobs" in kwargs:
            kwargs["ref_logprobs"] = ragged.ref[rows]
        return loss_function(
            x[rows],
            ragged.old[rows],
            ragged.advantages[rows],
            ragged.mask[rows],
            normalizer=normalizer,
            **kwargs,
        )

    x = jnp.float32(ragged.logprobs)
    grad_of = jax.value_and_grad(run, has_aux=True)
    (loss, metrics), grad = grad_of(x, slice(None), None)
    normalizer = aggregation_normalizer(ragged.mask, **options)
    parts = [grad_of(x, rows, normalizer) for rows in (slice(0, 1), slice(1, 3), slice(3, 4))]
    close(sum(part[0][0] for part in parts), loss)
    close(sum(part[1] for part in parts), grad)
    for name, metric in metrics.items():
        merged = parts[0][0][1][name].merge(parts[1][0][1][name]).merge(parts[2][0][1][name])
        close(merged.value(), metric.value())


def test_the_order_of_rows_and_of_groups_does_not_matter(ragged):
    def loss(rows, group_rows=slice(None)):
        arrays = [x[rows][:, group_rows] for x in (ragged.logprobs, ragged.old, ragged.advantages, ragged.mask)]
        ref = ragged.ref[rows][:, group_rows]
        return grpo_loss(*arrays, ref_logprobs=ref, aggregation="group-mean-token-mean")[0]

    close(loss([2, 0, 3, 1], [1, 2, 0]), loss([0, 1, 2, 3]))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_packed_equals_padded(ragged, aggregation):
    """All sequences one after another in one row."""
    names = ("logprobs", "old", "ref", "token_advantages")
    rows = [row for row in np.ndindex(4, 3) if ragged.mask[row].any()]
    ends = [np.flatnonzero(ragged.mask[row]).max() + 1 for row in rows]
    packed = {
        name: np.concatenate([getattr(ragged, name)[row][:end] for row, end in zip(rows, ends, strict=True)])[None]
        for name in (*names, "mask")
    }
    segment_ids = np.concatenate([np.full(end, i) for i, end in enumerate(ends)])[None]
    options = {"aggregation": aggregation}

    def loss(data, **options):
        return grpo_loss(
            data["logprobs"],
            data["old"],
            data["token_advantages"],
            data["mask"],
            ref_logprobs=data["ref"],
            **options,
        )[0]

    padded = {name: getattr(ragged, name) for name in (*names, "mask")}
    close(loss(packed, segment_ids=segment_ids, **options), loss(padded, **options))
    with pytest.raises(ValueError, match="one advantage for each token"):
        loss(packed | {"token_advantages": np.zeros(1)}, segment_ids=segment_ids)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("loss_function", ["grpo", "dr_grpo", "dapo"])
def test_no_token_and_one_token_are_finite(tokens, loss_function):
    mask = jnp.zeros((2, 4), bool).at[0, 0].set(tokens == 1)
    logprobs = jnp.where(mask, -1.0, jnp.nan)

    def loss(logprobs):
        args = (logprobs, jnp.where(mask, -1.1, jnp.nan), jnp.array([2.0, jnp.nan]), mask)
        if loss_function == "grpo":
            return grpo_loss(*args, ref_logprobs=jnp.where(mask, -0.9, jnp.nan))
        return dr_grpo_loss(*args, max_length=4) if loss_function == "dr_grpo" else dapo_loss(*args)

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(logprobs)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert (np.asarray(grad) != 0).sum() == tokens
    assert all(np.isfinite(metric.value()) for metric in metrics.values())


def test_jit_vmap_and_half_precision(ragged):
    def loss(logprobs, old, advantages, mask, ref):
        return grpo_loss(logprobs, old, advantages, mask, ref_logprobs=ref)[0]

    arrays = [jnp.float32(x) for x in (ragged.logprobs, ragged.old, ragged.advantages)]
    arrays += [jnp.asarray(ragged.mask), jnp.float32(ragged.ref)]
    close(jax.jit(loss)(*arrays), loss(*arrays))
    mapped = jax.jit(jax.vmap(loss))(*arrays)
    close(mapped, [loss(*(x[p] for x in arrays)) for p in range(4)])
    half = [x if x.dtype == bool else x.astype(jnp.bfloat16) for x in arrays]
    assert loss(*half).dtype == jnp.float32
    widened = [x if x.dtype == bool else x.astype(jnp.float32) for x in half]
    np.testing.assert_array_equal(loss(*half), loss(*widened))


def test_the_kl_coefficient_may_be_traced(ragged):
    args = (ragged.logprobs, ragged.old, ragged.advantages, ragged.mask)
    loss = jax.jit(lambda coef: grpo_loss(*args, ref_logprobs=ragged.ref, kl_coef=coef)[0])
    close(loss(0.1), grpo_loop(ragged, kl_coef=0.1))
    close(loss(0.0), grpo_loop(ragged, kl_coef=0))


def test_the_kl_term_is_neither_clipped_nor_weighted(ragged):
    """With advantages of 0 only it is left."""
    loss, _ = grpo_loss(
        ragged.logprobs,
        ragged.old,
        np.zeros(ragged.mask.shape[:-1]),
        ragged.mask,
        ref_logprobs=ragged.ref,
        kl_coef=0.5,
        aggregation="token-mean",
    )
    k3 = np.asarray(kl_k3(ragged.logprobs, ragged.ref))[ragged.mask]
    close(loss, 0.5 * k3.mean())


def test_errors():
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"kl_coef is 0.04, but there are no ref_logprobs: pass them, or kl_coef=0"):
        grpo_loss(x, x, jnp.zeros(2), mask)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(2, 4\), but mask has shape \(2, 3\)"):
        jax.eval_shape(lambda old: dapo_loss(x, old, jnp.zeros(2), mask), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\), but logprobs has shape \(2, 3\)"):
        dapo_loss(x, x, jnp.zeros(3), mask)
    with pytest.raises(ValueError, match="mask must be bool, but has dtype float32"):
        dapo_loss(x, x, jnp.zeros(2), jnp.ones((2, 3)))
