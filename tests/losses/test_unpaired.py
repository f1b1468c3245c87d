"""KTO and BCO against their equations and the golden numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.bco import RewardShift, bco_loss
from jaxrl_llm.losses.kto import kto_balance, kto_kl, kto_kl_of_other_side, kto_loss
from jaxrl_llm.losses.preference_sides import bco_pair_loss
from jaxrl_llm.losses.sequence_logprobs import implicit_reward


def sigma(x):
    return 1 / (1 + np.exp(-x))


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


@pytest.fixture
def samples(ragged_pairs):
    """Random labelled completions, three of eight padding; four are desirable and one is not."""
    return {
        "logprobs": ragged_pairs["chosen_logprobs"],
        "ref_logprobs": ragged_pairs["ref_chosen_logprobs"],
        "labels": np.array([True, True, False, False, True, True, True, False]),
        "mask": ragged_pairs["mask"],
    }


def loop(samples, sample_loss):
    """The values of `sample_loss`(D, label, i) of the valid samples."""
    ratios = samples["logprobs"] - samples["ref_logprobs"]
    return [sample_loss(ratios[i], samples["labels"][i], i) for i in np.flatnonzero(samples["mask"])]


def as_samples(pref):
    """The chosen completions as desirable, the rejected ones as undesirable."""
    logprobs = np.concatenate([pref.chosen, pref.rejected])
    return logprobs, np.concatenate([pref.ref_chosen, pref.ref_rejected]), np.array([True, True, False, False])


def test_kto_golden_numbers(examples, pref):
    z0 = kto_kl(np.array([0.3, -0.1, 0.5, 0.1]), np.zeros(4))
    close(z0, examples["kto.z0"])
    close(kto_kl(np.array([-0.3, -0.1]), np.zeros(2)), examples["kto.z0_negative_clamped"])
    data = as_samples(pref)
    close(kto_loss(*data, z0)[0], examples["kto.loss_lD1_lU1"])
    close(kto_loss(*data, z0, lambda_u=1.33)[0], examples["kto.loss_lD1_lU1p33"])
    losses = jax.vmap(lambda *sample: kto_loss(*sample, z0)[0])(*data)
    close(losses[:2], examples["kto.desirable_losses"])
    close(losses[2:], examples["kto.undesirable_losses"])
    one_sided = jax.vmap(lambda *sample: kto_loss(*sample, None, variant="one_sided_dpo")[0])(*data)
    close(one_sided[:2], examples["kto.seed000_tag_true"])
    close(one_sided[2:], examples["kto.seed000_tag_false"])
    mixed = [x[np.array([0, 3])] for x in data]
    close(kto_loss(*mixed, None, variant="one_sided_dpo")[0], examples["kto.seed000_mixed_T_F"])


@pytest.mark.parametrize("per_side", [False, True])
@pytest.mark.parametrize("variant", ["kto", "one_sided_dpo", "apo_zero_unpaired"])
def test_kto_equals_the_definition(samples, variant, per_side):
    z0 = {"kto": 0.4, "one_sided_dpo": None, "apo_zero_unpaired": None}[variant]

    def sample_loss(ratio, label, i):
        reward = 0.3 * (ratio - (z0 or 0))
        if variant == "one_sided_dpo":
            return -np.log(sigma(reward)) * 1.2 if label else -np.log(sigma(-reward)) * 0.8
        return 1.2 * (1 - sigma(reward)) if label else 0.8 * (1 - sigma(-reward))

    losses = np.array(loop(samples, sample_loss))
    labels = samples["labels"][samples["mask"]]
    expected = (losses[labels].mean() + losses[~labels].mean()) / 2 if per_side else losses.mean()
    options = {"beta": 0.3, "lambda_d": 1.2, "lambda_u": 0.8, "variant": variant, "per_side_mean": per_side}
    loss, metrics = kto_loss(**samples, kl=z0, **options)
    close(loss, expected)
    rewards = 0.3 * np.array(loop(samples, lambda ratio, label, i: ratio))
    close(metrics["rewards/chosen"].value(), rewards[labels].mean())
    close(metrics["rewards/rejected"].value(), rewards[~labels].mean())
    logprobs = samples["logprobs"][samples["mask"]]
    close(metrics["logps/chosen"].value(), logprobs[labels].mean())
    close(metrics["logps/rejected"].value(), logprobs[~labels].mean())
    if variant == "kto":
        close(metrics["kl"].value(), 0.4)
    assert set(metrics) == {f"{a}/{b}" for a in ("rewards", "logps") for b in ("chosen", "rejected")} | (
        {"kl"} if variant == "kto" else set()
    )


@pytest.mark.parametrize("side", [True, False])
def test_kto_with_one_side_is_the_mean_of_that_side(samples, side):
    only = samples | {"labels": np.full(8, side)}
    options = {"kl": 0.1}
    close(kto_loss(**only, **options, per_side_mean=True)[0], kto_loss(**only, **options)[0])


def test_kto_kl_equals_the_definition(samples):
    log_ratios = loop(samples, lambda ratio, label, i: ratio)
    arrays = (samples["logprobs"], samples["ref_logprobs"])
    close(kto_kl(*arrays, mask=samples["mask"]), max(np.mean(log_ratios), 0))
    close(kto_kl(*arrays[::-1], mask=samples["mask"]), max(-np.mean(log_ratios), 0))
    assert max(np.mean(log_ratios), -np.mean(log_ratios)) > 0
    grads = jax.grad(lambda *x: kto_kl(*x, mask=samples["mask"]), argnums=(0, 1))(*map(jnp.float32, arrays))
    assert not any(np.any(gradient) for gradient in grads)
    assert kto_kl(np.full(2, np.nan), np.full(2, np.nan), mask=np.zeros(2, bool)) == 0
    with pytest.raises(ValueError, match="ref_mismatched_logprobs has shape"):
        kto_kl(np.zeros(2), np.zeros(3))


def test_kl_of_the_other_side_equals_the_definition(samples):
    pairs = loop(samples, lambda ratio, label, i: (ratio, label))
    means = {side: max(0, np.mean([ratio for ratio, label in pairs if label == side])) for side in (True, False)}
    kl = kto_kl_of_other_side(**samples)
    close(np.asarray(kl)[samples["mask"]], [means[not label] for _, label in pairs])
    expected = loop(
        samples,
        lambda ratio, label, i: (
            1 - sigma(0.1 * (ratio - means[False])) if label else 1 - sigma(0.1 * (means[True] - ratio))
        ),
    )
    close(kto_loss(**samples, kl=kl)[0], np.mean(expected))
    assert not np.any(kto_kl_of_other_side(**samples | {"labels": np.ones(8, bool)}))


@pytest.mark.parametrize(
    ("counts", "weights"),
    [((100, 100), (1, 1)), ((4, 3), (1, 1)), ((100, 1000), (10, 1)), ((1000, 100), (1, 7.5)), ((5, 4), (1, 1))],
)
def test_balance_brings_the_ratio_into_its_range(counts, weights):
    lambda_d, lambda_u = kto_balance(*counts)
    close((lambda_d, lambda_u), weights)
    assert 1 - 1e-9 <= lambda_d * counts[0] / (lambda_u * counts[1]) <= 4 / 3 + 1e-9


def test_bco_golden_numbers(examples, pref):
    data = as_samples(pref)
    close(bco_loss(*data, reward_shift=0.02)[0], examples["bco.unpaired_concat_delta_0p02"])
    close(2 * bco_loss(*data)[0], examples["bco.trl_pair_no_delta"])
    shift = RewardShift.empty().update(implicit_reward(*data[:2]), data[2])
    close(shift.value("sides"), examples["bco.batch_mean_reward"])
    close(shift.value(), examples["bco.batch_mean_reward"])


def test_bco_equals_the_definition(samples, ragged_pairs):
    weights = ragged_pairs["weights"]

    def sample_loss(ratio, label, i):
        reward = 0.3 * ratio - 0.2
        return -weights[i] * np.log(sigma(reward if label else -reward))

    loss, metrics = bco_loss(**samples, beta=0.3, reward_shift=0.2, weights=weights)
    close(loss, np.mean(loop(samples, sample_loss)))
    close(metrics["delta"].value(), 0.2)
    one_sided = kto_loss(**samples, kl=None, variant="one_sided_dpo", beta=0.3)[0]
    close(bco_loss(**samples, beta=0.3)[0], one_sided)


def test_reward_shift_is_the_mean_over_all_batches(samples):
    rng = np.random.default_rng(0)
    shift, rewards, labels = RewardShift.empty(), [], []
    assert shift.value() == shift.value("sides") == 0
    update = jax.jit(lambda state, rewards, labels, mask: state.update(rewards, labels, mask=mask))
    for _ in range(3):
        batch, side = rng.normal(size=8), rng.uniform(size=8) < 0.3
        shift = update(shift, np.where(samples["mask"], batch, np.nan), side, samples["mask"])
        rewards.extend(batch[samples["mask"]])
        labels.extend(side[samples["mask"]])
    rewards, labels = np.array(rewards), np.array(labels)
    close(shift.value(), rewards.mean())
    close(shift.value("sides"), (rewards[labels].mean() + rewards[~labels].mean()) / 2)
    assert abs(shift.value() - shift.value("sides")) > 1e-3
    good = RewardShift.empty().update(rewards[:4], np.ones(4, bool))
    close(good.value("sides"), rewards[:4].mean())  # there is no other side yet
    assert jax.grad(lambda x: RewardShift.empty().update(x, True).value())(1.0) == 0


def test_baselines_are_constants(samples):
    """Of which the value is a function of the policy, but the loss has no gradient through it."""

    def of_the_other_side(logprobs):
        return kto_kl_of_other_side(**samples | {"logprobs": logprobs}).sum()

    logprobs = jnp.float32(samples["ref_logprobs"] + 1)
    assert of_the_other_side(logprobs) > 0
    assert not np.any(jax.grad(of_the_other_side)(logprobs))
    assert jax.grad(lambda shift: bco_loss(**samples, reward_shift=shift)[0])(0.1) == 0
    pair = [np.ones(3)] * 4
    assert jax.grad(lambda shift: bco_pair_loss(*pair, reward_shift=shift)[0])(0.1) == 0


def test_errors(samples):
    with pytest.raises(ValueError, match="labels must be bool, but have dtype int"):
        bco_loss(**samples | {"labels": np.ones(8, int)})
    with pytest.raises(ValueError, match=r"logprobs has shape \(8,\), but labels has shape \(2,\)"):
        kto_loss(**samples | {"labels": np.ones(2, bool)}, kl=0.0)
    with pytest.raises(ValueError, match="unknown variant 'dpo': choose one of kto, one_sided_dpo"):
        kto_loss(**samples, kl=0.0, variant="dpo")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"variant 'kto' with kl None: pass kl"):
        kto_loss(**samples, kl=None)
    with pytest.raises(ValueError, match=r"variant 'apo_zero_unpaired' with kl 0.1"):
        kto_loss(**samples, kl=0.1, variant="apo_zero_unpaired")
    with pytest.raises(ValueError, match=r"normalizer has shape \(\): with per_side_mean pass the numbers"):
        kto_loss(**samples, kl=0.1, per_side_mean=True, normalizer=3)
    with pytest.raises(ValueError, match="lambda_u is -1"):
        kto_loss(**samples, kl=0.1, lambda_u=-1)
    with pytest.raises(ValueError, match="unknown average 'both': choose one of samples, sides"):
        RewardShift.empty().value("both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="0 desirable and 5 undesirable samples: KTO needs both"):
        kto_balance(0, 5)
    with pytest.raises(ValueError, match="low is 2 and high is 1"):
        kto_balance(1, 5, low=2, high=1)
