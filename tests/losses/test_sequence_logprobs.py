import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.losses.sequence_logprobs import implicit_reward, sequence_logprobs, wpo_weights


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def loop(logprobs, mask, *, average=False, ld_alpha=1.0, shared=None):
    total, position = 0.0, 0
    for t in np.flatnonzero(mask):
        position += 1
        total += logprobs[t] * (1 if shared is None or position <= shared else ld_alpha)
    return total / max(position, 1) if average else total


def rows_of(ragged, **options):
    shared = options.pop("shared", None)
    return [
        [loop(ragged.logprobs[row], ragged.mask[row], shared=None if shared is None else shared[row], **options)]
        for row in np.ndindex(ragged.mask.shape[:-1])
    ]


@pytest.mark.parametrize("average", [False, True])
def test_sums_and_means_equal_the_definition(ragged, average):
    value = sequence_logprobs(ragged.logprobs, ragged.mask, average=average)
    close(np.ravel(value), np.ravel(rows_of(ragged, average=average)))


def test_golden_numbers(examples, tok):
    """The rows' sums with the log-ratio to the reference, as the sequence KL of RLOO."""
    log_ratio = sequence_logprobs(tok.old, tok.mask) - sequence_logprobs(tok.ref, tok.mask)
    close(log_ratio, examples["rloo.seq_kl_k1"])


@pytest.mark.parametrize("average", [False, True])
def test_tokens_beyond_the_shared_length_weigh_less(ragged, average):
    shared = np.random.default_rng(0).integers(0, 5, size=ragged.mask.shape[:-1])
    options = {"ld_alpha": 0.3, "average": average}
    value = sequence_logprobs(ragged.logprobs, ragged.mask, shared_lengths=shared, **options)
    close(np.ravel(value), np.ravel(rows_of(ragged, shared=shared, **options)))
    whole = sequence_logprobs(ragged.logprobs, ragged.mask, shared_lengths=shared, **options | {"ld_alpha": 1.0})
    close(whole, sequence_logprobs(ragged.logprobs, ragged.mask, average=average))


@pytest.mark.parametrize("options", [{}, {"average": True}, {"ld_alpha": 0.3}])
def test_packed_equals_padded(ragged, options):
    """The three samples of a prompt in one row, one after another."""
    mask, logprobs = ragged.mask.reshape(4, 18), ragged.logprobs.reshape(4, 18)
    segments = np.broadcast_to(np.repeat(np.arange(3), 6), (4, 18))
    shared = {"shared_lengths": np.full((4, 3), 2)} if "ld_alpha" in options else {}
    packed = sequence_logprobs(logprobs, mask, segment_ids=segments, num_segments=3, **options, **shared)
    close(packed, sequence_logprobs(ragged.logprobs, ragged.mask, **options, **shared))
    more = sequence_logprobs(logprobs, mask, segment_ids=segments, num_segments=4)
    close(more[:, 3], 0)
    fewer = sequence_logprobs(logprobs, mask, segment_ids=segments - 1, num_segments=2)
    close(fewer, sequence_logprobs(ragged.logprobs, ragged.mask)[:, 1:])


def test_padding_gradient_types_and_transformations(ragged):
    def run(padding, **options):
        logprobs = jnp.float32(np.where(ragged.mask, ragged.logprobs, padding))
        value, pullback = jax.vjp(lambda x: sequence_logprobs(x, ragged.mask, **options), logprobs)
        return value, pullback(jnp.ones_like(value))[0]

    for options in ({}, {"average": True}, {"ld_alpha": 0.3, "shared_lengths": np.ones((4, 3))}):
        value, gradient = run(0.0, **options)
        for padding in (np.nan, np.inf):
            chex.assert_trees_all_equal(run(padding, **options), (value, gradient))
        np.testing.assert_array_equal(np.asarray(gradient)[~ragged.mask], 0)
        assert value.dtype == jnp.float32
    close(run(0.0)[1], ragged.mask)
    lengths = np.maximum(ragged.mask.sum(-1, keepdims=True), 1)
    close(run(0.0, average=True)[1], ragged.mask / lengths)
    mapped = jax.jit(jax.vmap(sequence_logprobs))(ragged.logprobs, ragged.mask)
    close(mapped, sequence_logprobs(ragged.logprobs, ragged.mask))
    half = jnp.asarray(ragged.logprobs, jnp.bfloat16)
    close(sequence_logprobs(half, ragged.mask), sequence_logprobs(half.astype(jnp.float32), ragged.mask))
    with jax.enable_x64(True):
        x = jnp.asarray(np.where(ragged.mask, ragged.logprobs, 0.0))
        check_grads(jax.jit(lambda x: sequence_logprobs(x, ragged.mask, average=True)), (x,), 1, ["rev"], eps=1e-6)


def test_sequence_errors():
    x, mask = np.zeros((2, 3)), np.ones((2, 3), bool)
    with pytest.raises(ValueError, match="mask must be bool"):
        sequence_logprobs(x, np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"logprobs has shape \(2, 2\), but mask has shape \(2, 3\)"):
        sequence_logprobs(x[:, :2], mask)
    with pytest.raises(ValueError, match="ld_alpha and shared_lengths go together, but shared_lengths is None"):
        sequence_logprobs(x, mask, ld_alpha=0.5)
    with pytest.raises(ValueError, match="segment_ids and num_segments go together, but segment_ids is None"):
        sequence_logprobs(x, mask, num_segments=2)
    with pytest.raises(ValueError, match=r"shared_lengths has shape \(3,\), but mask has shape \(2, 3\)"):
        sequence_logprobs(x, mask, ld_alpha=0.5, shared_lengths=np.ones(3))
    with pytest.raises(ValueError, match="ld_alpha is -1"):
        sequence_logprobs(x, mask, ld_alpha=-1, shared_lengths=np.ones(2))


def test_implicit_reward(examples, pref):
    rewards = [implicit_reward(pref.chosen, pref.ref_chosen), implicit_reward(pref.rejected, pref.ref_rejected)]
    close(rewards, examples["dpo.rewards_w_l"])
    close(implicit_reward(pref.chosen, pref.ref_chosen, beta=1.0), examples["pref.delta_w"])
    close(implicit_reward(pref.rejected, pref.ref_rejected, beta=1.0), examples["pref.delta_l"])
    value, gradients = jax.value_and_grad(implicit_reward, argnums=(0, 1))(-1.0, -3.0)
    close((value, *gradients), (0.2, 0.1, 0.0))
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(3,\), but logprobs has shape \(2,\)"):
        implicit_reward(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="beta is 0"):
        implicit_reward(0.0, 0.0, beta=0)


def test_wpo_weights_equal_the_definition(ragged):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(*ragged.mask.shape, 7))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    log_sum_squared = np.where(ragged.mask, np.log((probs**2).sum(-1)), np.nan)
    expected = np.ones(ragged.mask.shape[:-1])
    for row in np.ndindex(expected.shape):
        tokens = np.flatnonzero(ragged.mask[row])
        if len(tokens):
            expected[row] = np.exp(np.mean([ragged.logprobs[row][t] - log_sum_squared[row][t] for t in tokens]))
    close(wpo_weights(ragged.logprobs, log_sum_squared, ragged.mask), expected)
    gradient = jax.grad(lambda x: wpo_weights(x, log_sum_squared, ragged.mask).sum())(jnp.float32(ragged.logprobs))
    assert not gradient.any()
