import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.correction import (
    effective_sample_size,
    geometric_filter,
    icepop_weights,
    importance_weights,
    mis_weights,
    seq_mask_tis_weights,
    tis_weights,
)
from jaxrl_llm.losses.policy import ppo_loss
from jaxrl_llm.masking import segment_first

LEVELS = ["token", "sequence", "geometric"]
ROLL = np.array([[-1.3, -0.5, -2.6, -0.2], [-0.4, -0.7, 0, 0]])


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def weights_loop(data, level):
    out = np.zeros(data.mask.shape)
    for i in zip(*np.nonzero(data.mask), strict=True):
        row = (data.old - data.sampler)[i[:-1]][data.mask[i[:-1]]]
        exponent = {"token": (data.old - data.sampler)[i], "sequence": row.sum(), "geometric": row.mean()}[level]
        out[i] = np.exp(exponent)
    return out


def test_golden_numbers(examples, tok):
    args = (tok.old, ROLL, tok.mask)
    close(importance_weights(*args), examples["tis.token_weights_raw"])
    close(tis_weights(*args), examples["tis.token_truncated_2"])
    close(icepop_weights(*args, w_max=2), examples["tis.token_icepop_0p5_2"])
    close(importance_weights(*args, level="sequence")[:, 0], examples["tis.seq_product"])
    close(importance_weights(*args, level="geometric")[:, 0], examples["tis.seq_geometric"])
    close(tis_weights(*args, level="sequence")[:, 0], examples["tis.seq_truncated_2"])
    close(mis_weights(*args)[:, 0], examples["mis.seq_mask_3"])
    loss, _ = ppo_loss(tok.logprobs, tok.old, tok.advantages, tok.mask, weights=tis_weights(*args))
    close(loss, examples["tis.ppo_loss_token2"])


@pytest.mark.parametrize("level", LEVELS)
def test_weights_equal_the_definition(ragged, level):
    args = (ragged.old, ragged.sampler, ragged.mask)
    raw = weights_loop(ragged, level)
    close(importance_weights(*args, level=level), raw)
    close(tis_weights(*args, level=level, w_max=1.1), np.minimum(raw, 1.1))
    truncated = np.where(ragged.mask, np.clip(raw, 0.8, 1.1), 0)
    close(tis_weights(*args, level=level, w_min=0.8, w_max=1.1), truncated)
    close(tis_weights(*args, level=level, w_max=None), raw)
    close(mis_weights(*args, level=level, w_max=1.1), np.where(raw <= 1.1, raw, 0))
    assert (raw > 1.1).any()
    close(mis_weights(*args, level=level, w_min=0.9, w_max=None), np.where(raw >= 0.9, raw, 0))


def test_filters_equal_the_definition(ragged):
    args = (ragged.old, ragged.sampler, ragged.mask)
    raw, mean = weights_loop(ragged, "token"), weights_loop(ragged, "geometric")
    close(icepop_weights(*args, w_min=0.8, w_max=1.2), np.where((raw >= 0.8) & (raw <= 1.2), raw, 0))
    keep = (mean >= 0.9) & (mean <= 1.1) & ragged.mask
    assert 0 < keep.sum() < ragged.mask.sum()
    np.testing.assert_array_equal(geometric_filter(*args, w_min=0.9, w_max=1.1), keep)
    close(seq_mask_tis_weights(*args, w_min=0.9, w_max=1.1), np.where(keep, raw, 0))
    np.testing.assert_array_equal(geometric_filter(*args, w_min=0.0, w_max=9.0), ragged.mask)
    # Bounds are inclusive.
    same = (ragged.old, ragged.old, ragged.mask)
    np.testing.assert_array_equal(geometric_filter(*same, w_min=1.0, w_max=1.0), ragged.mask)
    close(mis_weights(*same, w_min=1.0, w_max=1.0), ragged.mask)


FUNCTIONS = [
    *(lambda *args, level=level, **o: importance_weights(*args, level=level, **o) for level in LEVELS),
    tis_weights,
    mis_weights,
    lambda *args, **o: geometric_filter(*args, w_min=0.9, w_max=1.1, **o),
    lambda *args, **o: seq_mask_tis_weights(*args, w_min=0.9, w_max=1.1, **o),
]


@pytest.mark.parametrize("weights", FUNCTIONS)
def test_what_holds_of_all_weights(ragged, weights):
    old, sampler, mask = jnp.float32(ragged.old), jnp.float32(ragged.sampler), jnp.asarray(ragged.mask)
    expected = weights(old, sampler, mask)
    assert not np.asarray(expected)[~ragged.mask].any()
    for padding in (np.inf, 3.0):
        args = (jnp.where(mask, x, padding) for x in (old, sampler))
        np.testing.assert_array_equal(weights(*args, mask), expected)
    close(jax.jit(weights)(old, sampler, mask), expected)
    close(jax.vmap(weights)(old, sampler, mask), expected)
    assert weights(old.astype(jnp.bfloat16), sampler.astype(jnp.bfloat16), mask).dtype in (jnp.float32, bool)
    grads = jax.grad(lambda *x: jnp.sum(weights(*x, mask) * 1.0), argnums=(0, 1))(old, sampler)
    assert not any(np.any(grad) for grad in grads)
    assert np.isfinite(weights(old + 1e4, sampler, mask)).all()
    # Two rows in one.
    packed = [x.reshape(2, 6, 6).swapaxes(0, 1).reshape(6, 12) for x in (old, sampler, mask)]
    ids = np.repeat([[0] * 6 + [1] * 6], 6, axis=0)
    unpacked = weights(*packed, segment_ids=ids).reshape(6, 2, 6).swapaxes(0, 1).reshape(4, 3, 6)
    close(unpacked, expected)


def test_masked_tokens_stay_in_the_denominator(ragged):
    weights = mis_weights(ragged.old, ragged.sampler, ragged.mask, w_max=1.0)
    args = (ragged.logprobs, ragged.old, ragged.advantages, ragged.mask)
    left = np.asarray(weights > 0)
    assert 0 < left.sum() < ragged.mask.sum()
    total = ppo_loss(*args[:3], left, weights=weights, aggregation="token-sum")[0]
    close(ppo_loss(*args, weights=weights)[0], total / ragged.mask.sum())


def test_effective_sample_size(ragged):
    weights = importance_weights(ragged.old, ragged.sampler, ragged.mask, level="sequence")
    w = weights_loop(ragged, "sequence")[..., 0][ragged.mask[..., 0]]
    close(effective_sample_size(weights, segment_first(ragged.mask)), w.sum() ** 2 / (len(w) * (w**2).sum()))
    by_token = weights_loop(ragged, "token")[ragged.mask]
    share = by_token.sum() ** 2 / (len(by_token) * (by_token**2).sum())
    close(effective_sample_size(np.where(ragged.mask, weights_loop(ragged, "token"), np.nan), ragged.mask), share)
    close(effective_sample_size(np.full(4, 3.0), np.ones(4, bool)), 1)
    close(effective_sample_size(np.array([0, 0, 0, 3.0]), np.ones(4, bool)), 0.25)
    for mask in (np.zeros(4, bool), np.ones(4, bool)):
        assert effective_sample_size(np.zeros(4), mask) == 0


def test_errors(tok):
    args = (tok.old, ROLL, tok.mask)
    with pytest.raises(ValueError, match="unknown level 'row': choose one of token, sequence, geometric"):
        importance_weights(*args, level="row")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="w_min is 2 and w_max is 1: no weight is between them"):
        tis_weights(*args, w_min=2, w_max=1)
    with pytest.raises(ValueError, match="w_max is -1: it must be finite and not negative"):
        mis_weights(*args, w_max=-1)
    with pytest.raises(ValueError, match=r"sampler_logprobs has shape \(2, 3\), but mask has shape \(2, 4\)"):
        geometric_filter(tok.old, np.zeros((2, 3)), tok.mask)
