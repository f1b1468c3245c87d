import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.geometric_mean import gmpo_loss


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def gmpo_loop(data, advantages, *, low, high):
    """Section by section of the paper's equation: clip by the sign of A, mean of logs, exp."""
    losses, ratios = [], []
    for row in np.ndindex(data.mask.shape[:-1]):
        valid = np.flatnonzero(data.mask[row])
        if len(valid):
            logs = []
            for t in valid:
                lr, sign = data.logprobs[row][t] - data.old[row][t], np.sign(advantages[row][t])
                logs.append(sign * min(sign * lr, sign * np.clip(lr, -low, high)))
            ratios.append(np.exp(np.mean(logs)))
            losses.append(-np.mean(advantages[row][valid]) * ratios[-1])
    return np.mean(losses), np.array(ratios)


def test_golden_numbers(examples, tok):
    args = (tok.logprobs, tok.old, tok.advantages, tok.mask)
    close(gmpo_loss(*args)[0], examples["gmpo.loss_e0p4"])

    def ratios(clip):
        rows = [[np.asarray(x)[[row]] for x in args] for row in range(2)]
        return [gmpo_loss(*row, clip_low=clip, clip_high=clip)[1]["ratio/mean"].value() for row in rows]

    close(ratios(0.4), examples["gmpo.ratio_e0p4"])
    close(ratios(0.1), examples["gmpo.ratio_e0p1"])


@pytest.mark.parametrize("by_token", [False, True])
def test_equals_the_definition(ragged, by_token):
    advantages = ragged.token_advantages if by_token else ragged.advantages
    value, metrics = gmpo_loss(ragged.logprobs, ragged.old, advantages, ragged.mask, clip_low=0.1, clip_high=0.2)
    wide = advantages if by_token else np.broadcast_to(advantages[..., None], ragged.mask.shape)
    expected, ratios = gmpo_loop(ragged, wide, low=0.1, high=0.2)
    close(value, expected)
    close(metrics["ratio/mean"].value(), ratios.mean())
    close(metrics["ratio/max"].value(), ratios.max())
    lr, A = (ragged.logprobs - ragged.old)[ragged.mask], wide[ragged.mask]
    close(metrics["clip_ratio/low_mean"].value(), ((lr < -0.1) & (A < 0)).mean())
    close(metrics["clip_ratio/high_mean"].value(), ((lr > 0.2) & (A > 0)).mean())


def test_only_clipped_tokens_lose_their_gradient():
    lr = jnp.array([[-1.0, -0.1, 0.1, 1.0], [-1.0, -0.1, 0.1, 1.0]])
    grad = jax.grad(lambda x: gmpo_loss(x, jnp.zeros((2, 4)), jnp.array([1.0, -1.0]), jnp.ones((2, 4), bool))[0])(lr)
    assert (np.asarray(grad) != 0).tolist() == [[True, True, True, False], [False, True, True, True]]
    free = gmpo_loss(lr, jnp.zeros((2, 4)), jnp.ones(2), jnp.ones((2, 4), bool), clip_low=None, clip_high=None)[0]
    close(free, -1)


@pytest.mark.parametrize("extra", [(), ("weights",)])
def test_what_holds_of_every_loss(check_token_loss, ragged_rows, extra):
    arrays = ragged_rows("logprobs", "old_logprobs", "advantages", "mask", *extra)
    check_token_loss(gmpo_loss, arrays, mode="seq-mean-token-mean")


def test_errors(tok):
    with pytest.raises(ValueError, match=r"clip_high is -0.4: it must be finite and not negative"):
        gmpo_loss(tok.logprobs, tok.old, tok.advantages, tok.mask, clip_high=-0.4)


def test_tokens_without_an_advantage_have_no_ratio(ragged):
    advantages = np.where(np.arange(ragged.mask.shape[-1]) % 2, ragged.token_advantages, 0.0)
    value = gmpo_loss(ragged.logprobs, ragged.old, advantages, ragged.mask)[0]
    close(value, gmpo_loop(ragged, advantages, low=0.4, high=0.4)[0])
