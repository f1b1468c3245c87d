from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.logprobs import scores_from_logits
from jaxrl_llm.losses.aggregate import aggregation_normalizer
from jaxrl_llm.losses.supervised import dft_loss, sft_loss


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_golden_numbers(examples):
    """Position t of the logits scores token t + 1; the first two tokens are the prompt."""
    logits = jnp.array([[2.0, 1, 0], [0, 1, 2], [1, 1, 1], [0, 0, 3]])
    tokens = jnp.array([0, 2, 1, 0])
    logprobs = scores_from_logits(logits[:-1], tokens[1:]).logprobs
    close(logprobs, examples["sft.token_logps"])
    close(sft_loss(logprobs, np.ones(3, bool))[0], examples["sft.loss_all"])
    completion = np.array([False, True, True])
    close(sft_loss(logprobs, completion)[0], examples["sft.loss_completion_only"])
    close(dft_loss(logprobs, completion)[0], examples["sft.dft_completion_only"])


@pytest.fixture
def rows(ragged_rows):
    """Token log-probs with the means and the normalizers of their distributions."""
    rows = ragged_rows("logprobs", "mask")
    rng = np.random.default_rng(1)
    for name in ("mean_logprobs", "log_normalizers"):
        rows[name] = np.where(rows["mask"], rng.normal(size=rows["mask"].shape) - 3, np.nan)
    return rows


def by_mode(losses, mask, mode):
    """The loss of all positions, reduced."""
    if mode == "token-mean":
        return losses[mask].mean()
    return np.mean([losses[b, mask[b]].mean() for b in range(len(mask)) if mask[b].any()])


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("smoothing, z_coef", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.02), (0.1, 0.02)])
def test_the_extras_equal_the_definition(check_token_loss, rows, mode, smoothing, z_coef):
    def loss(**arrays):
        return sft_loss(**arrays, label_smoothing=smoothing, z_loss_coef=z_coef, aggregation=mode)

    value, metrics = loss(**rows)
    nll, smoothed = -rows["logprobs"], -rows["mean_logprobs"]
    z_loss = rows["log_normalizers"] ** 2
    losses = (1 - smoothing) * nll + smoothing * smoothed + z_coef * z_loss
    close(value, by_mode(losses, rows["mask"], mode))
    expected = {"nll": nll} | ({"smoothed_nll": smoothed} if smoothing else {}) | ({"z_loss": z_loss} if z_coef else {})
    assert set(metrics) == set(expected)
    for name, terms in expected.items():
        close(metrics[name].value(), terms[rows["mask"]].mean())
    if smoothing and z_coef:
        for trained in ("logprobs", "mean_logprobs", "log_normalizers"):
            check_token_loss(loss, rows, mode=mode, trained=trained)


def test_smoothing_is_cross_entropy_with_a_mixture():
    """Of the target and the uniform distribution."""
    logits = jnp.array([[2.0, -1.0, 0.5], [0.0, 0.3, -2.0]])
    tokens = jnp.array([1, 2])
    all_logprobs = jax.nn.log_softmax(logits)
    target = 0.9 * jax.nn.one_hot(tokens, 3) + 0.1 / 3
    expected = -jnp.mean(jnp.sum(target * all_logprobs, -1))
    logprobs = scores_from_logits(logits, tokens).logprobs
    loss, _ = sft_loss(logprobs, np.ones(2, bool), label_smoothing=0.1, mean_logprobs=all_logprobs.mean(-1))
    close(loss, expected)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_dft_equals_the_definition(check_token_loss, rows, mode):
    logprobs, mask = rows["logprobs"], rows["mask"]
    value, metrics = dft_loss(logprobs, mask, aggregation=mode)
    close(value, by_mode(-np.exp(logprobs) * logprobs, mask, mode))
    close(metrics["nll"].value(), -logprobs[mask].mean())
    close(metrics["token_prob/mean"].value(), np.exp(logprobs[mask]).mean())
    # The weight is a constant, so that the gradient is −p and not that of −p log p.
    grad = jax.grad(lambda x: dft_loss(x, mask)[0])(jnp.float32(logprobs))
    close(grad, np.where(mask, -np.exp(logprobs) / mask.sum(), 0))

    def loss(**arrays):
        return dft_loss(**arrays, aggregation=mode)

    check_token_loss(loss, {"logprobs": logprobs, "mask": mask}, mode=mode, detached=True)


def test_dft_of_an_impossible_token_is_0():
    loss, grad = jax.value_and_grad(lambda x: dft_loss(x, np.ones(2, bool))[0])(jnp.array([-jnp.inf, -1.0]))
    close(loss, np.exp(-1) / 2)
    close(grad, [0, -np.exp(-1) / 2])


def test_hand_example(tok):
    """Six tokens of two rows; NaN at the padding."""
    total = 1.0 + 0.5 + 2.0 + 0.1 + 0.3 + 1.2
    loss, metrics = sft_loss(tok.logprobs, tok.mask)
    assert float(loss) == pytest.approx(total / 6)
    assert float(metrics["nll"].value()) == pytest.approx(total / 6)
    by_sequence, _ = sft_loss(tok.logprobs, tok.mask, aggregation="seq-mean-token-mean")
    assert float(by_sequence) == pytest.approx((3.6 / 4 + 1.5 / 2) / 2)


def test_gradient_is_minus_one_over_n_on_the_masked_tokens_alone(ragged):
    gradient = jax.grad(lambda logprobs: sft_loss(logprobs, ragged.mask)[0])(jnp.asarray(ragged.logprobs))
    np.testing.assert_allclose(gradient, np.where(ragged.mask, -1 / ragged.mask.sum(), 0), rtol=1e-6)


def test_parts_add_up_with_the_normalizer_of_the_whole(ragged):
    whole, metrics = sft_loss(ragged.logprobs, ragged.mask)
    normalizer = aggregation_normalizer(ragged.mask, mode="token-mean")
    parts = [sft_loss(ragged.logprobs[i : i + 1], ragged.mask[i : i + 1], normalizer=normalizer) for i in range(4)]
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(float(whole), rel=1e-6)
    merged = parts[0][1]["nll"]
    for _, part in parts[1:]:
        merged = merged.merge(part["nll"])
    assert float(merged.value()) == pytest.approx(float(metrics["nll"].value()), rel=1e-6)


def test_packed_rows_equal_padded_rows():
    rng = np.random.default_rng(0)
    first, second = -rng.exponential(size=3), -rng.exponential(size=5)
    padded = np.full((2, 5), np.nan)
    padded[0, :3], padded[1] = first, second
    mask = np.arange(5) < np.array([[3], [5]])
    packed = np.concatenate([first, second])[None]
    ids = np.array([[0, 0, 0, 1, 1, 1, 1, 1]])
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        expected, ours = jax.jit(
            lambda mode=mode: (
                sft_loss(padded, mask, aggregation=mode)[0],
                sft_loss(packed, np.ones((1, 8), bool), aggregation=mode, segment_ids=ids)[0],
            )
        )()
        assert float(ours) == pytest.approx(float(expected), rel=1e-6), mode


def test_nothing_masked_in_is_zero_and_finite(ragged):
    def loss(logprobs: jax.Array) -> jax.Array:
        return sft_loss(logprobs, np.zeros_like(ragged.mask))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(ragged.logprobs))
    assert float(value) == 0
    assert (np.asarray(gradient) == 0).all()


def test_half_precision_is_widened():
    loss, _ = sft_loss(jnp.full((1, 4096), -1.0, jnp.bfloat16), np.ones((1, 4096), bool))
    assert loss.dtype == jnp.float32
    assert float(loss) == 1.0


def test_misuse_raises(tok):
    with pytest.raises(ValueError, match="mask must be bool"):
        sft_loss(tok.logprobs, tok.mask.astype(int))
    with pytest.raises(ValueError, match=r"logprobs has shape \(2, 3\)"):
        sft_loss(tok.logprobs[:, :3], tok.mask)
    with pytest.raises(ValueError, match="unknown aggregation mode 'mean'"):
        sft_loss(tok.logprobs, tok.mask, aggregation="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.1, but there are no mean_logprobs: pass them"):
        sft_loss(tok.logprobs, tok.mask, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"z_loss_coef is 0\.1, but there are no log_normalizers: pass them"):
        sft_loss(tok.logprobs, tok.mask, z_loss_coef=0.1)
    with pytest.raises(ValueError, match="label_smoothing is 1"):
        sft_loss(tok.logprobs, tok.mask, label_smoothing=1, mean_logprobs=tok.ref)
