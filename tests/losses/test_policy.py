from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.aggregate import AggregationMode, aggregate
from jaxrl_llm.losses.kl import kl_k3
from jaxrl_llm.losses.policy import dapo_loss, dr_grpo_loss, grpo_loss, ppo_loss
from jaxrl_llm.records import Max, Mean


def surrogate_loop(lr, A, low, high):
    r = np.exp(lr)
    return max(-A * r, -A * np.clip(r, 1 - low, 1 + high))


def grpo_loop(data, *, low=0.2, high=0.2, kl_coef=0.04, advantages=None, weights=None):
    """The objective as the paper prints it: mean over sequences of the mean over tokens."""
    sequences = []
    for row in np.ndindex(data.mask.shape[:-1]):
        terms = []
        for t in np.flatnonzero(data.mask[row]):
            A = data.advantages[row] if advantages is None else advantages[row][t]
            loss = surrogate_loop(data.logprobs[row][t] - data.old[row][t], A, low, high)
            d = data.logprobs[row][t] - data.ref[row][t]
            weight = 1 if weights is None else weights[row][t]
            terms.append(weight * loss + kl_coef * (np.exp(-d) - 1 + d))
        if terms:
            sequences.append(np.mean(terms))
    return np.mean(sequences)


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def test_ppo_golden_numbers(examples, tok):
    args = (tok.logprobs, tok.old, tok.advantages, tok.mask)
    close(ppo_loss(*args)[0], examples["ppo.clip_loss_token_mean"])
    close(ppo_loss(*args, clip_low=None, clip_high=None)[0], examples["ppo.noclip_seed000"])
    entropy = np.where(tok.mask, examples["entropy.logits_2_1_0"], np.nan)
    with_bonus, metrics = ppo_loss(*args, entropy=entropy, entropy_coef=0.01)
    close(with_bonus, examples["ppo.entropy_bonus_loss_0p01"])
    close(metrics["entropy"].value(), examples["entropy.logits_2_1_0"])
    # From end to end: with the critic's part of the source.
    advantages = np.array(examples["ppo.adv_seed"])
    policy = ppo_loss(tok.logprobs, tok.old, advantages, tok.mask, clip_low=None, clip_high=None)[0]
    close(policy + 0.1 * examples["ppo.critic_seed000"], examples["ppo.total_seed000"])


def test_grpo_golden_numbers(examples, tok):
    args = (tok.logprobs, tok.old, tok.advantages, tok.mask)
    loss, metrics = grpo_loss(*args, ref_logprobs=tok.ref)
    close(loss, examples["grpo.loss_seqmean_beta0p04"])
    close(metrics["kl"].value(), examples["kl.k3_token_mean"])
    close((loss - grpo_loss(*args, kl_coef=0)[0]) / 0.04, examples["grpo.kl_k3_seqmean"])
    close(metrics["clip_ratio/region_mean"].value(), examples["ppo.clipfrac"])
    close(metrics["approx_kl/k1"].value(), examples["ppo.approx_kl_k1_k2_k3"][0])
    close(metrics["approx_kl/k3"].value(), examples["ppo.approx_kl_k1_k2_k3"][2])
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


def test_ppo_equals_the_definition(ragged):
    args = (ragged.logprobs, ragged.old, ragged.token_advantages, ragged.mask)
    valid = ragged.mask
    lr, A = (ragged.logprobs - ragged.old)[valid], ragged.token_advantages[valid]
    tokens = [surrogate_loop(*pair, 0.1, 0.3) for pair in zip(lr, A, strict=True)]
    options = {"clip_low": 0.1, "clip_high": 0.3}
    close(ppo_loss(*args, **options)[0], np.mean(tokens))
    bonus, _ = ppo_loss(*args, **options, entropy=ragged.entropy, entropy_coef=0.5)
    close(bonus, np.mean(tokens) - 0.5 * ragged.entropy[valid].mean())
    dual, _ = ppo_loss(*args, clip_low=None, clip_high=None, dual_clip=1.1)
    close(
        dual, np.mean([min(-a * np.exp(x), 1.1 * -a) if a < 0 else -a * np.exp(x) for x, a in zip(lr, A, strict=True)])
    )
    capped = ppo_loss(*args, ratio_cap=1.3)[0]
    close(
        capped,
        np.mean([max(-a * min(np.exp(x), 1.3), -a * np.clip(np.exp(x), 0.8, 1.2)) for x, a in zip(lr, A, strict=True)]),
    )


def test_the_entropy_bonus_is_differentiated(ragged):
    def loss(entropy):
        args = (ragged.logprobs, ragged.old, ragged.advantages, ragged.mask)
        return ppo_loss(*args, entropy=entropy, entropy_coef=0.5)[0]

    grad = jax.grad(loss)(jnp.float32(ragged.entropy))
    close(grad, np.where(ragged.mask, -0.5 / ragged.mask.sum(), 0))


@pytest.mark.parametrize("by_token", [False, True])
def test_weights_multiply_the_policy_term_only(ragged, by_token):
    by_row = np.random.default_rng(5).random(ragged.advantages.shape)
    wide = np.broadcast_to(by_row[..., None], ragged.mask.shape)
    weights = ragged.weights if by_token else by_row
    args = (ragged.logprobs, ragged.old, ragged.advantages, ragged.mask)
    loss, _ = grpo_loss(*args, ref_logprobs=ragged.ref, kl_coef=0.3, weights=weights)
    close(loss, grpo_loop(ragged, kl_coef=0.3, weights=ragged.weights if by_token else wide))
    assert not jax.grad(lambda w: grpo_loss(*args, kl_coef=0, weights=w)[0])(jnp.float32(weights)).any()


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
        "approx_kl/k1": -np.log(r).mean(),
        "approx_kl/k3": (r - 1 - np.log(r)).mean(),
        "kl": (np.exp(-d) - 1 + d).mean(),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        close(metrics[name].value(), value)
        assert isinstance(metrics[name], Max if name == "ratio/max" else Mean)


LOSSES = {"ppo": ppo_loss, "grpo": grpo_loss, "dr_grpo": dr_grpo_loss, "dapo": dapo_loss}
MODES = {"grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm"}


@pytest.mark.parametrize("name", LOSSES)
def test_what_holds_of_every_loss(check_token_loss, ragged_rows, name):
    def loss(**arguments):
        extra = {"dr_grpo": {"max_length": 6}, "ppo": {"entropy_coef": 0.1}}
        return LOSSES[name](**arguments, **extra.get(name, {}))

    names = {"grpo": ("ref_logprobs",), "ppo": ("entropy", "weights")}.get(name, ("weights",))
    arrays = ragged_rows("logprobs", "old_logprobs", "advantages", "mask", *names)
    check_token_loss(loss, arrays, mode=MODES.get(name, "token-mean"))


@pytest.mark.parametrize("estimator", ["k3-ratio", "k2"])
def test_what_holds_of_every_loss_also_holds_of_other_estimators(check_token_loss, ragged_rows, estimator):
    def loss(token_advantages, **arguments):
        return grpo_loss(**arguments, advantages=token_advantages, kl_coef=0.5, kl_estimator=estimator)

    arrays = ragged_rows("logprobs", "old_logprobs", "token_advantages", "mask", "ref_logprobs", "weights")
    check_token_loss(loss, arrays, mode="seq-mean-token-mean")


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
    assert metrics["clip_ratio/region_mean"].value() == metrics["approx_kl/k3"].value() == 0
    with_old = jax.value_and_grad(loss, has_aux=True)(logprobs, logprobs)
    chex.assert_trees_all_equal(with_old, ((value, metrics), grad))
    # The policy gradient: −A for each valid token.
    close(grad, np.where(ragged.mask, -ragged.advantages[..., None], 0))


def test_the_order_of_rows_and_of_groups_does_not_matter(ragged):
    def loss(rows, group_rows=slice(None)):
        arrays = [x[rows][:, group_rows] for x in (ragged.logprobs, ragged.old, ragged.advantages, ragged.mask)]
        ref = ragged.ref[rows][:, group_rows]
        return grpo_loss(*arrays, ref_logprobs=ref, aggregation="group-mean-token-mean")[0]

    close(loss([2, 0, 3, 1], [1, 2, 0]), loss([0, 1, 2, 3]))


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
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\), but the tokens have shape \(2, 3\)"):
        dapo_loss(x, x, jnp.zeros(3), mask)
    with pytest.raises(ValueError, match="mask must be bool, but has dtype float32"):
        dapo_loss(x, x, jnp.zeros(2), jnp.ones((2, 3)))
    with pytest.raises(
        ValueError, match=r"entropy_coef is 0.1, but there are no entropy: pass them, or entropy_coef=0"
    ):
        ppo_loss(x, x, jnp.zeros(2), mask, entropy_coef=0.1)
    with pytest.raises(ValueError, match=r"advantages has shape \(2,\), .* with segment_ids"):
        dapo_loss(x, x, jnp.zeros(2), mask, segment_ids=jnp.zeros((2, 3), int))


def test_errors_name_the_reference(tok):
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(4,\)"):
        grpo_loss(tok.logprobs, tok.old, tok.advantages, tok.mask, ref_logprobs=tok.ref[0])


def test_fractions_cut_by_dual_clip_and_cap(ragged):
    """Beside the clip range, which cuts neither: they bound what A < 0 asks for."""
    old = ragged.logprobs - 6 * (ragged.logprobs - ragged.old)  # so far off that some are beyond the bounds
    args = (ragged.logprobs, old, ragged.token_advantages, ragged.mask)
    _, metrics = ppo_loss(*args, dual_clip=1.5, ratio_cap=2.5)
    ratio, advantages = np.exp(ragged.logprobs - old)[ragged.mask], ragged.token_advantages[ragged.mask]
    for name, bound in (("dual", 1.5), ("cap", 2.5)):
        share = ((ratio > bound) & (advantages < 0)).mean()
        assert 0 < share < 1
        close(metrics[f"clip_ratio/{name}_mean"].value(), share)
    assert not {"clip_ratio/dual_mean", "clip_ratio/cap_mean"} & set(ppo_loss(*args)[1])


def test_every_aggregation_is_within_reach_of_ppo(ragged):
    """With its entropy bonus, which takes part in the same mean."""
    entropy = np.where(ragged.mask, 0.7, np.nan)
    needed = {"seq-mean-token-sum-norm": {"max_length": 9}}
    for mode in get_args(AggregationMode):
        options = {"count_empty": True, **needed.get(mode, {})}
        arguments = (ragged.logprobs, ragged.old, ragged.advantages, ragged.mask)
        plain, _ = grpo_loss(*arguments, kl_coef=0, aggregation=mode, **options)
        loss, _ = ppo_loss(*arguments, aggregation=mode, entropy=entropy, entropy_coef=0.1, **options)
        close(plain - loss, 0.07 * aggregate(np.ones(ragged.mask.shape), ragged.mask, mode=mode, **options))
