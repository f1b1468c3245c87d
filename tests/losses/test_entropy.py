from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.logprobs import scores_from_logits
from jaxrl_llm.losses.aggregate import aggregate
from jaxrl_llm.losses.entropy import EntropyControl, entropy_bonus, update_entropy_control


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_golden_numbers(examples, tok):
    logits = jnp.array([2.0, 1.0, 0.0])
    scores = scores_from_logits(jnp.stack([logits] * 3), jnp.arange(3))
    close(scores.logprobs, examples["logp.logits_2_1_0"])
    close(scores.entropy, [examples["entropy.logits_2_1_0"]] * 3)
    entropy = np.where(tok.mask, examples["entropy.logits_2_1_0"], np.nan)
    bonus, metrics = entropy_bonus(entropy, tok.mask, entropy_coef=0.01)
    close(examples["ppo.clip_loss_token_mean"] + bonus, examples["ppo.entropy_bonus_loss_0p01"])
    close(metrics["entropy"].value(), examples["entropy.logits_2_1_0"])


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_it_equals_the_definition(check_token_loss, ragged_rows, mode):
    rows = ragged_rows("logprobs", "mask")
    entropy, mask = -rows["logprobs"], rows["mask"]

    def loss(entropy, mask, **options):
        return entropy_bonus(entropy, mask, entropy_coef=0.3, aggregation=mode, **options)

    totals = [entropy[b, mask[b]] for b in range(len(mask)) if mask[b].any()]
    expected = {
        "token-mean": np.concatenate(totals).mean(),
        "seq-mean-token-mean": np.mean([x.mean() for x in totals]),
        "seq-mean-token-sum": np.mean([x.sum() for x in totals]),
    }
    close(loss(entropy, mask)[0], -0.3 * expected[mode])
    check_token_loss(loss, {"entropy": entropy, "mask": mask}, mode=mode, trained="entropy")


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "seq-mean-token-sum-norm", "max_length": 8},
        {"mode": "seq-mean-token-mean", "count_empty": True},
        {"mode": "group-mean-token-mean", "group_ids": np.arange(12) // 3},
    ],
)
def test_it_takes_the_aggregation_of_any_policy_loss(ragged_rows, options):
    rows = ragged_rows("logprobs", "mask")
    expected = aggregate(rows["logprobs"], rows["mask"], **options)
    options = {"aggregation" if name == "mode" else name: x for name, x in options.items()}
    close(entropy_bonus(-rows["logprobs"], rows["mask"], entropy_coef=1.0, **options)[0], expected)


def test_it_raises_the_entropy_of_a_distribution():
    logits = jnp.array([[2.0, 1.0, 0.0]])

    def loss(logits):
        scores = scores_from_logits(logits, jnp.zeros(1, int))
        return entropy_bonus(scores.entropy, jnp.ones(1, bool), entropy_coef=1.0)[0]

    after = logits - 0.1 * jax.grad(loss)(logits)
    assert loss(after) < loss(logits) < 0


def test_the_weight_may_be_traced(tok):
    entropy = np.where(tok.mask, 1.0, np.nan)
    bonus = jax.jit(lambda coef: entropy_bonus(entropy, tok.mask, entropy_coef=coef)[0])
    assert bonus(0.5) == -0.5 and bonus(0.0) == 0


def test_the_control_follows_its_rule():
    """Steps up while the entropy is at or below the target and down while above, within the bounds."""
    state, step = EntropyControl.init(0.006), jax.jit(update_entropy_control)
    assert state.active_coef() == 0  # nothing was measured yet
    expected = [0.011, 0.016, 0.011, 0.006, 0.001, 0.0, 0.005]
    entropies = [0.1, 0.2, 0.3, 0.21, 5.0, 5.0, 0.0]
    for entropy, coef in zip(entropies, expected, strict=True):
        state = step(state, entropy)
        close(state.coef, coef)
        close(state.active_coef(), coef if entropy <= 0.2 else 0)
    for _ in range(3):
        state = update_entropy_control(state, 0.0, delta=0.5, maximum=0.9, minimum=0.1)
    close(state.coef, 0.9)
    for _ in range(3):
        state = update_entropy_control(state, 1.0, delta=0.5, maximum=0.9, minimum=0.1, target=0.99)
    close(state.coef, 0.1)
    assert state.active_coef(target=1.0) == state.coef


def test_the_control_keeps_its_types():
    """As the carry of a scan must."""
    with jax.enable_x64(True):
        state = update_entropy_control(EntropyControl.init(0.1), jnp.float64(0.3))
        assert state.coef.dtype == state.entropy.dtype == jnp.float32


def test_errors(tok):
    with pytest.raises(ValueError, match=r"entropy has shape \(3,\)"):
        entropy_bonus(np.zeros(3), tok.mask, entropy_coef=1)
    with pytest.raises(ValueError, match="minimum is 2 and maximum 1"):
        update_entropy_control(EntropyControl.init(), 0.1, minimum=2, maximum=1)
