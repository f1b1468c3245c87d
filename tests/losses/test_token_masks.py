import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.sequence import sequence_log_ratio
from jaxrl_llm.losses.token_masks import off_policy_sequence_mask, top_entropy_mask


def test_golden_numbers(examples, tok):
    kl = -sequence_log_ratio(tok.logprobs, tok.old, tok.mask)[:, 0]
    np.testing.assert_allclose(kl, examples["opsm.seq_kl"], atol=1e-6)
    keep = off_policy_sequence_mask(tok.logprobs, tok.old, tok.advantages, tok.mask, threshold=0.08)
    np.testing.assert_array_equal(keep, np.array(examples["opsm.keep_0p08"])[:, None] * tok.mask)


def off_policy_loop(data, threshold):
    keep = np.zeros(data.mask.shape, bool)
    for row in np.ndindex(data.mask.shape[:-1]):
        valid = data.mask[row]
        if valid.any():
            kl = (data.sampler - data.logprobs)[row][valid].mean()
            keep[row] = valid & (data.advantages[row] >= 0 or kl <= threshold)
    return keep


@pytest.mark.parametrize("threshold", [-0.1, 0.0, 0.1])
def test_off_policy_mask_equals_the_definition(ragged, threshold):
    args = (ragged.logprobs, ragged.sampler, ragged.advantages, ragged.mask)
    expected = off_policy_loop(ragged, threshold)
    assert 0 < expected.sum() < ragged.mask.sum()
    np.testing.assert_array_equal(off_policy_sequence_mask(*args, threshold=threshold), expected)
    # Two rows in one, with an advantage for each token.
    wide = (*args[:2], np.broadcast_to(ragged.advantages[..., None], ragged.mask.shape), ragged.mask)
    packed = [x.reshape(2, 6, 6).swapaxes(0, 1).reshape(6, 12) for x in wide]
    ids = np.repeat([[0] * 6 + [1] * 6], 6, axis=0)
    keep = off_policy_sequence_mask(*packed, threshold=threshold, segment_ids=ids)
    np.testing.assert_array_equal(keep.reshape(6, 2, 6).swapaxes(0, 1).reshape(4, 3, 6), expected)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.77, 1.0])
def test_top_entropy_equals_the_definition(ragged, fraction):
    threshold = np.quantile(ragged.entropy[ragged.mask], 1 - fraction)
    expected = ragged.mask & (ragged.entropy >= threshold)
    np.testing.assert_array_equal(top_entropy_mask(ragged.entropy, ragged.mask, fraction=fraction), expected)
    assert expected.sum() == np.floor(fraction * (ragged.mask.sum() - 1)) + 1
    for padding in (np.inf, -np.inf, 5.0):
        dirty = np.where(ragged.mask, ragged.entropy, padding)
        np.testing.assert_array_equal(top_entropy_mask(dirty, ragged.mask, fraction=fraction), expected)


def test_few_and_equal_entropies():
    one = np.array([[False, True, False]])
    np.testing.assert_array_equal(top_entropy_mask(np.ones((1, 3)), one), one)
    assert not top_entropy_mask(np.full((1, 3), np.nan), np.zeros((1, 3), bool)).any()
    assert top_entropy_mask(np.ones((2, 3)), np.ones((2, 3), bool)).all()
    two = top_entropy_mask(np.array([1.0, 2.0]), np.ones(2, bool), fraction=0.5)
    assert two.tolist() == [False, True]


def test_jit_vmap_and_constants(ragged):
    arrays = [jnp.asarray(x) for x in (ragged.logprobs, ragged.sampler, ragged.advantages, ragged.mask)]

    def off_policy(*arrays):
        return off_policy_sequence_mask(*arrays, threshold=0.0)

    np.testing.assert_array_equal(jax.jit(off_policy)(*arrays), off_policy(*arrays))
    np.testing.assert_array_equal(jax.vmap(off_policy)(*arrays), off_policy(*arrays))
    np.testing.assert_array_equal(off_policy(arrays[0], arrays[0], *arrays[2:]), ragged.mask)

    entropy, mask = jnp.asarray(ragged.entropy), arrays[3]
    np.testing.assert_array_equal(jax.jit(top_entropy_mask)(entropy, mask), top_entropy_mask(entropy, mask))
    mapped = jax.vmap(top_entropy_mask)(entropy, mask)
    np.testing.assert_array_equal(mapped, [top_entropy_mask(*row) for row in zip(entropy, mask, strict=True)])
    half = entropy.astype(jnp.bfloat16)
    np.testing.assert_array_equal(top_entropy_mask(half, mask), top_entropy_mask(half.astype(jnp.float32), mask))
    grad = jax.grad(lambda x: jnp.sum(top_entropy_mask(x, mask) * 1.0))(entropy)
    assert not grad.any()


def test_errors(tok):
    with pytest.raises(ValueError, match=r"fraction is 1.5: it is a share of the tokens, from 0 to 1"):
        top_entropy_mask(tok.logprobs, tok.mask, fraction=1.5)
    with pytest.raises(ValueError, match=r"entropy has shape \(2, 3\), but mask has shape \(2, 4\)"):
        top_entropy_mask(np.zeros((2, 3)), tok.mask)
    with pytest.raises(ValueError, match=r"advantages has shape .* with segment_ids"):
        off_policy_sequence_mask(*[tok.logprobs] * 2, np.ones(2), tok.mask, threshold=0, segment_ids=tok.mask * 1)


def test_no_rows():
    assert top_entropy_mask(np.ones((0, 3)), np.ones((0, 3), bool)).shape == (0, 3)
