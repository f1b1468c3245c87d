"""A*-PO's loss beside a loop, what holds of every loss, and TRL's own code."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import a_star_po_loss


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_golden_number(examples, tok):
    close(
        a_star_po_loss(tok.logprobs, tok.ref, tok.advantages, tok.mask, beta=0.1)[0], examples["a_star_po.loss_beta0p1"]
    )


def test_equals_the_definition(ragged):
    beta, held = 0.3, np.argwhere(ragged.mask.any(-1))
    expected, weighted, slope, implicit = 0.0, 0.0, np.zeros(ragged.mask.shape), []
    for p, g in held:
        mask = ragged.mask[p, g]
        implicit.append(beta * np.sum((ragged.logprobs - ragged.ref)[p, g][mask]))
        error = implicit[-1] - ragged.advantages[p, g]
        expected += error**2 / len(held)
        weighted += error**2 * ragged.weights[p, g][mask].mean() / len(held)
        slope[p, g][mask] = 2 * beta * error / len(held)
    args = (ragged.ref, ragged.advantages, ragged.mask)
    value, grad = jax.value_and_grad(lambda x: a_star_po_loss(x, *args, beta=beta)[0])(jnp.float32(ragged.logprobs))
    close(value, expected)
    close(grad, slope)
    close(a_star_po_loss(ragged.logprobs, *args, beta=beta, weights=ragged.weights)[0], weighted)
    _, metrics = a_star_po_loss(ragged.logprobs, *args, beta=beta)
    close(metrics["implicit_reward/mean"].value(), np.mean(implicit))
    close(metrics["advantage/mean"].value(), np.mean([ragged.advantages[p, g] for p, g in held]))


def test_holds_of_every_loss(ragged_rows, check_token_loss):
    names = ("logprobs", "ref_logprobs", "advantages", "mask", "weights")
    check_token_loss(a_star_po_loss, ragged_rows(*names), mode="seq-mean-token-sum")


def test_the_best_policy_is_its_minimum():
    """π ∝ reference exp(R / beta) over three sequences of one token, whatever V* is read of the exact reference."""
    ref, rewards, beta = np.log([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 0.4]), 0.5
    value = beta * np.log(np.sum(np.exp(ref + rewards / beta)))
    best = ref + (rewards - value) / beta
    close(np.exp(best).sum(), 1)
    arrays = (x[:, None] for x in (best, ref))
    close(a_star_po_loss(*arrays, rewards - value, np.ones((3, 1), bool), beta=beta)[0], 0)


def test_a_beta_that_is_not_positive(tok):
    with pytest.raises(ValueError, match="beta is 0: it must be finite and positive"):
        a_star_po_loss(tok.logprobs, tok.ref, tok.advantages, tok.mask, beta=0)


def test_trl(ragged_rows):
    """TRL's `compute_loss` on the log-probs of sequences; it counts empty ones, and there are none."""
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl.experimental.a2po.a2po_trainer")
    rows = {
        name: x[[0, 1, 2, 3, 5]] for name, x in ragged_rows("logprobs", "ref_logprobs", "advantages", "mask").items()
    }
    sums = {n: torch.tensor(np.sum(rows[n], axis=-1, where=rows["mask"])) for n in ("logprobs", "ref_logprobs")}
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(beta2=0.2),
        _metrics={"train": trl.defaultdict(list)},
        _get_sequence_logps=lambda *_: sums["logprobs"],
    )
    inputs = dict.fromkeys(("input_ids", "attention_mask", "logits_to_keep")) | {
        "ref_logps": sums["ref_logprobs"],
        "rewards": torch.tensor(rows["advantages"]),
        "v_star": torch.zeros(5),
    }
    theirs = trl.A2POTrainer.compute_loss(trainer, None, inputs)
    ours, _ = a_star_po_loss(**rows, beta=0.2)
    close(ours, float(theirs))
