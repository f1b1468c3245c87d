from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.aggregate import aggregation_normalizer
from jaxrl_llm.losses.supervised import sft_loss


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
