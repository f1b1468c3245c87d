import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.sequence import grpo_s_loss, gspo_loss, gspo_token_loss, luspo_loss, sequence_log_ratio


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def surrogate(A, s, low, high):
    return max(-A * s, -A * np.clip(s, 1 - low, 1 + high))


def sequences_loop(data, *, low, high, normalize=True, weight=lambda n: 1.0):
    losses, ratios, clipped = [], [], []
    for row in np.ndindex(data.mask.shape[:-1]):
        lr = (data.logprobs - data.old)[row][data.mask[row]]
        if len(lr):
            s = np.exp(lr.sum() / (len(lr) if normalize else 1))
            A = data.advantages[row]
            losses.append(weight(len(lr)) * surrogate(A, s, low, high))
            ratios.append(s)
            clipped.append((s < 1 - low and A < 0, s > 1 + high and A > 0))
    return np.mean(losses), np.array(ratios), np.array(clipped)


def token_loop(data, *, low, high):
    losses = []
    for row in np.ndindex(data.mask.shape[:-1]):
        valid = data.mask[row]
        if valid.any():
            s = np.exp((data.logprobs - data.old)[row][valid].mean())
            losses.append(np.mean([surrogate(A, s, low, high) for A in data.token_advantages[row][valid]]))
    return np.mean(losses)


def test_golden_numbers(examples, tok):
    args = (tok.logprobs, tok.old, tok.advantages, tok.mask)
    close(sequence_log_ratio(tok.logprobs, tok.old, tok.mask)[:, 0], examples["gspo.seq_log_ratio"])
    close(np.exp(sequence_log_ratio(tok.logprobs, tok.old, tok.mask)[:, 0]), examples["gspo.seq_ratio"])
    joint = sequence_log_ratio(tok.logprobs, tok.old, tok.mask, length_normalize=False)[:, 0]
    close(np.exp(joint), examples["gspo.literal_product_ratio_seed003"])

    rows = [tuple(np.asarray(x)[[row]] for x in args) for row in range(2)]
    close([gspo_loss(*row)[0] for row in rows], examples["gspo.seq_losses_3e-4_4e-4"])
    close(gspo_loss(*args)[0], examples["gspo.loss_3e-4_4e-4"])
    wide = {"clip_low": 0.2, "clip_high": 0.2}
    close(gspo_loss(*args, **wide)[0], examples["gspo.loss_0p2"])
    close([luspo_loss(*row, **wide)[0] for row in rows], examples["luspo.seq_losses_0p2"])
    close(luspo_loss(*args, **wide)[0], examples["luspo.loss_0p2"])
    grad = jax.grad(lambda x: gspo_loss(x, *args[1:], **wide)[0])(jnp.float32(tok.logprobs))
    # Of the sequence's own loss: the mean over the two sequences has half of it.
    close(2 * grad[1, :2], np.full(2, examples["gspo.grad_wrt_logp_row1_unclipped"]))
    by_token = np.array([[0.5, 0.5, 1, -1], [-1, 0, np.nan, np.nan]])
    close(gspo_token_loss(*args[:2], by_token, tok.mask, **wide)[0], examples["gspo_token.loss_0p2_tokenadv"])


@pytest.mark.parametrize("normalize", [True, False])
def test_log_ratio_equals_the_definition(ragged, normalize):
    value = sequence_log_ratio(ragged.logprobs, ragged.old, ragged.mask, length_normalize=normalize)
    for row in np.ndindex(ragged.mask.shape[:-1]):
        lr = (ragged.logprobs - ragged.old)[row][ragged.mask[row]]
        close(value[row], np.full(6, (lr.mean() if normalize else lr.sum()) if len(lr) else 0))


@pytest.mark.parametrize(
    ("loss", "options", "loop"),
    [
        (gspo_loss, {}, {"low": 3e-4, "high": 4e-4}),
        (gspo_loss, {"clip_low": 0.1, "clip_high": 0.15}, {"low": 0.1, "high": 0.15}),
        (
            gspo_loss,
            {"clip_low": 0.2, "clip_high": 0.2, "length_normalize": False},
            {"low": 0.2, "high": 0.2, "normalize": False},
        ),
        (luspo_loss, {}, {"low": 2e-3, "high": 2.5e-3, "weight": lambda n: n}),
        (grpo_s_loss, {}, {"low": 0.2, "high": 0.28}),
    ],
)
def test_equals_the_definition(ragged, loss, options, loop):
    value, metrics = loss(ragged.logprobs, ragged.old, ragged.advantages, ragged.mask, **options)
    expected, ratios, clipped = sequences_loop(ragged, **loop)
    close(value, expected)
    close(metrics["ratio/mean"].value(), ratios.mean())
    close(metrics["ratio/max"].value(), ratios.max())
    close(metrics["clip_ratio/low_mean"].value(), clipped[:, 0].mean())
    close(metrics["clip_ratio/high_mean"].value(), clipped[:, 1].mean())
    close(metrics["clip_ratio/region_mean"].value(), clipped.any(-1).mean())
    lr = (ragged.logprobs - ragged.old)[ragged.mask]
    close(metrics["approx_kl/k3"].value(), (np.exp(lr) - 1 - lr).mean())


def test_gspo_token_equals_the_definition(ragged):
    options = {"clip_low": 0.1, "clip_high": 0.15}
    value, metrics = gspo_token_loss(ragged.logprobs, ragged.old, ragged.token_advantages, ragged.mask, **options)
    close(value, token_loop(ragged, low=0.1, high=0.15))
    assert metrics["clip_ratio/region_mean"].count == ragged.mask.sum()
    assert metrics["ratio/mean"].count == ragged.mask.any(-1).sum()


def test_gspo_token_equals_gspo_where_the_advantage_is_constant(ragged):
    def grad(loss):
        args = (ragged.old, ragged.advantages, ragged.mask)
        wide = {"clip_low": 0.1, "clip_high": 0.15}
        return jax.value_and_grad(lambda x: loss(x, *args, **wide)[0])(jnp.float32(ragged.logprobs))

    chex.assert_trees_all_close(grad(gspo_token_loss), grad(gspo_loss), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_token_has_its_own_advantage(ragged):
    def loss(x):
        args = (ragged.token_advantages, ragged.mask)
        return gspo_token_loss(x, ragged.old, *args, clip_low=None, clip_high=None)[0]

    grad = jax.grad(loss)(jnp.float32(ragged.logprobs))
    for row in np.ndindex(ragged.mask.shape[:-1]):
        valid = ragged.mask[row]
        s = np.exp((ragged.logprobs - ragged.old)[row][valid].mean()) if valid.any() else 0
        expected = -ragged.token_advantages[row] * s / max(valid.sum(), 1) / ragged.mask.any(-1).sum()
        close(grad[row], np.where(valid, expected, 0))


def test_on_its_own_samples_the_joint_ratio_has_the_gradient_of_reinforce(ragged):
    def loss(x):
        return gspo_loss(x, None, ragged.advantages, ragged.mask, length_normalize=False)[0]

    grad = jax.grad(loss)(jnp.float32(ragged.logprobs))
    expected = -ragged.advantages[..., None] / ragged.mask.any(-1).sum()
    close(grad, np.where(ragged.mask, expected, 0))


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_far_sequences_are_finite_and_do_not_move(loss, far):
    def value(x):
        return loss(x, jnp.zeros((1, 2)), jnp.array([-1.0]), jnp.ones((1, 2), bool), clip_low=None, clip_high=None)[0]

    value, grad = jax.value_and_grad(value)(jnp.full((1, 2), far))
    close(value, np.exp(10 if far > 0 else -20))
    assert not grad.any()


def test_weights_of_sequences_and_of_tokens(ragged):
    args = (ragged.logprobs, ragged.old, ragged.advantages, ragged.mask)
    weights = np.random.default_rng(2).random(ragged.advantages.shape)
    by_token = np.broadcast_to(weights[..., None], ragged.mask.shape)
    close(gspo_loss(*args, weights=weights)[0], gspo_loss(*args, weights=by_token)[0])
    scaled = gspo_loss(*args[:2], ragged.advantages * weights, ragged.mask)[0]
    close(gspo_loss(*args, weights=weights)[0], scaled)


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss, luspo_loss, grpo_s_loss])
def test_what_holds_of_every_loss(check_token_loss, ragged_rows, loss):
    arrays = ragged_rows("logprobs", "old_logprobs", "advantages", "mask", "weights")

    def wide(**arguments):
        return loss(**arguments, clip_low=0.1, clip_high=0.15)

    mode = "seq-mean-token-sum" if loss is luspo_loss else "seq-mean-token-mean"
    check_token_loss(wide, arrays, mode=mode, detached=loss is gspo_token_loss)


def test_what_holds_of_every_loss_also_holds_of_the_joint_ratio(check_token_loss, ragged_rows):
    def loss(**arguments):
        return gspo_loss(**arguments, clip_low=0.2, clip_high=0.2, length_normalize=False)

    arrays = ragged_rows("logprobs", "old_logprobs", "advantages", "mask")
    check_token_loss(loss, arrays, mode="seq-mean-token-mean")


def test_gspo_token_with_token_advantages(check_token_loss, ragged_rows):
    def loss(token_advantages, **arguments):
        return gspo_token_loss(**arguments, advantages=token_advantages, clip_low=0.1, clip_high=0.15)

    arrays = ragged_rows("logprobs", "old_logprobs", "token_advantages", "mask")
    check_token_loss(loss, arrays, mode="seq-mean-token-mean", detached=True)


def test_errors(tok):
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(2, 3\), but mask has shape \(2, 4\)"):
        sequence_log_ratio(tok.logprobs, np.zeros((2, 3)), tok.mask)
    with pytest.raises(ValueError, match="clip_low is -1"):
        gspo_loss(tok.logprobs, tok.old, tok.advantages, tok.mask, clip_low=-1)
    with pytest.raises(ValueError, match=r"advantages has shape .* with segment_ids"):
        luspo_loss(tok.logprobs, tok.old, tok.advantages, tok.mask, segment_ids=tok.mask * 1)
